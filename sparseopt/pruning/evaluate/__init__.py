"""A model judged: `evaluation` has perplexity and the audit of its zeros, `zero_shot` the tasks of lm-eval.

`scoring` has the likelihoods of continuations that these tasks ask for.
"""
