"""Penalties, sets and patterns: pytrees with a `value` and a `prox`.

`protocols` has what a solver may ask of them, `names` their short names in configs and on the command line.
"""
