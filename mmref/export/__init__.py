"""A trained model as a folder of its own: written from a run, loaded without one."""
