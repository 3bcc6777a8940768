"""The reference page of the command line, generated from the typer application."""

import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from typer.models import ArgumentInfo, CommandInfo, OptionInfo

from sparseopt.shell.app import app
from sparseopt.shell.options import completed

KINDS = {"str": "TEXT", "int": "INTEGER", "float": "NUMBER", "Path": "PATH"}


def page() -> str:
    """MyST text: one section per command, with usage, help, arguments, and options by panel."""
    return "\n".join(_section(command) for command in app.registered_commands)


def _section(command: CommandInfo) -> str:
    assert command.callback is not None
    callback: Callable[..., Any] = completed(command.callback)
    name = command.name or callback.__name__.replace("_", "-")
    hints = typing.get_type_hints(callback, include_extras=True)
    usage, rows = [f"sparseopt {name}"], {}
    for parameter in inspect.signature(callback).parameters.values():
        kind, info = _parts(hints[parameter.name])
        if info is None or info.hidden:
            continue
        required = parameter.default is parameter.empty
        label = _label(parameter.name, kind, info)
        row = f"| `{label}` | {_default(parameter.default, required)} | {_text(info.help)} |"
        rows.setdefault(getattr(info, "rich_help_panel", None), []).append(row)
        if isinstance(info, ArgumentInfo) or required:
            usage.append(label if required else f"[{label}]")
    usage.append("[OPTIONS]")
    help_text = _options_as_code(inspect.cleandoc(command.help or callback.__doc__ or ""))
    examples = "\n".join((command.epilog or "").split("\n\n")[1:])
    text = f"## `sparseopt {name}`\n\n{help_text}\n\n```text\n{' '.join(usage)}\n```\n\n```bash\n{examples}\n```\n"
    for panel, lines in rows.items():
        heading = f"\n**{panel}**\n" if panel else ""
        text += "\n".join((heading, "| argument or option | default | |", "|---|---|---|", *lines, ""))
    return text


def _parts(hint: Any) -> tuple[Any, OptionInfo | ArgumentInfo | None]:
    """The type of a parameter, and its typer declaration."""
    kind, *extras = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    info = next((extra for extra in extras if isinstance(extra, OptionInfo | ArgumentInfo)), None)
    return kind, info


def _label(name: str, kind: Any, info: OptionInfo | ArgumentInfo) -> str:
    plain = info.metavar or _kind_name(kind)
    if isinstance(info, ArgumentInfo):
        several = list in (typing.get_origin(part) for part in (kind, *typing.get_args(kind)))
        return info.metavar or name.upper() + ("..." if several else "")
    # Inside `Annotated` the first name given to `Option` is stored as its default.
    given = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    flag = next((text for text in given if text.startswith("--")), f"--{name.replace('_', '-')}")
    return flag if kind is bool else f"{flag} {plain}"


def _kind_name(kind: Any) -> str:
    """`TEXT`, `INTEGER`, ...; of `T | None` and `list[T]` that of T."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType, list):
        return _kind_name(next(inner for inner in typing.get_args(kind) if inner is not type(None)))
    return KINDS.get(getattr(kind, "__name__", ""), "VALUE")


def _default(value: Any, required: bool) -> str:
    if required:
        return "required"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, [], ()) else f"`{value}`"


def _text(text: str | None) -> str:
    return _options_as_code(" ".join((text or "").split()).replace("|", "\\|"))


def _options_as_code(text: str) -> str:
    """Names of options in backticks, unless they are; in plain text their two hyphens would become a dash."""
    return re.sub(r"`[^`]*`|(?<![\w-])--[a-z][a-z-]*", lambda m: m[0] if m[0].startswith("`") else f"`{m[0]}`", text)
