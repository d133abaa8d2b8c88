"""What scripts/pack.py is made of: records, the work on them, and their audit."""
