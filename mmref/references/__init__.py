"""`mmref references`: rows of a finished run's bank, described, added and removed."""
