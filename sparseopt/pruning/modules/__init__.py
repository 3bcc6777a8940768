"""Pruning of modules in memory: Flax NNX, Flax Linen, torch.

`watched` is the interface that `prune_module` uses, `lanes` runs a module on many batches in step, `layouts` turns
kernels into matrices.
"""
