"""Readers of the users' formats: each turns a place on disk into an ``Index`` and reads no image."""

from torchive.data.readers.index import Index, Objects, Record, Segments
from torchive.data.readers.source import Source, parse_source, read_index

__all__ = ["Index", "Objects", "Record", "Segments", "Source", "parse_source", "read_index"]
