"""Bytes <-> records, one module per format. Every reader yields the same thing: a tensor index."""
