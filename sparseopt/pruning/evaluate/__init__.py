"""Evaluation of a model: `perplexity`, `audit` of its zeros, and `zero_shot` for tasks of lm-eval.

`scoring` has the likelihoods of continuations that these tasks need.
"""
