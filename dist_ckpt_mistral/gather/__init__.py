"""The gather: boxes, tensor indexes, the pure byte plan, the bands it is read in, and its executor."""
