"""Modules that are held in memory, pruned where they are: Flax NNX, Flax Linen, torch.

`watched` is what `prune_module` asks of a module, `lanes` runs it on many batches in step, `layouts` says how a kernel
is a matrix.
"""
