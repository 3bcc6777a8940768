"""Many weights: the largest one that matters, fits along falling weights, and the choice among them.

`trend_path`, `largest_weight` and `choose_weight`.
"""
