"""An audit of a model's stored weights: their zeros, and whether they have a pattern."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparseopt.layers.patterns import Pattern, check_pattern, count_groups, parse_pattern
from sparseopt.models import PrunableModel, open_any
from sparseopt.models.base.errors import named


@dataclass(frozen=True)
class LayerAudit:
    """Zeros of one linear layer as stored on disk."""

    layer: str
    shape: tuple[int, ...]
    zeros: int
    size: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size


def audit_sparsity(model: str | Path | PrunableModel, only: Collection[str] | None = None) -> list[LayerAudit]:
    """Count the exact zeros of every prunable layer in the stored tensors, read back one by one.

    `only`: the weights to count, by key.
    """
    return [
        LayerAudit(layer, weight.shape, int(weight.size - np.count_nonzero(weight)), weight.size)
        for layer, weight in _linears(model, only)
    ]


@dataclass(frozen=True)
class PatternAudit:
    """How the stored weights of one linear layer compare with a pattern.

    Attributes:
        layer: its name in the checkpoint, without `.weight`.
        shape: `(out, in)`.
        unit: what was counted, such as "weights in a row".
        groups: number of groups counted.
        allowed: non-zeros that the pattern keeps in each group.
        least: smallest number in a group.
        most: largest number in a group.
    """

    layer: str
    shape: tuple[int, ...]
    unit: str
    groups: int
    allowed: int
    least: int
    most: int

    @property
    def fits(self) -> bool:
        return self.most <= self.allowed

    @property
    def exact(self) -> bool:
        """Whether every group holds exactly what the pattern keeps; a kept weight that is itself zero reduces it."""
        return self.least == self.most == self.allowed


def audit_pattern(
    model: str | Path | PrunableModel,
    pattern: str,
    sparsity: float | None = None,
    only: Collection[str] | None = None,
) -> list[PatternAudit]:
    """Count the non-zeros of every prunable layer, group by group, in the stored tensors, read back one by one.

    The pattern and its sparsity are given as in `prune_layer`; `only`: the weights to count, by key.

    Raises:
        ValueError: if the pattern is unknown, or impossible in some layer, which is named.
    """
    check_pattern(pattern, sparsity)

    def audit(layer: str, weight: np.ndarray) -> PatternAudit:
        return _audit(layer, weight, named(layer, lambda: parse_pattern(pattern, sparsity, weight.shape)))

    return [audit(*linear) for linear in _linears(model, only)]


def audit_stored(model: str | Path | PrunableModel, patterns: Mapping[str, Pattern]) -> list[PatternAudit]:
    """Like `audit_pattern`, for layers that each have their own pattern, by the key of the weight."""
    return [_audit(layer, weight, patterns[f"{layer}.weight"]) for layer, weight in _linears(model, patterns)]


def _audit(layer: str, weight: np.ndarray, pattern: Pattern) -> PatternAudit:
    counts = count_groups(weight, pattern)
    least, most = int(counts.each.min()), int(counts.each.max())
    return PatternAudit(layer, weight.shape, counts.unit, counts.each.size, counts.allowed, least, most)


def stored_masks(model: str | Path | PrunableModel) -> Iterator[tuple[str, np.ndarray]]:
    """The key of every prunable layer's weight, and which of its entries are not zero, see `masks`."""
    opened = open_any(model)
    return ((key, opened.as_stored(key, opened.stored(key) != 0)) for key in opened.linear_keys())


def _linears(
    model: str | Path | PrunableModel, only: Collection[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The layers by name, `only` the ones with these keys, read one by one."""
    model = open_any(model)
    for key in model.linear_keys():
        if only is None or key in only:
            yield key.removesuffix(".weight"), model.stored(key)
