"""The foundations of pruning: activations between blocks, Grams of a block's layers, and records of a run.

`records` are a run's events, `reports` has `PruneReport`.
"""
