"""Files wherever they lie: places and URLs, retries, locks, caches, text, tables, and folders that are whole or absent."""
