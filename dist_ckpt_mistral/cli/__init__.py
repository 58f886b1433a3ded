"""What a terminal sees: options, one function for each command, exit codes, and every line that is printed.

May enter: parsing of arguments, wording of results for people, progress, the demo and the processes that it starts.
May not: anything that a caller of the library would miss. No other room imports this one.
"""
