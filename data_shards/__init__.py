"""Builds shard sets: sources (one file a dataset) -> tars, byte index, manifest. Reading them is `mmref/data/shards.py`.
The bundled set lives in `emoji/`; `mmref shards build|inspect|verify` calls what is here."""
