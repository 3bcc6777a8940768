"""Blocks and models in another shape: `reordered` moves inner channels, `shrunk` makes smaller dense models."""
