"""The keys of an experiment's config, from the tasks and the blocks of `sparseopt.experiments`."""

import inspect
import re
from typing import Any

from pydantic_core import PydanticUndefined

from sparseopt.experiments import datasets
from sparseopt.experiments.datasets import Picture
from sparseopt.experiments.task import TASKS, Paper, PaperFigure, Task, find_task

ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def page() -> str:
    """MyST text: the keys of every task, those of each task, those of the blocks in them, and the data."""
    parts = [_section("Every task", Task)]
    parts += [_section(f"`task: {name}`", find_task(name), without=Task) for name in TASKS]
    blocks = {"picture": Picture, "paper": Paper, "paper.figures": PaperFigure}
    parts += [_section(f"`{key}`", block) for key, block in blocks.items()]
    return "\n".join([*parts, "## The data\n", inspect.cleandoc(datasets.__doc__ or "")])


def _section(title: str, block: Any, without: type = object) -> str:
    """A heading, what a block is, and its keys, but those that it has from another."""
    documented = {key: field.description for key, field in block.model_fields.items() if field.description}
    for base in block.__mro__:
        if not issubclass(without, base):
            documented = dict(ATTRIBUTE.findall(inspect.cleandoc(base.__doc__ or ""))) | documented
    text = inspect.cleandoc(block.__doc__).partition("\n\n")[0]
    if recipe := getattr(block, "kind", None):
        text += f" The fields of {{py:class}}`{recipe.__name__} <sparseopt.pruning.{recipe.__name__}>` are keys too."
    rows = [
        f"| `{key}` | {_default(block.model_fields[key].default)} | {' '.join(text.split())} |"
        for key, text in documented.items()
        if key in block.model_fields
    ]
    return "\n".join([f"## {title}\n\n{text}\n", "| key | default | |", "|---|---|---|", *rows, ""])


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or value in ("", (), [], {}):
        return "none"
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, dict):
        value = "{" + ", ".join(f"{key}: {part}" for key, part in value.items() if part not in (None, ())) + "}"
    return f"`{value}`"
