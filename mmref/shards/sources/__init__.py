"""One file per dataset: each reads its native layout and yields objects with images and captions.
`mmref/shards/samples.py` says what a source must offer."""
