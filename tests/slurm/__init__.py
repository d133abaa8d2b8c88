"""Training on a Slurm cluster that is real, on one machine."""
