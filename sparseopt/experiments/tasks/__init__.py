"""The tasks of the package, one file each: `prune` and `shrink` share `model`; `denoise` and `graph` smooth signals.

`experiments.task` defines tasks, and its table `TASKS` names them; each is imported on use.
"""
