"""Search of your own images: `index` writes an index directory, `searcher` answers from it, `feedback` keeps what people
judged. Importing this package loads neither Ray nor torch."""
