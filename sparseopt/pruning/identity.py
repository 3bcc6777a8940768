"""Floor 6: the fingerprint of a pruning run: all that decides its result, by which a run is known again."""

import json
import platform
from functools import cached_property
from typing import Any

import jax
import numpy as np

from sparseopt.machine import versions
from sparseopt.models import PrunableModel
from sparseopt.models.digest import Digest
from sparseopt.pruning.recipe import Recipe

# Other versions may round otherwise, and the result of an interrupted run is that of an uninterrupted one to the bit.
DECISIVE = ("sparseopt", "jax", "jaxlib", "numpy")

Fingerprint = dict[str, Any]


class Identity:
    """Makes the fingerprints of the runs that share one pass over a model.

    Attributes:
        linears: the names of the linears of every block, as records have them.
    """

    def __init__(self, model: PrunableModel, calibration: np.ndarray, heldout: np.ndarray) -> None:
        self._model = model
        self.linears = [
            [model.weight_key(index, name).removesuffix(".weight") for name in model.block_linears(index)]
            for index in range(model.num_blocks)
        ]
        tokens = Digest()
        tokens.add("calibration", calibration)
        tokens.add("held-out", heldout)
        self._tokens = tokens.text

    @cached_property
    def _weights(self) -> str:
        """The source is read through for it, once."""
        return self._model.check_finite()

    def of(self, recipe: Recipe) -> Fingerprint:
        """What decides every bit of the result of a recipe's run, as plain values."""
        found = versions()
        return json.loads(
            json.dumps(
                {
                    "weights": self._weights,
                    "tokens": self._tokens,
                    "recipe": recipe.as_dict(),
                    "versions": {name: found[name] for name in DECISIVE if name in found},
                    "device": f"{jax.devices()[0].platform} {platform.machine()}",
                }
            )
        )
