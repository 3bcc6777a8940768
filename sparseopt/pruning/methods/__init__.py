"""Floor 6: the pruning methods by name. A method is called with a layer and a pattern: `method(layer, pattern)`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparseopt.core.penalties import Penalty
from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.methods.admm import AdmmPruning
from sparseopt.pruning.methods.maiht import MaihtPruning
from sparseopt.pruning.methods.scores import Magnitude, Wanda
from sparseopt.pruning.methods.sparsegpt import SparseGpt
from sparseopt.pruning.methods.splice import SplicePruning

__all__ = [
    "METHODS",
    "AdmmPruning",
    "Magnitude",
    "MaihtPruning",
    "NamedMethod",
    "SparseGpt",
    "SplicePruning",
    "Wanda",
    "find_method",
]


class NamedMethod(NamedTuple):
    """An entry of `METHODS`.

    Attributes:
        summary: what the method does, for help texts.
        method: with its own settings.
        presets: other settings by name; empty for most methods.
    """

    summary: str
    method: LayerMethod
    presets: Mapping[str, LayerMethod] = {}


_MAIHT = {
    "paper": MaihtPruning(),
    "best": MaihtPruning(
        ridge=0.03,
        undershoot=(0.02, 0.015),
        monitor="on_increase",
        max_steps=80,
        rest=5e-4,
        refit="cg",
        refit_steps=15,
    ),
}

METHODS: dict[str, NamedMethod] = {
    # For the few tokens of a calibration a ridge of 0.1 was best by held-out error and by perplexity. With it a slowly
    # rising rho finds the supports that splicing would.
    "best": NamedMethod(
        "ADMM whose rho rises slowly, with a large ridge; on models also output weights, propagation and training",
        AdmmPruning(ridge=0.1, rho=0.2, growth=1.5, levels=4, period=5, refit_steps=6),
    ),
    "maiht": NamedMethod("monotone accelerated iterative hard thresholding", _MAIHT["best"], _MAIHT),
    "admm": NamedMethod("ADMM with a rising rho", AdmmPruning()),
    # A low first rho and a slow rise find better supports; it matters most at high sparsity.
    "admm_splice": NamedMethod(
        "a longer ADMM, then splicing: the smallest error of a layer, in three times the time of best",
        SplicePruning(first=AdmmPruning(rho=0.02, growth=1.5, levels=10, period=4, refit_steps=0), rounds=8),
    ),
    "splice": NamedMethod("the support of Wanda, improved by splicing", SplicePruning()),
    "sparsegpt": NamedMethod("one pass over the inputs; each error is compensated by the inputs after it", SparseGpt()),
    "wanda": NamedMethod("weights ranked by size times input norm; the others stay unchanged", Wanda()),
    "magnitude": NamedMethod("weights ranked by size, without data; the others stay unchanged", Magnitude()),
}


def find_method(
    method: str | LayerMethod, preset: str | None = None, penalty: Any = None, ridge: float | None = None
) -> LayerMethod:
    """The method object for a name and a preset; an object is returned unchanged.

    Args:
        method: a name in `METHODS`, or an object.
        preset: a name in the method's `presets`; None for its own settings.
        penalty: replaces L0 in the choice of the support; method "maiht" only.
        ridge: replaces the method's own.

    Raises:
        ValueError: for an unknown name or preset, listing those known, or a preset, penalty or ridge that the method
            does not take.
    """
    found = _named(method, preset)
    if ridge is not None:
        found = _with_ridge(found, ridge)
    if penalty is None:
        return found
    if not isinstance(found, MaihtPruning):
        raise ValueError(f"only method 'maiht' takes a penalty, given {method!r}; leave the penalty out")
    named = dataclasses.is_dataclass(penalty) and "weight" in {f.name for f in dataclasses.fields(penalty)}
    if not isinstance(penalty, Penalty) or not named:
        raise ValueError(
            f"penalty must be an object with value(x) and prox(x, step), a frozen dataclass made by "
            f"sparseopt.pytree with a field `weight`, given {penalty!r}"
        )
    return dataclasses.replace(found, penalty=penalty)


def _named(method: str | LayerMethod, preset: str | None) -> LayerMethod:
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    found = METHODS[method] if isinstance(method, str) else NamedMethod("", method)
    if preset is None:
        return found.method
    if not found.presets:
        raise ValueError(f"method {method!r} has no presets, given preset {preset!r}; leave the preset out")
    if preset not in found.presets:
        raise ValueError(f"unknown preset {preset!r}; known are {', '.join(found.presets)}")
    return found.presets[preset]


def _with_ridge(method: Any, ridge: float) -> LayerMethod:
    """The method with another ridge, and so the method that finds its first support."""
    if not ridge >= 0:
        raise ValueError(f"ridge must be 0 or more, given {ridge}")
    fields = {f.name for f in dataclasses.fields(method)} if dataclasses.is_dataclass(method) else set()
    if "ridge" not in fields:
        raise ValueError(f"{type(method).__name__} has no ridge, given {ridge}; leave the ridge out")
    method = dataclasses.replace(method, ridge=ridge)
    if "first" in fields and "ridge" in {f.name for f in dataclasses.fields(method.first)}:
        method = dataclasses.replace(method, first=_with_ridge(method.first, ridge))
    return method
