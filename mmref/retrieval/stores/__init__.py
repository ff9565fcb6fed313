"""Engines that hold what an index knows of its items, and find the candidates of a search: one file each, `store.py` the seam."""
