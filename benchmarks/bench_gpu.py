"""Speed of the two solvers on an accelerator, compared with its speed in plain matrix products and copies.

    python benchmarks/bench_gpu.py [--layers 4096x4096 11008x4096 4096x11008] [--sides 1024 2048 4096 8192]
                                   [--record FILE] [--any]

Prints one JSON line per measurement, and appends it to the record: the matmul rates and bandwidth of the device; layer
solves in the shapes of a 7B Llama with the operations that they take; steps of Doge-ADMM on grids, with the least
number of bytes that a step must move. It is skipped without an accelerator, with a message; --any runs it on the CPU,
where only small sizes are useful.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Recorder, least_of, options, say, timed

import sparseopt as so
from sparseopt.core.base.dense import HIGHEST
from sparseopt.layers.methods import find_method, method_cost
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import LayerJob, layer_solver

METHODS = (("maiht", "paper"), ("maiht", "tuned"), ("admm", None), ("sparsegpt", None))
PRECISIONS: dict[str, tuple[Any, Any]] = {
    "bfloat16": (jnp.bfloat16, None),
    "float32 default": (jnp.float32, None),
    "float32 highest": (jnp.float32, HIGHEST),
}
STEPS = 200
# An inverse of n x n, in operations over n³.
INVERSE = 6
# Arrays that a step of Doge-ADMM on a grid must read or write at least once. Nodes: x and the memory m, read and
# written, and y, read. Edges, two per node: the dual and its prox point, read, written, and read by the divergence.
NODE_PASSES, EDGE_PASSES = 5, 3


def main() -> None:
    """Run the selected measurements."""
    parser = options(__doc__)
    parser.add_argument("--layers", nargs="*", default=["4096x4096", "11008x4096", "4096x11008"], help="out x in")
    parser.add_argument("--sides", nargs="*", type=int, default=[1024, 2048, 4096, 8192], help="of square grids")
    parser.add_argument("--square", type=int, default=8192, help="side of the matrices for the matmul rate")
    parser.add_argument("--record", type=Path, help="lines are added to this file")
    parser.add_argument("--any", action="store_true", help="run on a CPU, too")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu" and not arguments.any:
        sys.exit("SKIPPED: bench-gpu needs a GPU or TPU, and JAX finds none (pip install 'jax[cuda13]')")
    emit, side = Recorder(arguments.record).emit, arguments.square
    emit("device", kind=device.device_kind, platform=device.platform)
    rates = {name: rate_of(side, *precision) for name, precision in PRECISIONS.items()}
    for name, rate in rates.items():
        emit("matmul", dtype=name, side=side, tflops=rate / 1e12)
    bandwidth = measure_bandwidth(side**2 * 2)
    emit("bandwidth", gigabytes_per_second=bandwidth / 1e9)
    for outputs, inputs in (map(int, shape.split("x")) for shape in arguments.layers):
        for method, preset in METHODS:
            about = {"outputs": outputs, "inputs": inputs, "method": method, "preset": preset}
            found = tried(about, lambda: measure_layer(outputs, inputs, method, preset))  # noqa: B023
            emit("layer", **found, rate=rates["float32 highest"])
    for side in arguments.sides:
        for order in (0, 1):
            found = tried({"side": side, "order": order}, lambda: measure_grid(side, order))  # noqa: B023
            emit("grid", **found, bandwidth=bandwidth)


def tried(about: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The fields of a measurement with the peak of the device's memory so far, or why it failed."""
    say(", ".join(map(str, about.values())))
    try:
        found = measure()
    except (RuntimeError, ValueError) as error:
        return about | {"failed": str(error)[:200]}
    return about | found | {"peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}


def rate_of(side: int, dtype: Any, precision: Any) -> float:
    """Operations per second of square matrix products."""
    a = jnp.full((side, side), 0.5, dtype)
    product = jax.jit(partial(jnp.matmul, precision=precision))
    return 2 * side**3 / least_of(partial(product, a, a))


def measure_bandwidth(size: int) -> float:
    """Bytes per second, read and written, of adding a number to a float32 array."""
    values = jnp.zeros(size, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 8 * size / least_of(lambda: add(values))


def measure_layer(outputs: int, inputs: int, method: str, preset: str | None) -> dict[str, Any]:
    """One layer at 50 %: a weight in bfloat16, a Gram matrix in float32 on the device."""
    keys = jax.random.split(jax.random.key(0), 3)
    # Correlated inputs of unequal size, like activations.
    mixing = jax.random.normal(keys[0], (inputs, 64)) / 8
    tokens = jax.random.normal(keys[1], (2 * inputs, inputs)) + jax.random.normal(keys[2], (2 * inputs, 64)) @ mixing.T
    gram = jnp.matmul(tokens.T, tokens, precision=HIGHEST)
    weight = (jax.random.normal(keys[2], (outputs, inputs)) / inputs**0.5).astype(jnp.bfloat16)
    del tokens
    job = LayerJob(weight, gram, None, parse_pattern("unstructured", 0.5, (outputs, inputs)))
    solver = find_method(method, preset)
    first, second = (timed(partial(layer_solver, job, solver)) for _ in range(2))
    cost, report = method_cost(solver), second.result
    return {
        "seconds": second.seconds, "first_call_seconds": first.seconds,
        "steps": int(report.steps), "relative_error": float(report.relative_error),
        "flops": cost.products * 2.0 * inputs**2 * outputs + cost.inverses * INVERSE * inputs**3,
    }  # fmt: skip


def measure_grid(side: int, order: int) -> dict[str, Any]:
    """`STEPS` steps of Doge-ADMM in float32 on a square grid, certificates included."""
    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(0, 4, (8, 8)), np.ones((side // 8, side // 8)))
    y = (truth + rng.standard_normal(truth.shape)).astype(np.float32)
    fit = partial(so.trend_filter, y, so.Graph.grid(truth.shape), so.L1(1.0), order, "doge", tol=1e-30)
    timed(partial(fit, max_steps=10))
    # The difference excludes the fixed cost of a fit: copies to the device and the start.
    short, long = (timed(partial(fit, max_steps=count)) for count in (10, 10 + STEPS))
    found = long.result
    each = (long.seconds - short.seconds) / (int(found.steps) - 10)
    moved = 4 * side**2 * (NODE_PASSES + EDGE_PASSES * (2 if order == 0 else 1))
    return {"steps": int(found.steps), "seconds_per_step": each, "moved": moved, "gap": float(found.gap)}


if __name__ == "__main__":
    main()
