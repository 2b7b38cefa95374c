"""What ``python -m tercet.cli`` runs."""

from tercet.cli import main

main()
