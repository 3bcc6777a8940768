"""What products of fewer bits cost in quality, as JSON lines: `make bench-precision DATA=folder`.

The roundings of accelerators are emulated on a CPU: both operands of a product are rounded, and it is added up in
float32. Multiplying on an accelerator differs in the order of the sum alone.

    3xbf16      precision high on a TPU, three bfloat16 products: operands of 16 bits
    tf32        precision default on an NVIDIA GPU: 11 bits
    bf16        precision default on a TPU: 8 bits

in products of activations (`--precision` of `sparseopt prune`), and in all products. Every row is a pruned model: its
perplexity, computed in float32, the mean errors of its layers, and the share of the weights kept in float32 that it
lost. `--methods best` and `--roundings bf16` select; with `--record FILE` lines are also appended to a file, and rows
that it has are not run again.
"""

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Recorder, apart, say, selection
from jax._src.lax.lax import _dot_general_lower
from jax.interpreters import mlir
from pruned import HELDOUT_WINDOWS, SEQLEN, WINDOWS, about, judged, model_and_text, prune_and_score, score, text_options

from sparseopt.core.base.dense import HIGHEST
from sparseopt.pruning import Recipe, masks

METHODS: dict[str, dict[str, Any]] = {
    "maiht": {"method": "maiht"},
    "best one shot": {"method": "best", "train_epochs": 0, "variants": 0},
    "best": {"method": "best"},
}
SPARSITY = 0.5
# The precision as JAX names it, and the bits of a significand without its first, which is always 1.
ROUNDINGS = {"3xbf16": ("high", 15), "tf32": ("default", 10), "bf16": ("default", 7)}
PLACES = ("activations", "all products")


def emulate(bits: int, everywhere: bool) -> None:
    """From now on this process rounds the operands of products: all, or those that are not in the highest precision."""
    rounded = mlir.lower_fun(lambda x: jax.lax.reduce_precision(x, 8, bits), multiple_results=False)

    def lower(context: mlir.LoweringRuleContext, left: Any, right: Any, **params: Any) -> Any:
        if everywhere or params["precision"] != (HIGHEST, HIGHEST):
            operands = []
            for value, aval in zip((left, right), context.avals_in, strict=True):
                operands += rounded(context.replace(avals_in=[aval], avals_out=[aval]), value)
            left, right = operands
        return _dot_general_lower(context, left, right, platform="cpu", **params)

    mlir.register_lowering(jax.lax.dot_general_p, lower, platform="cpu")


def pruned_rounded(source: Path, recipe: Recipe, output: Path, rounding: tuple[int, bool] | None) -> dict[str, Any]:
    """The summary of a run whose products are rounded; for a process of its own, which does not score the model."""
    if rounding is not None:
        emulate(*rounding)
    return prune_and_score(source, recipe, output, {})


def lost_share(kept: Path, other: Path) -> float:
    """The share of the weights that one pruned model keeps and another does not."""
    pairs = zip(masks(kept), masks(other), strict=True)
    counts = [(np.sum(mine & ~theirs), np.sum(mine)) for (_, mine), (_, theirs) in pairs]
    lost, total = np.sum(counts, axis=0)
    return float(lost / total)


def run_method(recorder: Recorder, given: Any, name: str, source: Path, data: str) -> int:
    """The float32 model of a method, then those of the rows that are not in the record; returns how many failed."""
    count, failures = given.windows or WINDOWS, 0
    tokens: dict[str, Any] = {"windows": count, "heldout_windows": min(HELDOUT_WINDOWS, count), "seqlen": SEQLEN}
    recipe = Recipe(sparsity=SPARSITY, calibration=data, score="none", **METHODS[name], **tokens)
    figure, shared = f"perplexity, precision, {name}", about(source, given.windows is not None)
    rows = [*itertools.product(PLACES[:1] if name == "best" else PLACES, given.roundings)]
    wanted = [row for row in rows if not recorder.found(figure=figure, products=row[0], rounding=row[1], **shared)]
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "float32"
        for place, rounding in [("none", "float32"), *wanted] if wanted else []:
            output = Path(folder) / f"{rounding} {place}" if rounding != "float32" else reference
            precision, bits = ROUNDINGS.get(rounding, ("highest", 0))
            # All products are rounded in the lowering, so the recipe may leave them in the highest precision.
            asked = recipe.model_copy(update={"precision": precision if place == PLACES[0] else "highest"})
            rounded = (bits, place == PLACES[1]) if bits else None
            details = {"rounding": rounding, "products": place, **shared}
            say(f"{name}, {rounding} in {place}")
            try:
                row = apart(pruned_rounded, source, asked, output, rounded)
            except Exception as error:
                failures += 1
                say(f"FAILED: {error}")
                recorder.emit(figure, value=None, error=f"{type(error).__name__}: {error}", **details)
                if place == "none":
                    return failures
                continue
            if recorder.found(figure=figure, **details) is None:
                row["value"], lost = score(source, output, data), lost_share(reference, output)
                recorder.emit(figure, unit="perplexity", **judged(0, None), **row, **details, lost_share=lost)
    return failures


def main() -> None:
    """Run the selected rows."""
    parser = text_options(__doc__)
    selection(parser, "--methods", METHODS)
    selection(parser, "--roundings", ROUNDINGS)
    parser.add_argument("--record", type=Path, help="file that lines are appended to; its rows are not run again")
    parser.add_argument("--windows", type=int, help="for a trial: number of calibration windows")
    given = parser.parse_args()
    source, data = model_and_text(given, "bench_precision")
    recorder = Recorder(given.record)
    failures = sum(run_method(recorder, given, name, source, data) for name in given.methods)
    say(f"done, {failures} failed rows")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
