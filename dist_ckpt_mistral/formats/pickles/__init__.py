"""Pickles: a check of opcodes, an unpickler with an allowlist, tensors, and a writer. No other module unpickles."""
