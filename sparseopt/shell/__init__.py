"""The `sparseopt` command: one file for each group of commands, what is shown on the screen, and the demo."""
