"""The only room that touches a file system: reads and writes at positions, small files, staging, paths, the hub.

May enter: calls of the operating system, and the checks that decide whether a path may be read or written.
May not: the meaning of the bytes.
"""
