"""Faults caused for real, and what a run makes of them: the measurements behind scripts/torture.py."""
