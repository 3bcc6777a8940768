"""A model opened in parts, its blocks read one by one: as Flax modules, or through torch.

`prunable` has what both are, a `PrunableModel`; `streamed` has `open_model`.
"""
