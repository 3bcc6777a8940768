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
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import WINDOWS, Bench, Progress, calibration_windows, model_and_text, names_of, say, text_parser
from jax._src.lax.lax import _dot_general_lower
from jax.interpreters import mlir

from sparseopt.core.base.dense import HIGHEST
from sparseopt.models import open_source
from sparseopt.pruning import Recipe, masks, perplexity, prune_model
from sparseopt.pruning.text.windows import text_windows

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


def prune_rounded(
    source: Path, output: Path, recipe: Recipe, rounding: tuple[int, bool] | None, label: str
) -> dict[str, Any]:
    """The summary of a run whose products are rounded; for a process of its own."""
    if rounding is not None:
        emulate(*rounding)
    return prune_model(source, output, recipe, observer=Progress(label).told_of).summary()


def lost_share(kept: Path, other: Path) -> float:
    """The share of the weights that one pruned model keeps and another does not."""
    pairs = zip(masks(kept), masks(other), strict=True)
    counts = [(np.sum(mine & ~theirs), np.sum(mine)) for (_, mine), (_, theirs) in pairs]
    lost, total = np.sum(counts, axis=0)
    return float(lost / total)


def bench_method(bench: Bench, name: str, rows: list[tuple[str, str]]) -> None:
    """The float32 model of a method, then those of the rows that are not in the record."""
    tokens = calibration_windows(bench.windows or WINDOWS)
    recipe = Recipe(sparsity=SPARSITY, calibration=bench.data, **METHODS[name], **tokens)
    figure = f"perplexity, precision, {name}"
    ids, bos = text_windows(open_source(bench.source), bench.data, "evaluation", *bench.scoring)
    wanted = [row for row in rows if not bench.found(figure, rounding=row[0], products=row[1])]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "float32"
        for rounding, place in [("float32", "none"), *wanted]:
            output = reference if place == "none" else Path(folder) / f"{rounding} {place}"
            precision, bits = ROUNDINGS.get(rounding, ("highest", 0))
            # All products are rounded in the lowering, so the recipe may leave them in the highest precision.
            asked = Recipe(**vars(recipe) | {"precision": precision if place == PLACES[0] else "highest"})
            label, rounded = f"{name}, {rounding} in {place}", (bits, place == PLACES[1]) if bits else None
            say(label)
            run = partial(prune_rounded, bench.source, output, asked, rounded, label)
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    row = pool.submit(run).result()
            except Exception as error:
                bench.fail(figure, error, rounding=rounding, products=place)
                if place == "none":
                    return
                continue
            if bench.found(figure, rounding=rounding, products=place):
                continue
            row["perplexity"], lost = perplexity(output, ids, bos=bos), lost_share(reference, output)
            bench.emit_run(figure, row, ("none", None), rounding=rounding, products=place, lost_share=lost)


def main() -> None:
    """Run the selected rows."""
    parser = text_parser(__doc__)
    parser.add_argument("--methods", type=names_of(METHODS), default=list(METHODS), help="comma-separated")
    parser.add_argument("--roundings", type=names_of(ROUNDINGS), default=list(ROUNDINGS), help="comma-separated")
    parser.add_argument("--record", type=Path, help="file that lines are appended to; its rows are not run again")
    parser.add_argument("--windows", type=int, help="for a trial: number of calibration windows")
    arguments = parser.parse_args()
    source, data = model_and_text(arguments, "bench_precision")
    bench = Bench(source, data, None, arguments.windows, arguments.windows is not None, record=arguments.record)
    for name in arguments.methods:
        places = PLACES[:1] if name == "best" else PLACES
        bench_method(bench, name, [(r, place) for place, r in itertools.product(places, arguments.roundings)])
    say(f"done, {bench.failures} failed rows")
    sys.exit(1 if bench.failures else 0)


if __name__ == "__main__":
    main()
