"""A model opened in parts, its blocks read one by one as Flax modules.

`prunable` has what every model that is pruned has, a `PrunableModel`; `streamed` has `open_model`.
"""
