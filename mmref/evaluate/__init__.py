"""`mmref evaluate`: features of a split, ranking metrics, bootstrap intervals, reference-based refinement, the report.

`evaluation` opens a run and `split_features` uses Ray; metrics, intervals and refinement take NumPy arrays and know
nothing of runs, Ray or training.
"""
