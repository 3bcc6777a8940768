"""Floor 6: what devices tell each other in a layer's solve and in a block's calibration, counted from shapes alone.

All figures are bytes that each device hands over, as `core.collectives` counts them in a compiled program: the size of
the operands, an all-reduce of float32 or int32 sums or an all-gather of a device's own count. In a ring of d devices,
an all-reduce of n bytes sends 2 n (d - 1) / d over each link, and an all-gather of n bytes n (d - 1).

    mAIHT iteration, unstructured      counts of survivors and of those that changed sides, two sums      48 or 60 bytes
    ADMM iteration, unstructured       a selection: 4 s + 12 passes,  s <= 2 * 1024 the sample        about 4 KB
    conjugate gradients, a step        two sums                                                           8 bytes
    calibration, a block               4 sum_taps in²  +  8 a tap, once, whatever the number of tokens

None of the first three grows with the layer.
"""

from collections.abc import Iterable

from sparseopt.core.patterns import NM, BlockTopK, RowTopK, TopK
from sparseopt.core.thresholds import SAMPLE
from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.methods import AdmmPruning, MaihtPruning
from sparseopt.pruning.patterns import Pattern

# An int32 count, a float32 sum, a word of yes or no.
COUNT, SUM, FLAG = 4, 4, 1
# Passes of a selection over smooth scores, see `core.thresholds`.
PASSES = 7
# Sums of a conjugate-gradient step: what the loss falls by, and the squared residual that is left.
REFIT_STEP = 2 * SUM


def selection_bytes(pattern: Pattern, shape: tuple[int, int], passes: int = PASSES) -> int:
    """One selection of the largest scores in a pattern, where none of them tie at the limit.

    A pass counts at three levels; before the first, a sample of the scores is fetched. A pattern with a count for every
    output needs no word of other devices but whether any of these goes on, n:m not even that. Ties at the limit add
    `4 (in + 1)` for the totals of all inputs, and the device's own part of one input's scores.

    Args:
        pattern: in which is selected.
        shape: `(out, in)`.
        passes: of the selection.
    """
    outputs, inputs = shape
    match pattern:
        case TopK():
            size = outputs * inputs
        case BlockTopK(_, (wide, high)):
            size = (outputs // high) * (inputs // wide)
        case RowTopK():
            # Before each pass and behind the last: whether any output goes on. Then, whether any has ties.
            return FLAG * (passes + 2)
        case NM():
            return 0
    sample = len(range(0, size, (size // SAMPLE) | 1))
    return SUM * sample + 3 * COUNT * passes


def iteration_bytes(method: LayerMethod, pattern: Pattern, shape: tuple[int, int], passes: int = PASSES) -> int | None:
    """One iteration of the search for the support, every branch taken; None for methods that do not iterate so.

    mAIHT looks at its monitor only now and then with "on_increase": without it, 12 bytes less of 48.

    Args:
        method: mAIHT or ADMM.
        pattern: which weights may survive.
        shape: `(out, in)`.
        passes: of a selection.
    """
    selection = selection_bytes(pattern, shape, passes)
    match method:
        case MaihtPruning():
            always = method.monitor == "always"
            if isinstance(pattern, TopK):
                # Two counts each: survivors of X1 for the level and for F, of the candidate and the monitor, and the
                # residual; the losses of candidate and monitor. "always" compares the two by one sum and count more.
                return (12 * COUNT + 3 * SUM) if always else (10 * COUNT + 2 * SUM)
            # The residual, two losses, two projections, and three times whether a point lies in the pattern.
            fits = COUNT if isinstance(pattern, BlockTopK) else FLAG
            return 2 * COUNT + 2 * SUM + 2 * selection + 3 * fits
        case AdmmPruning():
            return selection if method.rest < 0 else None
    return None


def calibration_bytes(widths: Iterable[int], drift: bool = False) -> int:
    """The exchange of a block's Grams, once a stream.

    Args:
        widths: of the distinct inputs of its linears.
        drift: whether drifts are gathered beside the Grams.
    """
    return sum(SUM * width**2 * (2 if drift else 1) + SUM + COUNT for width in widths)
