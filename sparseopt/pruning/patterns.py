"""Floor 6: which weights may survive, from a name to a pattern of the core, and counts that prove it.

A name speaks of a weight `[out, in]`; the pattern acts on the layer in solver layout `[in, out]`, where axis 0 runs
along the inputs of one output.
"""

import re
from typing import NamedTuple

import numpy as np

from sparseopt.core.patterns import NM, BlockTopK, Pattern, RowTopK, TopK

__all__ = [
    "Counts",
    "Pattern",
    "check_pattern",
    "count_groups",
    "implied_sparsity",
    "kept_count",
    "parse_pattern",
    "pattern_count",
    "share_unit",
]

KNOWN = "'unstructured', 'per-row', 'n:m' such as '2:4', and 'block:RxC' such as 'block:4x4'"


def kept_count(size: int, sparsity: float) -> int:
    """How many of `size` survive: `round((1 - sparsity) * size)`, exact to the weight."""
    return round((1 - sparsity) * size)


def implied_sparsity(text: str) -> float | None:
    """The share of zeros that an n:m pattern has by itself; None for the others, which need to be told."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    return 1 - int(match[1]) / int(match[2]) if match and int(match[2]) else None


def check_pattern(text: str, sparsity: float | None) -> None:
    """All that can be said of a pattern before a layer's shape is known.

    Raises:
        ValueError: naming what was given and what is possible.
    """
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), given {sparsity}; 0.5 keeps every second weight")
    match = re.fullmatch(r"(\d+):(\d+)|block:(\d+)x(\d+)|unstructured|per-row", text)
    if not match:
        raise ValueError(f"unknown pattern {text!r}; known are {KNOWN}")
    if match[1] is None:
        if sparsity is None:
            raise ValueError(f"pattern {text!r} needs a sparsity in [0, 1), given none")
        if match[3] is not None and not (int(match[3]) and int(match[4])):
            raise ValueError(f"pattern {text!r} must have blocks of at least 1 output x 1 input")
        return
    n, m = int(match[1]), int(match[2])
    if not 0 < n <= m:
        raise ValueError(f"pattern {text!r} must keep between 1 and {m} of every {m} weights")
    if sparsity is not None and abs(sparsity - (1 - n / m)) > 1e-9:
        raise ValueError(
            f"pattern {text!r} has sparsity {1 - n / m:g}, which contradicts the sparsity {sparsity} given; "
            f"give {1 - n / m:g}, or none"
        )


def parse_pattern(text: str, sparsity: float | None, shape: tuple[int, ...]) -> Pattern:
    """The pattern that `text` names, for a weight `[out, in]`.

    | text | what survives |
    |---|---|
    | unstructured | `round((1 - sparsity) * out * in)` weights anywhere in the layer |
    | per-row | `round((1 - sparsity) * in)` weights of every output row |
    | n:m | n of every m consecutive inputs of every output row |
    | block:RxC | `round((1 - sparsity) * blocks)` whole blocks of R outputs x C inputs |

    Args:
        text: one of the above.
        sparsity: share of zeros in [0, 1); with n:m it may be None and must otherwise be `1 - n/m`.
        shape: `(out, in)`.

    Raises:
        ValueError: naming what was given and what is possible; another pattern is never substituted.
    """
    check_pattern(text, sparsity)
    outputs, inputs = shape
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if sparsity is None or implied_sparsity(text) is not None:
        n, m = numbers
        if inputs % m:
            raise ValueError(
                f"pattern {text!r} needs a number of inputs divisible by {m}; a layer of shape "
                f"[out={outputs}, in={inputs}] leaves {inputs % m} over"
            )
        return NM(n, m, axis=0)
    if text == "unstructured":
        return TopK(kept_count(outputs * inputs, sparsity))
    if text == "per-row":
        return RowTopK(kept_count(inputs, sparsity), axis=0)
    high, wide = numbers
    if outputs % high or inputs % wide:
        raise ValueError(
            f"pattern {text!r} needs a number of outputs divisible by {high} and of inputs divisible by {wide}; a "
            f"layer of shape [out={outputs}, in={inputs}] leaves {outputs % high} outputs and {inputs % wide} inputs "
            "over"
        )
    return BlockTopK(kept_count((outputs // high) * (inputs // wide), sparsity), (wide, high))


def pattern_count(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """How many weights of a layer `(out, in)` survive in all."""
    outputs, inputs = shape
    match pattern:
        case TopK(k):
            return int(k)
        case RowTopK(k):
            return int(k) * outputs
        case NM(n, m):
            return inputs // m * n * outputs
        case BlockTopK(k, (wide, high)):
            return int(k) * wide * high


def share_unit(text: str, shape: tuple[int, ...]) -> int:
    """The zeros of a weight `(out, in)` come in multiples of this: one weight, one in every row, or a block.

    Not for n:m patterns, which have one share only.
    """
    match = re.fullmatch(r"block:(\d+)x(\d+)", text)
    if match:
        return int(match[1]) * int(match[2])
    return shape[0] if text == "per-row" else 1


class Counts(NamedTuple):
    """How a weight stands to its pattern: non-zero weights (or blocks) in every group that the pattern counts.

    Attributes:
        each: a count a group, flat.
        allowed: what the pattern keeps of each.
        unit: what is counted, for a message.
    """

    each: np.ndarray
    allowed: int
    unit: str


def count_groups(weight: np.ndarray, pattern: Pattern) -> Counts:
    """Count the non-zeros of a weight `[out, in]` group by group."""
    alive = np.asarray(weight) != 0
    outputs, inputs = alive.shape
    match pattern:
        case TopK(k):
            return Counts(np.array([np.count_nonzero(alive)]), int(k), "weights in the layer")
        case RowTopK(k):
            return Counts(np.count_nonzero(alive, axis=1), int(k), "weights in a row")
        case NM(n, m):
            groups = alive.reshape(outputs, inputs // m, m)
            return Counts(np.count_nonzero(groups, axis=2).ravel(), n, f"of {m} consecutive inputs")
        case BlockTopK(k, (wide, high)):
            tiles = alive.reshape(outputs // high, high, inputs // wide, wide)
            return Counts(np.array([np.count_nonzero(tiles.any(axis=(1, 3)))]), int(k), "blocks in the layer")
