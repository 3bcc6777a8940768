"""Options that several commands share: the fields of a recipe, devices, processes that work together.

The fields of a recipe are read when a command is called: they need the extra `prune`, which `sparseopt --help` and the
other commands do not.
"""

import contextlib
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from sparseopt.pruning.recipe.options import Option

# The option that names a recipe file.
FILE = "recipe"
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
SOURCE_HELP = (
    "Model folder (safetensors), GGUF file, or name on the Hugging Face hub: OWNER/NAME or OWNER/NAME@REVISION."
)
TEXT_HELP = "Text, given as in `sparseopt prune --calibration`, which reads another part of it."
# How a text is read, for commands that evaluate.
READING = ("bos", "split", "column", "documents")

Source = Annotated[str, typer.Argument(help=SOURCE_HELP)]
FollowLinks = Annotated[
    bool,
    typer.Option("--follow-links", help="Read files of the model's folder that link elsewhere, if you trust it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")]
MACHINE = "Machine"


def machine_option(text: str, *names: str, **details: Any) -> Any:
    """An option of a command, shown under the heading "Machine"."""
    return typer.Option(*names, help=text, rich_help_panel=MACHINE, **details)


Memory = Annotated[
    str | None,
    machine_option(
        "Memory that the run may use, as in 8GiB; activations go to disk where needed. Default: what is available."
    ),
]
PassDevices = Annotated[
    str | None,
    machine_option("Devices to work on: a number, or all. Default: one; in several processes all."),
]
ManyDevices = Annotated[str | None, machine_option("Devices to work on: a number, or all. Default: one.")]
Distributed = Annotated[
    bool,
    machine_option(
        "Work together with other processes that were started with the same command, on all their devices. In a "
        "SLURM or MPI job, Kubernetes or a Cloud TPU they find each other; elsewhere give the three options below.",
        "--distributed",
    ),
]
Coordinator = Annotated[
    str | None, machine_option("HOST:PORT of process 0, for all of them; or JAX_COORDINATOR_ADDRESS.")
]
Processes = Annotated[
    int | None, machine_option("How many processes there are; or JAX_NUM_PROCESSES.", min=1, metavar="<int>")
]
ProcessId = Annotated[
    int | None, machine_option("The number of this one, from 0; or JAX_PROCESS_ID.", min=0, metavar="<int>")
]


class RecipeCommand(TyperCommand):
    """A command of a function that `takes_recipe` marked."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command with all its options.

        Raises:
            ValueError: for an option that has ended, with what to use in its place.
        """
        from sparseopt.pruning.recipe.options import ended

        for name, text in ended(arg.removeprefix("--").partition("=")[0].replace("-", "_") for arg in args).items():
            raise ValueError(f"--{name} {text}")
        whole = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        assert self.callback is not None
        callback = inspect.unwrap(self.callback)
        whole.command(self.name)(completed(callback))
        context = typer.main.get_command(whole).make_context(info_name, args, parent, **extra)
        if (file := context.params.get(FILE)) is not None:
            sources = {name: context.get_parameter_source(name) for name in context.params}
            typed = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
            found = callback.read(file)
            context.params |= {name: value for name, value in found.items() if name not in typed}
        return context


def prune_options() -> "dict[str, Option]":
    """The options of `Recipe`."""
    from sparseopt.pruning.recipe.prune_recipe import OPTIONS

    return OPTIONS


def shrink_options() -> "dict[str, Option]":
    """The options of `ShrinkRecipe`."""
    from sparseopt.pruning.recipe.shrink_recipe import SHRINK_OPTIONS

    return SHRINK_OPTIONS


# Imports a table of options, when it is called.
Table = Callable[[], "dict[str, Option]"]


def takes_recipe(
    table: Table = prune_options,
    *,
    only: Collection[str] = (),
    without: Collection[str] = (),
    lists: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Let a command take the options of a table, as they are typed, in place of its keywords `**`.

    Unless it takes `only` some, `--recipe` reads those that are not typed from a file, as plain values.
    `lists` has options that take several values with commas between, and what to add to their help.
    """

    def marked(function: Callable[..., None]) -> Callable[[], None]:
        def command() -> None: ...

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        several = lists or {}
        command.complete = lambda: _complete(function, table(), only, without, several)  # type: ignore[attr-defined]
        command.read = lambda file: _read_recipe(file, table(), without, several)  # type: ignore[attr-defined]
        return command

    return marked


def completed(command: Callable[..., None]) -> Callable[..., None]:
    """A command with all its options."""
    return command.complete() if hasattr(command, "complete") else command


def recipe_fields(options: Mapping[str, Any], table: Table = prune_options) -> dict[str, Any]:
    """Fields of a recipe from its options as they were typed."""
    known = table()
    readers = {name: known[name].read or (lambda given: given) for name in options}
    return {name: given if given is None else readers[name](given) for name, given in options.items()}


def numbers(text: str, option: str, *, repeat: bool = False) -> list[float]:
    """The numbers of an option that takes several with commas between.

    Raises:
        ValueError: for anything else, or a number that is named twice where none may `repeat`.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes numbers separated by commas, as in 0.5,0.7, given {text!r}") from None
    if not repeat and len(set(found)) < len(found):
        raise ValueError(f"{option} names a number twice: {text!r}")
    return found


def _complete(
    function: Callable[..., None],
    table: "dict[str, Option]",
    only: Collection[str],
    without: Collection[str],
    lists: Mapping[str, str],
) -> Callable[..., None]:
    """The function with these options in place of its `**`, all by keyword and sorted by panel."""
    from sparseopt.pruning.recipe.options import CALIBRATION, HOW, KEEP, OUTPUT, WHAT

    panels = [None, OUTPUT, WHAT, KEEP, HOW, CALIBRATION, "Evaluation", MACHINE]
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    made = [_parameter(table[n], lists.get(n), bool(only)) for n in only or table if n not in without]
    if not only:
        text = "YAML file with options of the recipe, as in `samples: 64`. What is typed here wins."
        info = typer.Option(help=text, rich_help_panel=WHAT)
        made.insert(0, inspect.Parameter(FILE, KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, info]))
    parameters = sorted(
        [*(parameter.replace(kind=KEYWORD_ONLY) for parameter in own), *made],
        key=lambda each: panels.index(getattr(each.annotation.__metadata__[0], "rich_help_panel", None)),
    )

    def command(**given: Any) -> None:
        given.pop(FILE, None)  # its options are among the others, see `RecipeCommand`
        function(**given)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _read_recipe(
    file: Path, table: "dict[str, Option]", without: Collection[str], lists: Mapping[str, str]
) -> dict[str, Any]:
    """The options in a recipe file; of `lists` as texts.

    Raises:
        ConfigError: listing all mistakes with their lines.
    """
    from sparseopt.experiments.config import load_settings
    from sparseopt.experiments.tasks.model import recipe_settings

    found = load_settings(file, recipe_settings("RecipeFile", table, without))
    return {name: str(value) if name in lists and value is not None else value for name, value in found.items()}


def _parameter(option: "Option", of_list: str | None, without_panel: bool) -> inspect.Parameter:
    """The option as typer takes it; the recipe checks words of a list, and names the nearest."""
    kind: Any = option.type
    if option.choices or option.read or of_list is not None:
        kind = str | None if option.allows_none else str
    given = (f"--{option.name.replace('_', '-')}",) if kind is bool else ()
    text = option.help if of_list is None else f"{option.help} {of_list}"
    default = option.default if of_list is None or option.default is None else str(option.default)
    info = typer.Option(*given, help=text, rich_help_panel=None if without_panel else option.panel)
    return inspect.Parameter(option.name, KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


@contextlib.contextmanager
def cooperating(
    distributed: bool, coordinator: str | None, processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Run a command together with other processes, or alone; only the first process prints.

    Raises:
        ValueError: for options that need `--distributed` without it.
    """
    if not distributed:
        if (coordinator, processes, process_id) != (None, None, None):
            raise ValueError("--coordinator, --processes and --process-id belong to --distributed: add it")
        yield
        return
    from sparseopt.system import processes as joined

    joined.join(coordinator, processes, process_id)
    with joined.together(), contextlib.ExitStack() as silent:
        if not joined.is_first():
            nowhere = silent.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silent.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def number_of_devices(text: str | None) -> int | Literal["all"] | None:
    """The value of `--devices`; None where it was left out.

    Raises:
        ValueError: for anything but a whole number from 1, or "all".
    """
    if text is None or text == "all":
        return cast(Literal["all"] | None, text)
    if not (text.isdecimal() and int(text) >= 1):
        raise ValueError(f"--devices must be a whole number from 1, or all, given {text!r}")
    return int(text)
