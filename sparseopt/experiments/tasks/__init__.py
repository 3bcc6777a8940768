"""The tasks of the package, a file each: `prune` and `shrink` share `model`; `denoise` and `graph` smooth signals.

`experiments.task` says what a task is, and its table `TASKS` names them; each is imported on use.
"""
