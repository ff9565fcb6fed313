"""Builds shard sets: sources (one file a dataset) -> tars, byte index, manifest; `mmref/data/shards.py` reads them.
The bundled set lives in `emoji/`; `mmref shards build|inspect|verify` calls what is here."""
