"""A checkpoint as other libraries see it, read only.

May enter: interfaces that other libraries define (a mapping, a storage reader), over the tensors of any model source.
May not: a second reader of a format, or a second way to copy bytes.
"""
