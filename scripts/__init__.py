"""Command-line tools beside train.py and eval.py; each says in its first lines what it does."""
