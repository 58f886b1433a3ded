"""The plan of byte copies, and its execution: from boxes and links to copied, compared or digested bytes.

May enter: offsets, shapes, element types, positions in files.
May not: a file format, a model, or the meaning of a tensor's name.
"""
