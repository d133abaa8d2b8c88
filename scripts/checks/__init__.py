"""What scripts/doctor.py checks: one function for each thing that can be wrong before a run begins."""
