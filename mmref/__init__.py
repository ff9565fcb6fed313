"""mmref: fine-grained text-to-image retrieval with multi-modal references, from a laptop to a Ray cluster."""

__version__ = "0.1.0"
