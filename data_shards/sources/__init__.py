"""One file per dataset: each reads its native layout and yields objects with images and captions.
`data_shards/samples.py` says what a source must offer."""
