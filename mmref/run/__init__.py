"""The run directory: its files, its checkpoints as they are read, and a run's progress."""
