"""Pickles: a check of their opcodes, an unpickler with an allowlist, and a writer. Nothing else unpickles."""
