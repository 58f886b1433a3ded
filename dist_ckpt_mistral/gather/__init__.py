"""The plan of byte copies, and what carries it out: boxes and links in, copied, compared or digested bytes out.

May enter: numbers: offsets, shapes, element types, positions in files.
May not: a file format, a name of a tensor that means anything, or a model.
"""
