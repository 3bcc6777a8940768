"""The pruning methods by name. A method is called with a layer and a pattern: `method(layer, pattern)`."""

import dataclasses
import math
from collections.abc import Mapping
from types import FunctionType
from typing import Any, NamedTuple

from sparseopt.core.base.arguments import unknown
from sparseopt.core.penalties.protocols import Penalty
from sparseopt.layers.bits import parse_bits
from sparseopt.layers.methods.admm import AdmmPruning
from sparseopt.layers.methods.few_bits import PANEL, FewBits
from sparseopt.layers.methods.maiht import MaihtPruning
from sparseopt.layers.methods.removal import STEPS, GroupRemoval
from sparseopt.layers.methods.scores import Flap, Magnitude, Wanda
from sparseopt.layers.methods.sparsegpt import SparseGpt
from sparseopt.layers.methods.splice import SplicePruning
from sparseopt.layers.patterns import is_group_pattern
from sparseopt.layers.problem import LayerMethod

# Operations per weight for one input of SparseGPT's inner loop, which runs over vectors.
COMPENSATION = 350
# A solve that may stop early does so after about this fraction of its steps.
RESTED = 0.6
# Sums over all devices if a layer is cut: in a step of mAIHT, in a step of conjugate gradients, and in a selection
# (its sample, and three counts in each of about seven passes).
MAIHT_SUMS, REFIT_SUMS, SELECTION_SUMS = 12, 2, 1 + 3 * 7


class NamedMethod(NamedTuple):
    """An entry of `METHODS`."""

    summary: str  # for help texts
    method: LayerMethod  # with its own settings
    presets: Mapping[str, LayerMethod] = {}  # other settings by name
    groups: LayerMethod | None = None  # instead of `method` for the pattern group:C


_MAIHT = {
    "paper": MaihtPruning(),
    "tuned": MaihtPruning(
        ridge=0.03,
        undershoot=(0.02, 0.015),
        monitor="on_increase",
        max_steps=80,
        rest=5e-4,
        refit="cg",
        refit_steps=15,
    ),
}

#: The pruning methods by name; see `find_method`.
METHODS: dict[str, NamedMethod] = {
    # For the few tokens of a calibration a ridge of 0.1 was best by held-out error and by perplexity. With it a slowly
    # rising rho finds the supports that splicing would.
    "best": NamedMethod(
        "ADMM whose rho rises slowly, with a large ridge, and osscar for group:C; on models also output weights, "
        "propagation and training",
        AdmmPruning(ridge=0.1, rho=0.2, growth=1.5, levels=4, period=5, refit_steps=6),
        groups=GroupRemoval(),
    ),
    "maiht": NamedMethod("monotone accelerated iterative hard thresholding", _MAIHT["tuned"], _MAIHT),
    "admm": NamedMethod("ADMM with a rising rho", AdmmPruning()),
    # A low first rho and a slow rise find better supports; it matters most at high sparsity.
    "admm_splice": NamedMethod(
        "a longer ADMM, then splicing: the smallest error of a layer, in three times the time of best",
        SplicePruning(first=AdmmPruning(rho=0.02, growth=1.5, levels=10, period=4, refit_steps=0), rounds=8),
    ),
    "splice": NamedMethod("the support of Wanda, improved by splicing", SplicePruning()),
    "sparsegpt": NamedMethod("one pass over the inputs; each error is compensated by the inputs after it", SparseGpt()),
    "osscar": NamedMethod(
        "whole groups of inputs removed in turn, the others fitted again; group:C only", GroupRemoval()
    ),
    "flap": NamedMethod(
        "groups of inputs ranked by variance and weights; the others stay unchanged; group:C only", Flap()
    ),
    "wanda": NamedMethod("weights ranked by size times input norm; the others stay unchanged", Wanda()),
    "magnitude": NamedMethod("weights ranked by size, without data; the others stay unchanged", Magnitude()),
}


def find_method(
    method: str | LayerMethod,
    preset: str | None = None,
    penalty: Any = None,
    ridge: float | None = None,
    pattern: str = "unstructured",
    bits: str | None = None,
) -> LayerMethod:
    """The method object for a name, a preset and the name of a pattern; an object is returned unchanged.

    A penalty replaces L0 in the choice of the support, with method "maiht" only; a ridge replaces the method's own.
    For the pattern group:C, "best" is another method. With bits the answer is put on their grid.

    Raises:
        ValueError: for an unknown name, preset or bits, listing the known ones, or a preset, penalty or ridge that the
            method does not accept.
    """
    found = _named(method, preset, pattern)
    if ridge is not None:
        found = _with_ridge(found, ridge)
    if penalty is not None:
        found = _with_penalty(found, method, penalty)
    return found if bits is None else FewBits(found, parse_bits(bits))


def _with_penalty(found: LayerMethod, method: Any, penalty: Any) -> LayerMethod:
    """The mAIHT method with a penalty other than L0."""
    if not isinstance(found, MaihtPruning):
        raise ValueError(f"only method 'maiht' accepts a penalty, given {method!r}; leave the penalty out")
    named = dataclasses.is_dataclass(penalty) and "weight" in {f.name for f in dataclasses.fields(penalty)}
    if not isinstance(penalty, Penalty) or not named:
        raise ValueError(
            f"penalty must be an object with value(x) and prox(x, step), a frozen dataclass made with "
            f"sparseopt.pytree with a field `weight`, given {penalty!r}"
        )
    return dataclasses.replace(found, penalty=penalty)


def chooser(method: LayerMethod) -> LayerMethod:
    """The method that chooses the weights that stay."""
    return method.first if isinstance(method, FewBits) else method


def _named(method: str | LayerMethod, preset: str | None, pattern: str) -> LayerMethod:
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))
        found = METHODS[method]
    elif callable(method) and not isinstance(method, type | FunctionType):
        found = NamedMethod("", method)
    else:
        raise ValueError(
            "your own method must be an object of a frozen dataclass made with sparseopt.pytree, such as "
            f"Wanda(), given {method!r}"
        )
    if preset is None:
        return found.groups if found.groups is not None and is_group_pattern(pattern) else found.method
    if not found.presets:
        raise ValueError(f"method {method!r} has no presets, given preset {preset!r}; leave the preset out")
    if preset == "best" and "tuned" in found.presets:
        raise ValueError("preset 'best' is called 'tuned' since 0.3")
    if preset not in found.presets:
        raise ValueError(unknown("preset", preset, found.presets))
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


class Workspace(NamedTuple):
    """What a solve of a layer `[out, in]` holds at once besides its job, as float32 arrays of two shapes."""

    square: float  # `[in, in]`
    wide: float  # `[in, out]`

    def nbytes(self, outputs: int, inputs: int) -> int:
        return int(4 * (self.square * inputs**2 + self.wide * inputs * outputs))


@dataclasses.dataclass(frozen=True)
class MethodCost:
    """The cost of a method for one layer `[out, in]`: operations, and memory besides the job's."""

    products: float  # of the Gram with an array like the weight, `2 in² out` operations each
    inverses: float  # of a matrix `[in, in]`
    sums: float  # over all devices, if the layer is cut over several
    updates: float  # further operations per weight
    workspace: Workspace
    program_mib: int  # resident MiB of its compiled program, for each shape


# For your own method: as much memory as any method of this package needs, and an unknown number of operations.
OWN = MethodCost(math.nan, math.nan, math.nan, math.nan, Workspace(7.5, 10.0), 104)


def method_cost(method: LayerMethod) -> MethodCost:
    """The cost of a method of this package; OWN for any other."""
    match method:
        case Magnitude() | Flap():
            return MethodCost(0, 0, SELECTION_SUMS, 0, Workspace(0, 3.5), 28)
        case Wanda():
            return MethodCost(0, 0, 3 * SELECTION_SUMS, 0, Workspace(0, 4), 40)
        case GroupRemoval():
            # If half of the groups go: the updates of the inverse take as long as half an inverse, the updates of the
            # values as half a product, and every step reads all values for the costs.
            steps = STEPS / 2
            return MethodCost(0.5, 1.5, steps, 8 * steps, Workspace(3.5, 4), 64)
        case SparseGpt():
            return MethodCost(1, 1, SELECTION_SUMS, method.block * COMPENSATION, Workspace(2, 4), 60)
        case MaihtPruning():
            steps = method.max_steps * (RESTED if method.rest >= 0 else 1.0)
            # The monitor needs a product too, though seldom its own.
            each = 1.5 if method.monitor == "always" else 1.1
            sums = steps * MAIHT_SUMS + method.refit_steps * REFIT_SUMS + 2 * SELECTION_SUMS
            return MethodCost(steps * each + method.refit_steps + 2, 0, sums, 0, Workspace(1, 10), 64)
        case AdmmPruning():
            steps = method.levels * method.period * (RESTED if method.rest >= 0 else 1.0)
            sums = (steps + 1) * SELECTION_SUMS + method.refit_steps * REFIT_SUMS
            return MethodCost(steps + method.refit_steps + 1, method.levels, sums, 0, Workspace(7.5, 4), 104)
        case SplicePruning():
            first, rounds = method_cost(method.first), method.rounds * RESTED
            if first is OWN:
                return OWN
            return MethodCost(
                products=first.products + rounds * (method.inner_steps + 2) + method.refit_steps + 2,
                inverses=first.inverses + 1,
                sums=first.sums + rounds * (method.inner_steps * REFIT_SUMS + SELECTION_SUMS),
                updates=first.updates,
                workspace=Workspace(max(first.workspace.square, 2.5), max(first.workspace.wide, 7.5)),
                program_mib=first.program_mib + 180,
            )
        case FewBits():
            first = method_cost(method.first)
            if first is OWN:
                return OWN
            return MethodCost(
                products=first.products + method.sweeps + 1,
                inverses=first.inverses + 1,
                sums=first.sums,
                updates=first.updates + (method.sweeps + 1) * (method.bits.group or PANEL) * COMPENSATION,
                workspace=Workspace(max(first.workspace.square, 3), max(first.workspace.wide, 8)),
                program_mib=first.program_mib + 60,
            )
    return OWN
