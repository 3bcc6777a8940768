"""What a run did to the model: its perplexity before and after, on text that it was not made on."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparseopt.core.base.types import Observer
from sparseopt.models import PrunableModel
from sparseopt.pruning.base.records import Score
from sparseopt.pruning.evaluate.perplexity import window_losses
from sparseopt.pruning.recipe.pass_recipe import PassRecipe, scored_windows
from sparseopt.pruning.run.calibration import CalibrationWindows
from sparseopt.pruning.text.documents import TextError, part_of_text
from sparseopt.pruning.text.windows import text_windows
from sparseopt.system import processes

OWN = "text of its own"


class Sample(NamedTuple):
    """Windows to score, without BOS, and the BOS that each should begin with; None for none."""

    text: str
    ids: np.ndarray
    bos: int | None


def samples_to_score(model: PrunableModel, recipe: PassRecipe, windows: CalibrationWindows) -> list[Sample]:
    """What the perplexity before and after is measured on: the recipe's `score`, or its default.

    Of a default text that is too short there is none, and token ids leave no text.

    Raises:
        TextError: for a `score` that cannot be read or is too short for a window.
    """
    count, length = scored_windows(recipe), windows.calibration.shape[1]

    def read(text: str, **reading: str | None) -> Sample:
        found = text_windows(
            model.source, text, "evaluation", count, length,
            bos=recipe.bos, documents=recipe.documents, least=1, **reading,  # type: ignore[arg-type]
        )  # fmt: skip
        return Sample(part_of_text(text, "evaluation", reading.get("split")), *found)

    if recipe.score is not None:
        return [] if recipe.score == "none" else [read(recipe.score)]
    if recipe.draws:
        # They begin with BOS, and `perplexity` puts it there.
        ids = windows.scored if windows.bos is None else np.roll(windows.scored, -1, axis=1)
        return [Sample(OWN, ids, windows.bos), read("pydoc")]
    try:
        own = isinstance(recipe.calibration, str)
        return [read(recipe.calibration, split=recipe.split, column=recipe.column)] if own else []
    except TextError:
        return []


class Scoring:
    """Scores for the models of one pass; the dense one is scored once for all."""

    def __init__(self, dense: PrunableModel, samples: Sequence[Sample], observer: Observer) -> None:
        self._dense, self._samples, self._observer = dense, samples, observer
        self._before: list[float] | None = None

    def __call__(self, folder: Path) -> tuple[Score, ...]:
        """The scores of the model in a folder; one process measures them for all."""
        if self._before is None:
            self._before = self._perplexities(self._dense, "before")
        after = self._perplexities(folder, "after")
        pairs = zip(self._samples, self._before, after, strict=True)
        return tuple(Score(each.text, len(each.ids), each.ids.shape[1], old, new) for each, old, new in pairs)

    def _perplexities(self, model: PrunableModel | Path, when: str) -> list[float]:
        """Of windows of one length, and of one BOS, together: the model is read once."""

        def told(_: str, done: int, total: int) -> None:
            self._observer(f"perplexity {when}, block", done, total)

        losses = list[float]()
        if processes.is_first():
            for bos, group in itertools.groupby(self._samples, lambda sample: sample.bos):
                parts = [sample.ids for sample in group]
                found = window_losses(model, np.concatenate(parts), bos=bos, observer=told)
                cuts = np.cumsum([len(ids) for ids in parts])[:-1]
                losses += [float(part.mean()) for part in np.split(found, cuts)]
        return processes.told([math.exp(loss) for loss in losses])
