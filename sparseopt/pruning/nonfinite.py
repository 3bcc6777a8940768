"""Floor 6: where activations went wrong: the windows of tokens that made a Gram non-finite. Asked only once one is."""

from typing import Any

import numpy as np

from sparseopt.models import Routed
from sparseopt.pruning.activations import Batches
from sparseopt.pruning.calibration import tapped


def nonfinite_windows(block: Any, batches: Batches, name: str) -> list[int]:
    """Numbers of the windows whose activations at a tap, squared as a Gram has them, are not finite.

    Args:
        block: a Flax block.
        batches: the stream in front of it.
        name: of the tap, as in `Block.linears`; experts by their stacked name.
    """
    found: list[int] = []
    first = 0
    for x in batches:
        value = tapped(block, x)[0][name]
        rows = np.asarray(value.rows if isinstance(value, Routed) else value, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            # One token with another: a product of two of its entries is at most the sum of their squares.
            bad = ~np.isfinite(np.sum(rows.astype(np.float32) ** 2, axis=-1))
        if isinstance(value, Routed):
            tokens = np.asarray(value.token)[bad]
            windows = np.unique(tokens[tokens < x.shape[0] * x.shape[1]] // x.shape[1])
        else:
            windows = np.flatnonzero(bad.any(axis=1))
        found += [first + int(window) for window in windows]
        first += len(x)
    return found
