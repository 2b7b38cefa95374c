"""Entry point of ``python -m tercet``, also under torchrun."""

from tercet.cli.app import main

main()
