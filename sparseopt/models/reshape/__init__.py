"""Changing the shape of blocks and models.

`reordered` moves the inner channels of a block, `shrunk` makes smaller dense models.
"""
