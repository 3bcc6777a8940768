"""The methods of the trend filter, one per file, and `choice.py`, which takes one for a job.

A method is an object with its settings, a `name`, `refuses(job)` and `plan(job)`; `so.trend` hands them out.
"""
