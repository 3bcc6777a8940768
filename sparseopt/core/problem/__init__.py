"""A problem and how it is solved: `Problem`, `Solution`, `Status`, the one loop, the one certificate, derivatives.

`units` and `padding` restate a problem: in units in which it is well scaled, and in one of few sizes.
"""
