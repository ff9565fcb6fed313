"""`mmref sizing`: what a config needs of memory, computed from its model."""
