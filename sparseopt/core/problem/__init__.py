"""A problem and how it is solved: `Problem`, `Solution`, `Status`, the one loop, the one certificate, derivatives.

`units` restates a problem in units in which it is well scaled, and `padding` in one of few sizes.
"""
