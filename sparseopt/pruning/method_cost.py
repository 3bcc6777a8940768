"""Floor 6: what each pruning method computes on one layer `[out, in]`, counted from its settings."""

from dataclasses import dataclass

from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.methods import AdmmPruning, Magnitude, MaihtPruning, SparseGpt, SplicePruning, Wanda

# Operations per weight for one input of SparseGPT's inner loop, which runs over vectors.
COMPENSATION = 350
# A solve that may stop early does so after about this fraction of its steps.
RESTED = 0.6
# Sums over all devices where a layer is cut: in a step of mAIHT, in a step of conjugate gradients, and in a selection
# (its sample, and three counts in each of about seven passes).
MAIHT_SUMS, REFIT_SUMS, SELECTION_SUMS = 12, 2, 1 + 3 * 7


@dataclass(frozen=True)
class MethodCost:
    """What a method computes on one layer.

    Attributes:
        products: of the Gram with an array like the weight, `2 in² out` operations each.
        inverses: of a matrix `[in, in]`.
        selections: of the largest entries of the weight.
        sums: over all devices, where the layer is cut over several.
        updates: further operations per weight.
        square: workspace in float32 arrays `[in, in]`.
        wide: workspace in float32 arrays `[in, out]`.
        compile_seconds: for each shape, on the machine that `cost` describes.
    """

    products: float
    inverses: float
    selections: float
    sums: float
    updates: float
    square: float
    wide: float
    compile_seconds: float


def method_cost(method: LayerMethod) -> MethodCost | None:
    """The cost of a method of this package; None for any other."""
    match method:
        case Magnitude():
            return MethodCost(0, 0, 1, SELECTION_SUMS, 0, 0, 3.5, 0.7)
        case Wanda():
            return MethodCost(0, 0, 3, 3 * SELECTION_SUMS, 0, 0, 4, 1.0)
        case SparseGpt():
            return MethodCost(1, 2, 1, SELECTION_SUMS, method.block * COMPENSATION, 2, 4, 1.5)
        case MaihtPruning():
            steps = method.max_steps * (RESTED if method.rest >= 0 else 1.0)
            # The monitor takes a product too, though seldom one of its own.
            each = 1.5 if method.monitor == "always" else 1.1
            sums = steps * MAIHT_SUMS + method.refit_steps * REFIT_SUMS + 2 * SELECTION_SUMS
            return MethodCost(steps * each + method.refit_steps + 2, 0, 2, sums, 0, 1, 10, 1.6)
        case AdmmPruning():
            steps = method.levels * method.period * (RESTED if method.rest >= 0 else 1.0)
            sums = (steps + 1) * SELECTION_SUMS + method.refit_steps * REFIT_SUMS
            return MethodCost(steps + method.refit_steps + 1, method.levels, steps + 1, sums, 0, 7.5, 4, 2.6)
        case SplicePruning():
            first, rounds = method_cost(method.first), method.rounds * RESTED
            if first is None:
                return None
            return MethodCost(
                products=first.products + rounds * (method.inner_steps + 2) + method.refit_steps + 2,
                inverses=first.inverses + 1,
                selections=first.selections + rounds,
                sums=first.sums + rounds * (method.inner_steps * REFIT_SUMS + SELECTION_SUMS),
                updates=first.updates,
                square=max(first.square, 2.5),
                wide=max(first.wide, 5.5),
                compile_seconds=first.compile_seconds + 4.5,
            )
    return None
