"""Pages made from the package: the command line, the keys of configs, the methods, and what each solver accepts."""

import inspect
import re
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from pydantic_core import PydanticUndefined

import sparseopt as so
from sparseopt.experiments import datasets
from sparseopt.experiments.datasets import Picture
from sparseopt.experiments.task import TASKS, Paper, PaperFigure, Task, find_task
from sparseopt.pruning import METHODS
from sparseopt.shell.app import app

KINDS = {"str": "TEXT", "int": "INTEGER", "float": "NUMBER", "Path": "PATH"}
ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
CHOSEN, TAKEN = "**chosen**", "yes"


def command_line() -> str:
    """A section for each command."""
    group: Any = typer.main.get_command(app)
    return "\n".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command: Any) -> str:
    """Usage, help, arguments, and options by panel."""
    # A command of a recipe has all its options where it is called.
    whole = command.make_context(name, [], resilient_parsing=True).command
    hints = typing.get_type_hints(inspect.unwrap(whole.callback))
    usage, panels = [f"sparseopt {name}"], dict[str | None, list[str]]()
    for parameter in whole.params:
        if getattr(parameter, "hidden", False):
            continue
        argument = parameter.param_type_name == "argument"
        label = _label(parameter, argument, hints[parameter.name])
        help_text = _options_as_code(" ".join((parameter.help or "").split()).replace("|", "\\|"))
        row = f"| `{label}` | {_default(parameter)} | {help_text} |"
        panels.setdefault(parameter.rich_help_panel, []).append(row)
        if argument or parameter.required:
            usage.append(label if parameter.required else f"[{label}]")
    examples = "\n".join((command.epilog or "").split("\n\n")[1:])
    text = f"## `sparseopt {name}`\n\n{_options_as_code(command.help or '')}\n"
    text += f"\n```text\n{' '.join([*usage, '[OPTIONS]'])}\n```\n\n```bash\n{examples}\n```\n"
    for panel, lines in panels.items():
        heading = f"\n**{panel}**\n" if panel else ""
        text += "\n".join((heading, "| argument or option | default | |", "|---|---|---|", *lines, ""))
    return text


def _label(parameter: Any, argument: bool, kind: Any) -> str:
    if argument:
        return parameter.metavar or parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    flag, switch = max(parameter.opts, key=len), kind is bool
    # Of `T | None` and `list[T]` that of T.
    while parts := [part for part in typing.get_args(kind) if part is not type(None)]:
        kind = parts[0]
    return flag if switch else f"{flag} {parameter.metavar or KINDS.get(getattr(kind, '__name__', ''), 'VALUE')}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.default, bool):
        return "on" if parameter.default else "off"
    return "none" if parameter.default in (None, [], ()) else f"`{parameter.default}`"


def _options_as_code(text: str) -> str:
    """Names of options in backticks, unless they are; in plain text their two hyphens would become a dash."""
    return re.sub(r"`[^`]*`|(?<![\w-])--[a-z][a-z-]*", lambda m: m[0] if m[0].startswith("`") else f"`{m[0]}`", text)


def tasks() -> str:
    """The keys of configs: those of every task, those of each task, those of the blocks in them, and the data."""
    parts = [_block("Every task", Task)]
    parts += [_block(f"`task: {name}`", find_task(name), without=Task) for name in TASKS]
    blocks = {"picture": Picture, "paper": Paper, "paper.figures": PaperFigure}
    parts += [_block(f"`{key}`", block) for key, block in blocks.items()]
    return "\n".join([*parts, "## The data\n", inspect.cleandoc(datasets.__doc__ or "")])


def _block(title: str, block: Any, without: type = object) -> str:
    """A heading, what a block is, and its keys, but those that it has from another."""
    documented = {key: field.description for key, field in block.model_fields.items() if field.description}
    for base in block.__mro__:
        if not issubclass(without, base):
            documented = dict(ATTRIBUTE.findall(inspect.cleandoc(base.__doc__ or ""))) | documented
    text = inspect.cleandoc(block.__doc__).partition("\n\n")[0]
    if recipe := getattr(block, "kind", None):
        text += f" The fields of {{py:class}}`{recipe.__name__} <sparseopt.pruning.{recipe.__name__}>` are keys too."
    rows = [
        f"| `{key}` | {_key_default(block.model_fields[key].default)} | {' '.join(text.split())} |"
        for key, text in documented.items()
        if key in block.model_fields
    ]
    return "\n".join([f"## {title}\n\n{text}\n", "| key | default | |", "|---|---|---|", *rows, ""])


def _key_default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or value in ("", (), [], {}):
        return "none"
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, dict):
        value = "{" + ", ".join(f"{key}: {part}" for key, part in value.items() if part not in (None, ())) + "}"
    return f"`{value}`"


def methods() -> str:
    """The pruning methods by name, from their registry."""
    rows = [
        f"| `{name}` | {method.summary} | {', '.join(f'`{preset}`' for preset in method.presets)} |"
        for name, method in METHODS.items()
    ]
    return "\n".join(["| method | what it does | presets |", "|---|---|---|", *rows, ""])


@so.pytree
class OwnLoss:
    """Half the squared distance to a target: a value and a gradient, and nothing else."""

    target: Any

    def value(self, x: jax.Array) -> jax.Array:
        return jnp.sum((x - self.target) ** 2) / 2

    def gradient(self, x: jax.Array) -> jax.Array:
        return x - self.target


def problems() -> dict[str, so.Problem]:
    """One problem of every kind, by label."""
    matrix, target, labels = np.ones((4, 3), np.float32), np.ones(4, np.float32), np.ones(4, np.float32)
    quadratic = so.Quadratic(np.eye(3, dtype=np.float32), np.ones(3, np.float32))
    squares = so.LeastSquares(matrix, target)
    logistic = so.LogisticLoss(matrix, labels)
    quantile = so.DataLoss(so.scalar.Quantile(0.9), matrix, target)
    own, differences = OwnLoss(np.ones(3, np.float32)), so.Graph.chain(3).matrix(1)
    many = so.LeastSquares(None, np.ones(4000, np.float32))
    return {
        "`LeastSquares`, convex penalty": so.Problem(squares, so.L1(1.0)),
        "`LeastSquares`, other penalty": so.Problem(squares, so.MCP(1.0)),
        "other losses of data, smooth, such as logistic": so.Problem(logistic, so.L1(1.0)),
        "other losses of data, with kinks, such as quantiles": so.Problem(quantile, so.L1(1.0)),
        "`Quadratic`, convex penalty": so.Problem(quadratic, so.L1(1.0)),
        "`Quadratic`, other penalty": so.Problem(quadratic, so.L0(1.0)),
        "`Quadratic`, fixed support": so.Problem(quadratic, so.Support(np.ones(3, bool))),
        "own loss: `value`, `gradient`": so.Problem(own, so.L1(1.0)),
        "`LeastSquares`, operator": so.Problem(squares, so.L1(1.0), differences),
        "`LeastSquares`, operator, 4,000 unknowns": so.Problem(many, so.L1(1.0), so.Graph.chain(4000).matrix(1)),
        "other losses of data, operator": so.Problem(quantile, so.L1(1.0), differences),
        "`Quadratic`, operator": so.Problem(quadratic, so.L1(1.0), differences),
        "own loss, operator": so.Problem(own, so.L1(1.0), differences),
    }


def solvers() -> str:
    """One row per problem, one column per public solver, and the reasons by number below."""
    public = [getattr(so, name) for name in so.__all__]
    asked = [made() for made in public if isinstance(made, type) and hasattr(made, "refuses") and hasattr(made, "step")]
    reasons: dict[str, int] = {}
    titles = [f"`{type(solver).__name__}`" for solver in asked]
    rows = [f"| {' | '.join(['problem', *titles])} |", "|---" * (len(asked) + 1) + "|"]
    for words, problem in problems().items():
        refused = [solver.refuses(problem) for solver in asked]
        # If all refuse there is no choice.
        chosen = None if all(refused) else type(so.chosen_solver(problem).solver)
        cells = []
        for solver, reason in zip(asked, refused, strict=True):
            if reason is None:
                cells.append(CHOSEN if type(solver) is chosen else TAKEN)
            else:
                # Without the solver's name and the given value, which differ from row to row.
                need = reason.removeprefix(f"{type(solver).__name__} ").partition(", given ")[0]
                number = reasons.setdefault(f"{need[0].upper()}{need[1:]}.", len(reasons) + 1)
                cells.append(f"[{number}]")
        rows.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join([*rows, "", *(f"{number}. {reason}" for reason, number in reasons.items()), ""])
