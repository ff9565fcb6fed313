"""From shards to global batches: reading by byte offset, the plan of each step, decoding, tokens, augmentation.
`shard_set.py` is the only file here that knows how a shard set lies on disk."""
