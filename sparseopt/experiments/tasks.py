"""Floor 7: the list of tasks that a config can name. Each is imported on use, for it may need an extra's packages.

A task of your own, a subclass of `Task`, goes by its dotted path.
"""

import difflib
import importlib
from typing import Any

from sparseopt.experiments.names import AllowCode, find_class, shortened, suggest
from sparseopt.experiments.task import Task

TASKS = {
    "denoise": "task_denoise.Denoise",
    "convergence": "task_convergence.Convergence",
    "graph_signal": "task_graph.GraphSignal",
    "groups": "task_groups.Groups",
    "prune": "task_prune.Prune",
    "descent": "task_descent.Descent",
}


def find_task(kind: str, allow_code: AllowCode = False) -> type[Task]:
    """The class of a task.

    Args:
        kind: a name in `TASKS`, or the path of a class.
        allow_code: whether to import a path outside this package.

    Raises:
        ValueError: for the path of something that is no task, or one that is not allowed.
        ModuleNotFoundError: if a package of its extra is missing.
    """
    if kind not in TASKS:
        found = find_class(kind, {}, "task", allow_code)
        if not (isinstance(found, type) and issubclass(found, Task)):
            raise ValueError(f"{kind} is no subclass of sparseopt.experiments.task.Task")
        return found
    module, name = TASKS[kind].split(".")
    return getattr(importlib.import_module(f"sparseopt.experiments.{module}"), name)


def nearest_task(kind: Any, allow_code: AllowCode = False) -> tuple[str | None, str | None]:
    """The task that a config's `task` names or means, if any, and what is wrong with the name, if anything."""
    if kind is None:
        return None, f"this key is missing; known tasks are {', '.join(TASKS)}"
    if not isinstance(kind, str):
        return None, f"must be the name of a task, given {shortened(kind)}; {suggest('', TASKS)}"
    if kind in TASKS:
        return kind, None
    if "." in kind:
        try:
            find_task(kind, allow_code)
        except ValueError as error:
            return None, str(error)
        return kind, None
    near = difflib.get_close_matches(kind, TASKS, n=1)
    return (near[0] if near else None), f"there is no task {shortened(kind)}; {suggest(kind, TASKS)}"
