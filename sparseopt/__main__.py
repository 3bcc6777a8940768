"""`python -m sparseopt`: the `sparseopt` command."""

from sparseopt.cli import main

main()
