"""The tasks of the benchmarks: `prune` and `shrink` with further scores of the same model.

A `title` may name what the sweep varies, as in `{method}`, and `{setting}`, the share of zeros or the pattern.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparseopt.experiments.task import Record, Strict
from sparseopt.experiments.tasks.prune import Prune
from sparseopt.experiments.tasks.shrink import Shrink
from sparseopt.models import PrunableModel, ShardedWriter, Source, unread
from sparseopt.pruning import PruneReport, perplexity
from sparseopt.pruning.text.windows import begin_windows, text_windows


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


def scores(task: Any, model: PrunableModel, report: PruneReport | None) -> Record:
    """The further scores of a model; the dense one has no report, and is written for transformers."""
    found: Record = {}
    texts = {"": task.evaluation} | ({"_elsewhere": task.elsewhere} if task.elsewhere else {})
    with written(model.source, report) if task.transformers else no_folder() as folder:
        for name, text in texts.items():
            windows, length = task.evaluation_windows, task.evaluation_seqlen
            ids, bos = text_windows(model.source, text, "evaluation", windows, length, bos=task.bos)
            if name:
                found[f"perplexity{name}"] = perplexity(model, ids, bos=bos)
            if folder is not None:
                found[f"transformers_perplexity{name}"] = transformers_perplexity(folder, ids, bos)
    return found


@contextmanager
def no_folder() -> Iterator[None]:
    """In place of `written`."""
    yield None


@contextmanager
def written(source: Source, report: PruneReport | None) -> Iterator[Path]:
    """The folder of a model."""
    if report is not None:
        yield report.output
        return
    with tempfile.TemporaryDirectory() as place:
        write_dense(source, Path(place) / "dense")
        yield Path(place) / "dense"


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

    def figures(self, model: PrunableModel, report: PruneReport | None) -> Record:
        return super().figures(model, report) | scores(self, model, report)
