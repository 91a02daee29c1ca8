"""Training: the run folder, the optimizer, checkpoints, and the loop that yields events."""
