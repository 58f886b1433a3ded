"""Bytes and records: one module or folder for each format, read and written without torch.

May enter: what a file format says, per version of the format, with the upstream source that defines it.
May not: anything about Mistral models; ``model`` is never imported here. README.md has the facts and their evidence.
"""
