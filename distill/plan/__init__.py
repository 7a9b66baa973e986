"""Settings and a number of GPUs -> what a run would train, need and take."""
