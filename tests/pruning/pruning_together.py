"""Prunes a model in one of several joined processes (`processes.join`), for the tests of such runs."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparseopt.pruning import PruneReport, Recipe, Stopped, prune_model
from sparseopt.system import processes
from tests.models.tiny import VOCAB

# What a run may do: iterate, train blocks by their gradients, measure the dense model first.
RECIPES: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda"},
    "paper": {"preset": "paper"},
    "best": {"method": "best"},
    "curves": {"method": "admm", "allocation": "curves", "output_weights": "gradient"},
}


def prune_together(
    source: Path | str, output: Path | str, name: str, *, stop_behind: int | None = None, stopper: int = 1
) -> PruneReport | None:
    """Prune by one of `RECIPES` on all devices of all processes; alone, on one device.

    `stop_behind` has the process number `stopper` alone ask for an end behind so many blocks; None is then returned.
    """
    tokens = np.random.default_rng(8).integers(0, len(VOCAB), (13, 24)).astype(np.int32)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        own = processes.count() == 1 or jax.process_index() == stopper
        return own and asked == stop_behind

    recipe = Recipe(calibration=tokens, heldout_windows=2, **RECIPES[name])
    try:
        return prune_model(source, output, recipe, stop=stop)
    except Stopped:
        return None
