"""Pieces that are constants or lines, some of which meet: the least squares fit of given places."""

import numpy as np

from sparseopt.trend.segments.segmentation import Sums


def fit_pieces(sums: Sums, places: np.ndarray, joined: np.ndarray, line: bool) -> tuple[float, np.ndarray]:
    """The cost of the best fit with pieces between `places`, and the values `[pieces, 2, d]` at the ends of each.

    A line begins at its first node and ends at the first node of the next piece, where it meets the next line if
    `joined` says so for that place. The unknowns are these values; the normal equations come from prefix sums.
    """
    i, j = np.append(0, places), np.append(places, len(sums.mass) - 1)
    if not line:
        level = (sums.value[j] - sums.value[i]) / (sums.mass[j] - sums.mass[i])[:, None]
        return float(sums.cost(i, j, False).sum()), np.stack([level, level], axis=1)
    start, length = sums.times[i], sums.times[j] - sums.times[i]
    mass, time, square, value, cross = (
        part[j] - part[i] for part in (sums.mass, sums.time, sums.square, sums.value, sums.cross)
    )
    # Sums of w s, w s² and w s y, with s from 0 to 1 along the piece.
    once = (time - start * mass) / length
    twice = (square - 2 * start * time + start**2 * mass) / length**2
    later = (cross - start[:, None] * value) / length[:, None]
    # The unknown of each end; a joined line begins where the one before it ends.
    first = 2 * np.arange(len(i)) - np.append(0, np.cumsum(joined))
    ends, size = np.stack([first, first + 1], axis=1), first[-1] + 2
    gram, right = np.zeros((size, size)), np.zeros((size, value.shape[1]))
    blocks = np.stack([mass - 2 * once + twice, once - twice, once - twice, twice], axis=1).reshape(-1, 2, 2)
    np.add.at(gram, (ends[:, :, None], ends[:, None, :]), blocks)
    np.add.at(right, ends, np.stack([value - later, later], axis=1))
    solution = np.linalg.lstsq(gram, right, rcond=None)[0]
    return max(float(sums.energy[-1] - np.sum(right * solution)), 0.0), solution[ends]


def values_of(sums: Sums, places: np.ndarray, ends: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The fit `[len(times), d]` of `fit_pieces` at times."""
    starts = sums.times[np.append(0, places)]
    piece = np.maximum(np.searchsorted(starts, times, side="right") - 1, 0)
    along = (times - starts[piece]) / np.diff(np.append(starts, sums.times[-1]))[piece]
    return ends[piece, 0] + along[:, None] * (ends[piece, 1] - ends[piece, 0])
