"""The reference page of the command line, generated from the typer application."""

import inspect
import re
import typing
from typing import Any

import typer

from sparseopt.shell.app import app

KINDS = {"str": "TEXT", "int": "INTEGER", "float": "NUMBER", "Path": "PATH"}


def page() -> str:
    """MyST text: one section per command, with usage, help, arguments, and options by panel."""
    group: Any = typer.main.get_command(app)
    return "\n".join(_section(name, command) for name, command in group.commands.items())


def _section(name: str, command: Any) -> str:
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
