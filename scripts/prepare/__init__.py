"""The parts of prepare_imagenet.py: where images come from, what is noted of each, how work outlives a kill, the audit."""
