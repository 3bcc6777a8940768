"""Prune one linear layer, from its weight and the Gram matrix of its inputs; models and files are unknown here.

`patterns` and `problem` say what is solved, `methods` how, `split` and `side_by_side` in which memory and on which
devices; `prune_layer` checks the arguments and calls them.
"""
