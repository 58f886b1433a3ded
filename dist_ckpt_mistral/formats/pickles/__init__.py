"""Pickles: a check of their opcodes, an unpickler with an allowlist, and a writer. No other module unpickles."""
