"""What ``python -m tercet.cli`` runs."""

from tercet.cli import app as main

main()
