"""Checkpoint directory -> bundle directory, one per target."""
