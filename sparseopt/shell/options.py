"""Options that several commands share: the fields of a recipe, devices, processes that work together.

The fields of a recipe are read when a command is called: they need the extra `prune`, which `sparseopt --help` and the
other commands do not.
"""

import contextlib
import functools
import inspect
import itertools
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import typer
from typer.core import TyperCommand

from sparseopt.shell import console

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from sparseopt.models import Source as ModelSource
    from sparseopt.pruning.recipe.pass_recipe import PassRecipe

    P = TypeVar("P", bound=PassRecipe)

# The option that names a recipe file.
FILE = "recipe"
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
SOURCE_HELP = (
    "Model folder (safetensors), GGUF file, or name on the Hugging Face hub: OWNER/NAME or OWNER/NAME@REVISION."
)
TEXT_HELP = "Text, given as for `sparseopt prune --calibration`, which reads another part of it."
# How a text is read, for commands that evaluate.
READING = ("bos", "split", "column", "documents")

Source = Annotated[str, typer.Argument(help=SOURCE_HELP)]
FollowLinks = Annotated[
    bool,
    typer.Option("--follow-links", help="Follow links that lead out of the model's folder, if you trust it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")]
MACHINE = "Machine"


def machine_option(text: str, *names: str, **details: Any) -> Any:
    """An option of a command, shown under the heading "Machine"."""
    return typer.Option(*names, help=text, rich_help_panel=MACHINE, **details)


Memory = Annotated[
    str | None,
    machine_option(
        "Memory that the run may use, as in 8GiB; activations go to disk if needed. Default: what is available."
    ),
]
PassDevices = Annotated[
    str | None,
    machine_option("Number of devices to use, or all. Default: one; with several processes all."),
]
ManyDevices = Annotated[str | None, machine_option("Number of devices to use, or all. Default: one.")]
Log = Annotated[str | None, machine_option("Log the run in a tracker too: mlflow or wandb, which must be installed.")]
Distributed = Annotated[
    bool,
    machine_option(
        "Work together with other processes started with the same command, on all their devices. In a SLURM or MPI "
        "job, Kubernetes or a Cloud TPU they find each other; elsewhere give the three options below.",
        "--distributed",
    ),
]
Coordinator = Annotated[
    str | None, machine_option("HOST:PORT of process 0, the same for all. Default: JAX_COORDINATOR_ADDRESS.")
]
Processes = Annotated[
    int | None, machine_option("Number of processes. Default: JAX_NUM_PROCESSES.", min=1, metavar="<int>")
]
ProcessId = Annotated[
    int | None, machine_option("Number of this process, from 0. Default: JAX_PROCESS_ID.", min=0, metavar="<int>")
]


class Command(TyperCommand):
    """A command that Ctrl-C stops with words on what it has written."""

    def invoke(self, context: Any) -> Any:
        output = context.params.get("output")
        place = None if output is None else Path(os.path.expanduser(output))
        console.stop.begin(functools.partial(console.left_in, place, time.time()))
        return super().invoke(context)


class RecipeCommand(TyperCommand):
    """A command of a function that `takes_recipe` marked, with all its options where it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the whole command.

        Raises:
            ValueError: for an option that has ended, with what to use in its place.
        """
        from sparseopt.pruning.recipe.options import ended

        for word, after in itertools.pairwise([*args, ""]):
            option, _, value = word.partition("=")
            name = option.removeprefix("--").replace("-", "_")
            if word.startswith("--") and (said := ended(name, value or after)):
                raise ValueError(f"--{said[0].replace('_', '-')} {said[1]}")
        assert self.callback is not None
        info = typer.models.CommandInfo(
            self.name, cls=Command, callback=completed(inspect.unwrap(self.callback)), epilog=self.epilog
        )
        whole = typer.main.get_command_from_info(
            info, pretty_exceptions_short=False, rich_markup_mode=self.rich_markup_mode
        )
        return whole.make_context(info_name, args, parent, **extra)


def takes_recipe(
    model: str = "Recipe",
    *,
    only: Collection[str] = (),
    without: Collection[str] = (),
    lists: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Any]:
    """Give a command the fields of a recipe as options, and in place of its keywords `**` those that are given.

    Unless it takes `only` some, `--recipe` reads from a file those that are not typed.
    `lists` has options that take several values with commas between, and what to add to their help.
    """

    def marked(function: Callable[..., None]) -> Any:
        command: Any = _named(function, lambda: None)
        command.complete = functools.partial(_complete, function, model, only, without, lists or {})
        return command

    return marked


def opened(source: str, follow_links: bool) -> "ModelSource":
    """The model of a command's argument; one on the hub is fetched, with a bar of its own."""
    from sparseopt.models import open_source

    words = console.stop.words
    if not os.path.exists(os.path.expanduser(source)):
        console.stop.words = lambda: "stopped; files that were fetched stay in the cache of the hub"
    found = open_source(source, follow_links=follow_links)
    console.stop.words = words
    return found


def completed(command: Callable[..., None]) -> Callable[..., None]:
    """A command with all its options."""
    return command.complete() if hasattr(command, "complete") else command


def recipes(model: "type[P]", given: Mapping[str, Any], several: Collection[str] = ()) -> "list[P]":
    """The recipes of the fields that were given: one for every combination of numbers in `several`."""
    lists = {name: numbers(str(given[name]), f"--{name}") for name in several if given.get(name) is not None}
    others = {name: value for name, value in given.items() if name not in lists}
    points = itertools.product(*lists.values())
    return [model(**others, **dict(zip(lists, point, strict=True))) for point in points]


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
    function: Callable[..., None], kind: str, only: Collection[str], without: Collection[str], lists: Mapping[str, str]
) -> Any:
    """The function with these fields of a kind of recipe in place of its `**`, all by keyword and sorted by panel."""
    from sparseopt import pruning
    from sparseopt.pruning.recipe.options import CALIBRATION, HOW, KEEP, OUTPUT, WHAT

    model: type[PassRecipe] = getattr(pruning, kind)
    panels = [None, OUTPUT, WHAT, KEEP, HOW, CALIBRATION, "Evaluation", MACHINE]
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [name for name in only or model.model_fields if name not in without]
    made = [_parameter(name, model.model_fields[name], lists.get(name), bool(only)) for name in names]
    if not only:
        text = "YAML file with options of the recipe, as in `windows: 64`. Typed options take precedence."
        info = typer.Option(help=text, rich_help_panel=WHAT)
        made.insert(0, inspect.Parameter(FILE, KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, info]))
    parameters = sorted(
        [*(parameter.replace(kind=KEYWORD_ONLY) for parameter in own), *made],
        key=lambda each: panels.index(getattr(each.annotation.__metadata__[0], "rich_help_panel", None)),
    )
    parameters.append(inspect.Parameter("context", KEYWORD_ONLY, annotation=typer.Context))

    def command(context: typer.Context, **given: Any) -> None:
        file = given.pop(FILE, None)
        left = {name for name in names if getattr(context.get_parameter_source(name), "name", "") in ("", "DEFAULT")}
        typed = {name: value for name, value in given.items() if name not in left}
        function(**(model.fields_in(file, without) if file else {}) | typed)

    completed = _named(function, command)
    completed.__signature__ = inspect.Signature(parameters)
    completed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return completed


def _named(function: Callable[..., None], command: Any) -> Any:
    """A command with the name and the text of a function."""
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    return command


def _parameter(name: str, field: "FieldInfo", of_list: str | None, without_panel: bool) -> inspect.Parameter:
    """The field as typer takes it; the recipe checks words, and names the nearest."""
    from sparseopt.pruning.recipe.options import shell_type

    kind = str if of_list is not None else shell_type(field)
    given = (f"--{name.replace('_', '-')}",) if kind is bool and field.default is False else ()
    text = field.description if of_list is None else f"{field.description} {of_list}"
    default = field.default if of_list is None or field.default is None else str(field.default)
    extra = cast(dict[str, Any], field.json_schema_extra)
    info = typer.Option(*given, help=text, rich_help_panel=None if without_panel else extra["panel"])
    annotation: Any = kind if default is not None else kind | None
    return inspect.Parameter(name, KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info])


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
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(console.stop.words()) from None


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word for word in map(str.strip, text.split(",")) if word]


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
