"""How a request is fitted: the methods, in files `NAME_plan.py`, `choice.py`, which chooses, and fits of losses.

A method is a `Method` with its settings, a `name`, `refuses(fit)` and `plan(fit)`; `so.trend` exports them.
"""
