"""Settings -> a run: opened, trained on any number of processes, stopped, continued, saved."""
