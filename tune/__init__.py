"""Hyper-parameter sweeps: a space in YAML (space.py), a trial that is a whole training (trial.py), and the sweep over
them (sweep.py) with what it leaves behind (results.py)."""
