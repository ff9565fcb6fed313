"""`mmref shards`: builds shard sets from sources, and looks into them."""
