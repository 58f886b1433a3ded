"""The gather: boxes, tensor indexes, the pure byte plan, and its executor."""
