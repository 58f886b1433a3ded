"""Parallel layouts: which rank holds which layers, and which box of which tensor."""
