"""From shards to global batches: reading by byte offset, the plan of each step, decoding, tokens, augmentation.

`shard_set.py`, `manifest.py` and `sample_reader.py` alone know how a shard set lies on disk.
"""
