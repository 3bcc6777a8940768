"""Speed of the two solvers on an accelerator, compared with its speed in plain matrix products and copies.

    python benchmarks/bench_gpu.py [--layers 4096x4096 11008x4096 4096x11008] [--sides 1024 2048 4096 8192]
                                   [--runs maiht best] [--record FILE] [--any]

Prints one JSON line per measurement, and appends it to the record: the matmul rates and bandwidth of the device; layer
solves in the shapes of a 7B Llama with the operations that they take, and whole runs on SmolLM2; steps of Doge-ADMM on
grids, with the least number of bytes that a step must move. It is skipped without an accelerator, with
a message; --any runs it on the CPU, where only small sizes are useful.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import emit_line, say

import sparseopt as so
from sparseopt.core.base.dense import HIGHEST
from sparseopt.layers.compiled import Stopwatch
from sparseopt.layers.methods import find_method, method_cost
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import LayerJob, layer_solver
from sparseopt.models import bundled_model
from sparseopt.pruning import Recipe, prune_model
from sparseopt.system.machine import environment

METHODS = (("maiht", "paper"), ("maiht", "tuned"), ("admm", None), ("sparsegpt", None))
STEPS = 200
# An inverse of n x n, in operations over n³.
INVERSE = 6
# Arrays that a step of Doge-ADMM on a grid must read or write at least once. Nodes: x and the memory m, read and
# written, and y, read. Edges, two per node: the dual and its prox point, read, written, and read by the divergence.
NODE_PASSES, EDGE_PASSES = 5, 3
TOKENS: dict[str, Any] = {"calibration": "pydoc", "windows": 16, "seqlen": 512, "heldout_windows": 0}
RUNS = {
    "maiht": Recipe(method="maiht", **TOKENS),
    "best one shot": Recipe(method="best", train_epochs=0, variants=0, **TOKENS),
    "best": Recipe(method="best", **TOKENS),
}
# The seconds in a report, by the kind of work.
KINDS = {
    "layer solves": "solver_seconds",
    "forward passes and Grams": "calibration_seconds",
    "survey": "survey_seconds",
    "training": "reconstruction_seconds",
}


def main() -> None:
    """Run the selected measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", nargs="*", default=["4096x4096", "11008x4096", "4096x11008"], help="out x in")
    parser.add_argument("--sides", nargs="*", type=int, default=[1024, 2048, 4096, 8192], help="of square grids")
    parser.add_argument("--square", type=int, default=8192, help="side of the matrices for the matmul rate")
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=["maiht", "best one shot"], help="on SmolLM2")
    parser.add_argument("--record", type=Path, help="lines are added to this file")
    parser.add_argument("--any", action="store_true", help="run on a CPU, too")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu" and not arguments.any:
        sys.exit("SKIPPED: bench-gpu needs a GPU or TPU, and JAX finds none (pip install 'jax[cuda13]')")

    def emit(figure: str, **fields: Any) -> None:
        line = emit_line(figure, **fields)
        if arguments.record:
            with arguments.record.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    emit("device", kind=device.device_kind, platform=device.platform, **environment())
    rates = {}
    for fields in measure_rates(arguments.square):
        rates[fields["dtype"]] = 1e12 * fields["tflops"]
        emit("matmul", **fields)
    rate, bandwidth = rates["float32 highest"], measure_bandwidth(arguments.square**2 * 2)
    emit("bandwidth", gigabytes_per_second=bandwidth / 1e9)
    for shape in arguments.layers:
        outputs, inputs = map(int, shape.split("x"))
        for method, preset in METHODS:
            emit("layer", **measure_layer(outputs, inputs, method, preset), rate=rate)
    for side in arguments.sides:
        for order in (0, 1):
            emit("grid", **measure_grid(side, order), bandwidth=bandwidth)
    for name in arguments.runs:
        emit("run", **measure_run(name), rate=rate)


def seconds_of(run: Callable[[], Any], repeats: int = 3) -> float:
    """The seconds of the fastest of some runs, after one that compiles."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return min(found)


def measure_rates(side: int) -> Iterator[dict[str, Any]]:
    """The rates of square matrix products, by dtype and precision."""
    precisions: tuple[tuple[str, Any, Any], ...] = (
        ("bfloat16", jnp.bfloat16, None),
        ("float32 default", jnp.float32, None),
        ("float32 highest", jnp.float32, HIGHEST),
    )
    for name, dtype, precision in precisions:
        a = jnp.full((side, side), 0.5, dtype)
        product = jax.jit(partial(jnp.matmul, precision=precision))
        yield {"dtype": name, "side": side, "tflops": 2 * side**3 / seconds_of(partial(product, a, a)) / 1e12}


def measure_bandwidth(size: int) -> float:
    """Bytes per second, read and written, of adding a number to a float32 array."""
    values = jnp.zeros(size, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 8 * size / seconds_of(lambda: add(values))


def measure_layer(outputs: int, inputs: int, method: str, preset: str | None) -> dict[str, Any]:
    """One layer at 50 %: a weight in bfloat16, a Gram matrix in float32 on the device."""
    say(f"layer {outputs} x {inputs}, {method} {preset or ''}")
    keys = jax.random.split(jax.random.key(0), 3)
    # Correlated inputs of unequal size, like activations.
    mixing = jax.random.normal(keys[0], (inputs, 64)) / 8
    tokens = jax.random.normal(keys[1], (2 * inputs, inputs)) + jax.random.normal(keys[2], (2 * inputs, 64)) @ mixing.T
    gram = jnp.matmul(tokens.T, tokens, precision=HIGHEST)
    weight = (jax.random.normal(keys[2], (outputs, inputs)) / inputs**0.5).astype(jnp.bfloat16)
    del tokens
    job = LayerJob(weight, gram, None, parse_pattern("unstructured", 0.5, (outputs, inputs)))
    solver = find_method(method, preset)
    about = {"outputs": outputs, "inputs": inputs, "method": method, "preset": preset}
    spent, compiling = list[float](), 0.0
    try:
        for _ in range(2):
            watch = Stopwatch()
            report = layer_solver(job, solver)
            seconds, first = watch.read(report)
            spent, compiling = [*spent, seconds], compiling + first
    except (RuntimeError, ValueError) as error:
        return about | {"failed": str(error)[:200]}
    cost = method_cost(solver)
    return about | {
        "seconds": min(spent), "compile_seconds": compiling,
        "steps": int(report.steps), "relative_error": float(report.relative_error),
        "flops": cost.products * 2.0 * inputs**2 * outputs + cost.inverses * INVERSE * inputs**3,
        "peak_bytes": peak_bytes(),
    }  # fmt: skip


def measure_grid(side: int, order: int) -> dict[str, Any]:
    """`STEPS` steps of Doge-ADMM in float32 on a square grid, certificates included."""
    say(f"grid {side} x {side}, order {order}")
    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(0, 4, (8, 8)), np.ones((side // 8, side // 8)))
    y = (truth + rng.standard_normal(truth.shape)).astype(np.float32)
    graph, penalty = so.Graph.grid(truth.shape), so.L1(1.0)

    def run(steps: int) -> tuple[float, so.Solution]:
        start = time.perf_counter()
        found = so.trend_filter(y, graph, penalty, order, "doge", tol=1e-30, max_steps=steps)
        jax.block_until_ready(found.value)
        return time.perf_counter() - start, found

    try:
        run(10)
        # The difference excludes the fixed cost of a fit: copies to the device and the start.
        (short, _), (long, found) = run(10), run(10 + STEPS)
    except (RuntimeError, ValueError) as error:
        return {"side": side, "order": order, "failed": str(error)[:200]}
    each = (long - short) / (int(found.steps) - 10)
    rows = 2 if order == 0 else 1
    return {
        "side": side, "order": order, "steps": int(found.steps), "seconds_per_step": each, "seconds_fit": long,
        "moved": 4 * side**2 * (NODE_PASSES + EDGE_PASSES * rows), "gap": float(found.gap), "peak_bytes": peak_bytes(),
    }  # fmt: skip


def measure_run(name: str) -> dict[str, Any]:
    """A whole run on SmolLM2-135M: seconds by kind of work, without compilation."""
    say(f"run, {name}")
    recipe = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        report = prune_model(bundled_model(), Path(folder) / "out", recipe)
    return {
        "recipe": name, "windows": f"{recipe.windows} x {recipe.seqlen}",
        "seconds": {kind: getattr(report, field) for kind, field in KINDS.items()},
        "whole_seconds": report.seconds, "compile_seconds": report.compile_seconds, "peak_bytes": peak_bytes(),
    }  # fmt: skip


def peak_bytes() -> int | None:
    """The peak of the device's memory so far, None if the device does not report it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    main()
