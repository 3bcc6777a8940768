"""What the room stands on: activations between blocks, Grams of the linears of a block, and records of a run.

`records` are a run's events, `reports` has `PruneReport`.
"""
