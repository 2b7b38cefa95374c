"""The command line: one function a verb, no logic of its own.

Results go to standard output; progress and errors go to standard error. Exit status: 0 done,
2 the user can mend it, 1 with a traceback is a bug of ours.
"""

from tercet.cli.app import app, main

__all__ = ["app", "main"]
