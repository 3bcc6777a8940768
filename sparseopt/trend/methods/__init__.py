"""How a job is fitted: the methods, in files `NAME_plan.py`, `choice.py`, which chooses one, and the fits of losses.

A method is a `Method` with its settings, a `name`, `refuses(job)` and `plan(job)`; `so.trend` exports them.
"""
