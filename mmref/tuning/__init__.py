"""`mmref tune` and `mmref ablate`: sweeps on Ray Tune, and tables of rows that are trained alike."""
