"""Models opened in parts, with blocks read one by one as Flax modules.

`prunable` has `PrunableModel`, the interface of every model to prune; `streamed` has `open_model`.
"""
