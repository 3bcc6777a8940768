"""Blocks and models of another shape.

`reordered` moves the inner channels of a block, `shrunk` makes smaller dense models.
"""
