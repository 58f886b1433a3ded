"""Stored tensors and the table of the model: which rows of which stored tensor are whose.

May enter: what knows both files and the model: matching of names and shapes, the choice of a configuration, chunking.
May not: a guess. A tensor that fits no row of the table, or a row without a tensor, is an error with a name.
"""
