"""The picture of a reading plan: ribbons from chunks to ranks, and the matrix of both, drawn with matplotlib."""
