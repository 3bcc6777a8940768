"""`python -m sparseopt`: the `sparseopt` command."""

from sparseopt.shell.app import main

# A path in a config may import every module of the package.
if __name__ == "__main__":
    main()
