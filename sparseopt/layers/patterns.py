"""Patterns of surviving weights by name, and the counts that prove them.

A name refers to a weight `[out, in]`; the pattern acts on the layer in solver layout `[in, out]`, where axis 0 runs
along the inputs of one output.
"""

import math
import re
from types import UnionType
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from sparseopt.core.penalties.patterns import NM, BlockTopK, GroupTopK, Pattern, RowTopK, TopK, Within

KNOWN = (
    "'unstructured', 'per-row', 'n:m' such as '2:4', 'block:RxC' such as 'block:4x4', and 'group:C' such as 'group:1', "
    "whole inputs"
)
# The forms of names; their numbers are sizes.
_FORMS = {"unstructured": "unstructured", "per-row": "per-row", "n:m": r"(\d+):(\d+)"}
_FORMS |= {"block": r"block:(\d+)x(\d+)", "group": r"group:(\d+)"}
_LEAST = {"block": "blocks of at least 1 output × 1 input", "group": "groups of at least 1 input"}


def _parts(text: str) -> tuple[str | None, tuple[int, ...]]:
    """The form of a name and its sizes; no form for an unknown one."""
    for form, expression in _FORMS.items():
        if match := re.fullmatch(expression, text):
            return form, tuple(map(int, match.groups()))
    return None, ()


def is_group_pattern(text: str) -> bool:
    """Whether the pattern is group:C."""
    return _parts(text)[0] == "group"


def implied_sparsity(text: str) -> float | None:
    """The fraction of zeros of a possible n:m pattern; None for other patterns, which need a sparsity."""
    form, sizes = _parts(text)
    return 1 - sizes[0] / sizes[1] if form == "n:m" and 0 < sizes[0] <= sizes[1] else None


def check_pattern(text: str, sparsity: float | None) -> None:
    """Check a pattern as far as possible without a layer's shape.

    Raises:
        ValueError: naming what was given and what is possible.
    """
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), given {sparsity}; 0.5 keeps every second weight")
    form, sizes = _parts(text)
    if form is None:
        raise ValueError(f"unknown pattern {text!r}; known are {KNOWN}")
    if form == "n:m":
        n, m = sizes
        if not 0 < n <= m:
            raise ValueError(f"pattern {text!r} must keep between 1 and {m} of every {m} weights")
        if sparsity is not None and abs(sparsity - (1 - n / m)) > 1e-9:
            raise ValueError(
                f"pattern {text!r} has sparsity {1 - n / m:g}, which contradicts the sparsity {sparsity} given; "
                f"give {1 - n / m:g}, or no sparsity"
            )
    elif sparsity is None:
        raise ValueError(f"pattern {text!r} needs a sparsity in [0, 1), given none")
    elif 0 in sizes:
        raise ValueError(f"pattern {text!r} must have {_LEAST[form]}")


def parse_pattern(text: str, sparsity: float | None, shape: tuple[int, ...]) -> Pattern:
    """The pattern that `text` names, for a weight `[out, in]`.

    | text | what survives |
    |---|---|
    | unstructured | `round((1 - sparsity) * out * in)` weights anywhere in the layer |
    | per-row | `round((1 - sparsity) * in)` weights of every output row |
    | n:m | n of every m consecutive inputs of every output row |
    | block:RxC | `round((1 - sparsity) * blocks)` whole blocks of R outputs × C inputs |
    | group:C | `round((1 - sparsity) * in / C)` whole groups of C consecutive inputs, for all outputs |

    Args:
        text: one of the above.
        sparsity: fraction of zeros in [0, 1); with n:m it is None or `1 - n/m`.
        shape: `(out, in)`.

    Raises:
        ValueError: naming what was given and what is possible.
    """
    check_pattern(text, sparsity)
    outputs, inputs = shape
    layer = f"a layer of shape [out={outputs}, in={inputs}] leaves"
    form, sizes = _parts(text)
    *_, unit = sizes or (1,)
    left = inputs % unit
    if left and form != "block":
        raise ValueError(f"pattern {text!r} needs a number of inputs divisible by {unit}; {layer} {left} over")
    if form == "n:m":
        return NM(sizes[0], unit, axis=0)
    assert sparsity is not None
    if form == "unstructured":
        return TopK(round((1 - sparsity) * (outputs * inputs)))
    if form == "per-row":
        return RowTopK(round((1 - sparsity) * inputs), axis=0)
    if form == "group":
        return GroupTopK(round((1 - sparsity) * (inputs // unit)), unit)
    high, wide = sizes
    if outputs % high or left:
        raise ValueError(
            f"pattern {text!r} needs a number of outputs divisible by {high} and of inputs divisible by {wide}; "
            f"{layer} {outputs % high} outputs and {left} inputs over"
        )
    return BlockTopK(round((1 - sparsity) * ((outputs // high) * (inputs // wide))), (wide, high))


def pattern_count(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """The number of surviving weights of a layer `(out, in)`; within a support, at most this many.

    Raises:
        ValueError: for groups given by labels, see `group_size`.
    """
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
        case GroupTopK(k):
            return int(k) * group_size(pattern) * outputs
        case Within(inner):
            return pattern_count(inner, shape)


def taken(pattern: Pattern, classes: type | UnionType, what: str, advice: str) -> Any:
    """The pattern, if its class is one that a method accepts; else a `ValueError`."""
    if not isinstance(pattern, classes):
        raise ValueError(f"{what}, not {type(pattern).__name__}; {advice}")
    return pattern


def outputs_together(pattern: Pattern) -> int:
    """The number of consecutive outputs that are kept or pruned together: those of a block, otherwise 1."""
    return pattern.shape[1] if isinstance(pattern, BlockTopK) else 1


def group_size(pattern: GroupTopK) -> int:
    """The number of inputs in each group.

    Raises:
        ValueError: for groups given by labels, which need not be consecutive or equal in size.
    """
    if not isinstance(pattern.groups, int):
        raise ValueError(
            f"layers are pruned in groups of consecutive inputs, as many in each, given {len(pattern.groups)} labels; "
            "give GroupTopK the number of inputs in a group, and order the inputs by group"
        )
    return pattern.groups


def share_unit(text: str, shape: tuple[int, ...]) -> int:
    """The zeros of a weight `(out, in)` come in multiples of this. Not for n:m patterns, whose fraction is fixed."""
    form, sizes = _parts(text)
    if form == "block":
        return math.prod(sizes)
    return {"group": shape[0] * math.prod(sizes), "per-row": shape[0]}.get(form or "", 1)


class Counts(NamedTuple):
    """The non-zero weights (or blocks) in each group that a pattern counts, flat, and what it keeps of each."""

    each: np.ndarray
    allowed: int
    unit: str  # what is counted, for messages


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
        case GroupTopK(k):
            groups = alive.any(axis=0).reshape(-1, group_size(pattern)).any(axis=1)
            return Counts(np.array([np.count_nonzero(groups)]), int(k), "groups of inputs in the layer")
        case Within(inner):
            return count_groups(weight, inner)


def check_cut(pattern: Pattern, shape: tuple[int, int], mesh: Mesh | None) -> None:
    """Raise a ValueError if the mesh would cut a weight `(out, in)` inside the blocks of its pattern."""
    if mesh is None:
        return
    outputs, high = shape[0], outputs_together(pattern)
    each = -(-outputs // mesh.size)
    if each % high:
        fitting = [d for d in range(1, mesh.size) if -(-outputs // d) % high == 0]
        raise ValueError(
            f"{mesh.size} devices hold {each} outputs each of the layer [out={outputs}, in={shape[1]}], which splits "
            f"the pattern's blocks of {high} outputs; {', '.join(map(str, fitting))} devices do not"
        )
