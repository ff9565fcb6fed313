"""Files wherever they lie: places and URLs, downloads, retries, locks, caches, texts and tables, files of arrays and tensors,
and folders that are whole or absent."""
