"""The only room that touches a file system: reading and writing at positions, small files whole, staging, paths.

May enter: calls of the operating system, and what tells whether a place may be read or written.
May not: what the bytes mean.
"""
