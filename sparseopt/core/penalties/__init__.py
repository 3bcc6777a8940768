"""Penalties, sets and patterns: pytrees with a `value` and a `prox`.

`protocols` defines what a solver may ask of them, `names` has their short names in configs and on the command line.
"""
