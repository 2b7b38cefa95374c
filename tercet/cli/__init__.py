"""The command line: one function for each command; it reads options, calls the package, prints.

Results go to standard output; progress and errors go to standard error. Exit status: 0 done,
2 the user can fix it, 1 with a traceback is a bug of ours.
"""

from tercet.cli.app import main

__all__ = ["main"]
