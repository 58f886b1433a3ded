"""The command line: options, one function for each command, exit codes, and everything that is printed.

May enter: parsing of arguments, wording of results for people, progress, the demo and the processes that it starts.
May not: anything that a user of the library needs. No other room imports this one. Commands import numpy, Megatron and
the like inside their functions, because ``--help`` must be quick.
"""
