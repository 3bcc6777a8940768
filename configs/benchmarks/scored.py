"""The tasks of the benchmarks: `prune` and `shrink` with further scores of the same model.

A `title` may name what the sweep varies, as in `{method}`, and `{setting}`, the share of zeros or the pattern.
"""

import math
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from pydantic import Field

from sparseopt.core.base.dense import HIGHEST
from sparseopt.core.base.types import Observer
from sparseopt.experiments.task import Record, Strict
from sparseopt.experiments.tasks.model import MODEL, model_path
from sparseopt.experiments.tasks.prune import Prune
from sparseopt.experiments.tasks.shrink import Shrink
from sparseopt.models import PrunableModel, ShardedWriter, Source, StreamedModel, open_source, unread
from sparseopt.pruning import PruneReport, Recipe, masks, perplexity, prune_model
from sparseopt.pruning.text.windows import begin_windows, text_windows

# The bits of a significand without its first, which is always 1; 0 where nothing is rounded.
ROUNDINGS = {"float32": 0, "3xbf16": 15, "tf32": 10, "bf16": 7}


class Scores(Strict):
    """Further scores.

    Attributes:
        elsewhere: a text that is scored too, as `perplexity_elsewhere`.
        transformers: score also by transformers and torch, which read the folder by themselves.
        goal: the perplexity to reach at most.
    """

    elsewhere: str | None = None
    transformers: bool = False
    goal: float | None = None

    def line(self) -> Record:
        """The settings that tell the lines of one title apart."""
        return {}


def scores(task: Any, model: PrunableModel, report: PruneReport | None) -> Record:
    """The further scores of a model; the dense one has no report, and is written for transformers."""
    found: Record = {}
    texts = {"": task.evaluation} | ({"_elsewhere": task.elsewhere} if task.elsewhere else {})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "dense" if report is None else report.output
        if task.transformers and report is None:
            write_dense(model.source, folder)
        for name, text in texts.items():
            windows, length = task.evaluation_windows, task.evaluation_seqlen
            ids, bos = text_windows(model.source, text, "evaluation", windows, length, bos=task.bos)
            if name:
                found[f"perplexity{name}"] = perplexity(model, ids, bos=bos)
            if task.transformers:
                found[f"transformers_perplexity{name}"] = transformers_perplexity(folder, ids, bos)
    return found


def write_dense(source: Source, folder: Path) -> None:
    """A model as a folder."""
    writer = ShardedWriter(folder, source)
    writer.write("outer", unread(source, source.tensors))
    writer.finish()


def transformers_perplexity(folder: Path, ids: np.ndarray, bos: int | None) -> float | None:
    """The perplexity by transformers; None without torch."""
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


class ScoredPrune(Scores, Prune):
    """Prune a model, with further scores."""

    task: Literal["scored.ScoredPrune"]  # type: ignore[assignment]

    def figures(self, model: PrunableModel, report: PruneReport | None) -> Record:
        return super().figures(model, report) | scores(self, model, report)


class ScoredShrink(Scores, Shrink):
    """Make a smaller model, with further scores."""

    task: Literal["scored.ScoredShrink"]  # type: ignore[assignment]

    def figures(self, model: StreamedModel, report: PruneReport | None) -> Record:
        return super().figures(model, report) | scores(self, model, report)


class NestedPrune(ScoredPrune):
    """Prune by the first of random windows that runs share: the held-out ones, then all that any of them sees.

    Attributes:
        drawn: how many, besides those held out.
    """

    task: Literal["scored.NestedPrune"]  # type: ignore[assignment]
    drawn: int = Field(ge=1)

    def line(self) -> Record:
        return {"calibration_tokens": (self.windows or 0) * self.seqlen}

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        source, held = model_path(self.source), self.heldout_windows
        drawn = text_windows(
            open_source(source), self.calibration, "calibration", held + self.drawn, self.seqlen, choice="random"
        )
        heldout, others = np.split(begin_windows(*drawn), [held])
        ids = np.concatenate([others[: self.windows], heldout])
        recipe = Recipe(**self.recipe_values() | {"calibration": ids})
        report = prune_model(source, folder / MODEL, recipe)
        return self._score(report, key, folder, observer)


class RoundedPrune(ScoredPrune):
    """Prune with products of fewer bits, which a CPU emulates in a process of its own, and score in float32.

    Both operands of a product are rounded, and it is added up in float32: 3xbf16 is precision high on a TPU, tf32
    default on an NVIDIA GPU, bf16 default on a TPU. An accelerator differs in the order of the sum alone.

    Attributes:
        rounding: of operands.
        products: those of "activations", which are not in the highest precision, or all.
    """

    task: Literal["scored.RoundedPrune"]  # type: ignore[assignment]
    rounding: Literal["float32", "3xbf16", "tf32", "bf16"]
    products: Literal["none", "activations", "all products"]

    def line(self) -> Record:
        return {"rounding": self.rounding, "products": self.products}

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            given = model_path(self.source), self.recipe(), folder / MODEL, self.rounding, self.products
            report = pool.submit(made_rounded, *given).result()
        (reference,) = folder.parent.glob("*float32*")
        lost = lost_share(reference / MODEL, folder / MODEL)
        return self._score(report, key, folder, observer) | {"lost_share": lost}


def made_rounded(source: Path, recipe: Recipe, output: Path, rounding: str, products: str) -> PruneReport:
    """Prune, for a process of its own: its programs stay rounded."""
    bits, everywhere = ROUNDINGS[rounding], products == "all products"
    half = mlir.lower_fun(lambda x: jax.lax.reduce_precision(x, 8, bits), multiple_results=False)
    kinds = "lhs_batching", "rhs_batching", "lhs_contracting", "rhs_contracting"

    def lower(context: mlir.LoweringRuleContext, left: Any, right: Any, **params: Any) -> Any:
        if bits and (everywhere or params["precision"] != (HIGHEST, HIGHEST)):
            left, right = (
                half(context.replace(avals_in=[aval], avals_out=[aval]), value)[0]
                for value, aval in zip((left, right), context.avals_in, strict=True)
            )
        (over_left, over_right), (of_left, of_right) = params["dimension_numbers"]
        axes = zip(kinds, (of_left, of_right, over_left, over_right), strict=True)
        given: dict[str, Any] = {f"{kind}_dimensions": list(where) for kind, where in axes}
        numbers = stablehlo.DotDimensionNumbers.get(**given)
        made = mlir.aval_to_ir_type(context.module_context, context.avals_out[0])
        return stablehlo.dot_general(made, left, right, numbers).owner.results

    mlir.register_lowering(jax.lax.dot_general_p, lower, platform="cpu")
    return prune_model(source, output, recipe)


def lost_share(kept: Path, other: Path) -> float:
    """The share of the weights that one pruned model keeps and another does not."""
    pairs = zip(masks(kept), masks(other), strict=True)
    counts = [(np.sum(mine & ~theirs), np.sum(mine)) for (_, mine), (_, theirs) in pairs]
    lost, total = np.sum(counts, axis=0)
    return float(lost / total)
