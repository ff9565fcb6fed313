"""The version of mmref, for whatever writes it into a file."""

__version__ = "0.2.0"
