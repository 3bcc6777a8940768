"""Floor 6: the pruning methods and their presets, all behind one call: `method(layer, pattern) -> Pruned`.

| name | support | values |
|---|---|---|
| best | ADMM with a rising rho; on single layers a longer one, then splicing | conjugate gradients |
| maiht | monotone accelerated iterative hard thresholding | projected gradient (paper), conjugate gradients (best) |
| admm | ADMM with a rising rho | conjugate gradients |
| splice | Wanda's, then splicing | conjugate gradients |
| sparsegpt | one pass over the inputs | exact compensation of the inputs that follow |
| wanda | size times input norm | dense |
| magnitude | size | dense |
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from sparseopt.core.penalties import Penalty
from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.methods.admm import AdmmPruning
from sparseopt.pruning.methods.magnitude import Magnitude
from sparseopt.pruning.methods.maiht import MaihtPruning
from sparseopt.pruning.methods.sparsegpt import SparseGpt
from sparseopt.pruning.methods.splice import SplicePruning
from sparseopt.pruning.methods.wanda import Wanda

__all__ = [
    "METHODS",
    "AdmmPruning",
    "Magnitude",
    "MaihtPruning",
    "SparseGpt",
    "SplicePruning",
    "Wanda",
    "best_for_models",
    "find_method",
]


def _maiht_best() -> LayerMethod:
    return MaihtPruning(
        ridge=0.03,
        undershoot=(0.02, 0.015),
        monitor="on_increase",
        max_steps=80,
        rest=5e-4,
        refit="cg",
        refit_steps=15,
    )


def _best() -> LayerMethod:
    # A low first rho and a gentle rise find better supports; it matters most at high sparsity.
    first = AdmmPruning(rho=0.02, growth=1.5, levels=10, period=4, refit_steps=0)
    return SplicePruning(first=first, rounds=8)


def best_for_models() -> LayerMethod:
    """Method "best" as whole models run it: a shorter search, and a ridge for the few tokens of a calibration.

    A third of the time of `find_method("best")`. With this ridge a gently rising rho finds the supports that splicing
    would, and a larger ridge was best by held-out error and by perplexity.
    """
    return AdmmPruning(ridge=0.1, rho=0.2, growth=1.5, levels=4, period=5, refit_steps=6)


def _always(make: Callable[[], LayerMethod]) -> dict[str, Callable[[], LayerMethod]]:
    """A method whose two presets are the same."""
    return {"paper": make, "best": make}


METHODS: dict[str, dict[str, Callable[[], LayerMethod]]] = {
    "best": _always(_best),
    "maiht": {"paper": MaihtPruning, "best": _maiht_best},
    "admm": _always(AdmmPruning),
    "splice": _always(SplicePruning),
    "sparsegpt": _always(SparseGpt),
    "wanda": _always(Wanda),
    "magnitude": _always(Magnitude),
}


def find_method(
    method: str | LayerMethod, preset: str = "best", penalty: Any = None, ridge: float | None = None
) -> LayerMethod:
    """The method object for a name and a preset; an object is returned as it is.

    Args:
        method: a name in `METHODS`, or an object.
        preset: "paper" or "best".
        penalty: chooses the support in place of L0, method "maiht" only.
        ridge: in place of the method's own.

    Raises:
        ValueError: for an unknown name or preset, listing those known, or a penalty or ridge that the method cannot
            take.
    """
    found = _find_method(method, preset) if isinstance(method, str) else method
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


def _with_ridge(method: Any, ridge: float) -> LayerMethod:
    """The method, and the method before it, with another ridge."""
    if not ridge >= 0:
        raise ValueError(f"ridge must be 0 or more, given {ridge}")
    fields = {f.name for f in dataclasses.fields(method)} if dataclasses.is_dataclass(method) else set()
    if "ridge" not in fields:
        raise ValueError(f"{type(method).__name__} has no ridge, given {ridge}; leave the ridge out")
    method = dataclasses.replace(method, ridge=ridge)
    if "first" in fields and "ridge" in {f.name for f in dataclasses.fields(method.first)}:
        method = dataclasses.replace(method, first=_with_ridge(method.first, ridge))
    return method


def _find_method(method: str, preset: str) -> LayerMethod:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    presets = METHODS[method]
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r}; known are {', '.join(presets)}")
    return presets[preset]()
