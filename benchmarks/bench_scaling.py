"""Strong and weak scaling of both solvers over processes and virtual devices on this machine, or their speed on one
accelerator.

    python benchmarks/bench_scaling.py [--only machine,grid,layer,block] [--repeats 3] [--device [--record FILE]]

Layouts: one process per core, joined by gloo, with one XLA thread each; one process with one thread (the baseline of
every ratio), with one thread per core, and with virtual devices. On grids also processes that work on their parts at
the same time without exchange: the best that the memory bandwidth allows. Processes are not pinned, since the thread
that waits for an exchange would block the one that serves it. The layouts of a comparison run in turn and are repeated;
the fastest run of each counts. Prints one JSON line per layout.

With --device larger tasks run on a GPU or TPU in this process: layers in the shapes of a 7B Llama, and grids. `flops`
are the operations that a layer takes, `moved` the bytes that a step on a grid must move at least, beside the device's
rates. A task that fails has the reason.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Recorder, emit, environment, options, say, selection, timed

GRID_STEPS = 100
# Solves, of which the first one compiles.
RUNS = 4
# An inverse of n x n, in operations over n³.
INVERSE = 6
# Arrays that a step of Doge-ADMM on a grid must read or write at least once. Nodes: x and the memory m, read and
# written, and y, read. Edges, two per node: the dual and its prox point, read, written, and read by the divergence.
NODE_PASSES, EDGE_PASSES = 5, 3


def main() -> None:
    """Run the selected comparisons, or be one of the processes of a measurement."""
    parser = options(__doc__)
    selection(parser, "--only", WORK)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="the first task of each comparison, for a trial")
    parser.add_argument("--device", action="store_true", help="on a GPU or TPU; with --small also on a CPU")
    parser.add_argument("--record", type=Path, help="lines of the device are also added to this file")
    parser.add_argument("--worker", type=json.loads, help="for its own processes: a task")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if given.worker:
        work(given.worker)
    elif given.device:
        on_device(given.only, Recorder(given.record), given.small)
    elif cores < 2:
        sys.exit("SKIPPED: bench-scaling needs two cores or more")
    else:
        emit("versions", **environment())
        for name in given.only:
            for task in MEASURED[name][: 1 if given.small else None]:
                compare(name, task, cores, given.repeats)


def on_device(names: list[str], recorder: Recorder, small: bool) -> None:
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu" and not small:
        sys.exit("SKIPPED: bench-gpu needs a GPU or TPU, and JAX finds none (pip install 'jax[cuda13]')")
    alone = {"processes": 1, "index": 0, "alone": False, "devices": None}
    tasks = [(name, task) for name in names for task in ON_DEVICE.get(name, [])[: 1 if small else None]]
    for name, task in tasks:
        given = task | ({key: SMALL[key] for key in task if key in SMALL} if small else {})
        say(f"{name} {given}")
        try:
            found: dict[str, Any] = WORK[name](given | alone)
        except (RuntimeError, ValueError) as error:
            found = {"failed": str(error)[:200]}
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        recorder.emit(name, device=device.device_kind, **given, **found, peak_bytes=peak)


def compare(name: str, task: dict[str, Any], cores: int, repeats: int) -> None:
    """All layouts of one task in turn, `repeats` times."""
    # Processes, threads of each, virtual devices, and whether the processes exchange nothing.
    layouts = {
        "1 process, 1 thread": (1, 1, 1, False),
        f"{cores} processes, 1 thread each": (cores, 1, 1, False),
        f"1 process, {cores} threads": (1, cores, 1, False),
        f"1 process, {cores} threads, 8 virtual devices": (1, cores, 8, False),
    }
    if name == "grid" and not task.get("weak"):
        layouts[f"{cores} processes, 1 thread each, without exchange"] = (cores, 1, 1, True)
    found: dict[str, list[dict[str, float]]] = {layout: [] for layout in layouts}
    for _ in range(repeats):
        for layout, how in layouts.items():
            say(f"{name} {task}: {layout}")
            grown = task | {"grow": how[0]} if task.get("weak") else task
            found[layout].append(measure({"kind": name, **grown}, *how))
    best = {layout: min(runs, key=lambda run: run["seconds"]) for layout, runs in found.items()}
    base = best["1 process, 1 thread"]["seconds"]
    for layout, run in best.items():
        slowest = max(each["seconds"] for each in found[layout])
        shown = {"repeats": repeats, "slowest_seconds": slowest, "speedup": base / run["seconds"]}
        emit(name, **task, layout=layout, **run, **shown)


def measure(task: dict[str, Any], processes: int, threads: int, virtual: int, alone: bool) -> dict[str, float]:
    """One layout: start its processes and read the output of the first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={virtual}" if virtual > 1 else ""
    machine = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": str(threads)}
    started = []
    for index in range(processes):
        own = {"processes": processes, "index": index, "port": port, "virtual": virtual, "alone": alone}
        command = [sys.executable, __file__, "--worker", json.dumps(task | own)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=machine))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"a process of {task} failed with {[process.returncode for process in started]}")
    return json.loads(outputs[0].strip().splitlines()[-1])


def work(task: dict[str, Any]) -> None:
    from sparseopt.system import processes

    if task["processes"] > 1:
        processes.join(f"127.0.0.1:{task['port']}", task["processes"], task["index"])
    task["devices"] = "all" if task["processes"] * task["virtual"] > 1 and not task["alone"] else None
    with processes.together():
        found = WORK[task["kind"]](task)
    if processes.is_first():
        print(json.dumps(found), flush=True)


def together(call: Callable[[], Any]) -> Any:
    """Make a call that all processes begin at the same time: its seconds and result."""
    from sparseopt.system import processes

    processes.barrier("start")
    return timed(call)


def grid(task: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step of Doge-ADMM on a square grid with noisy patches, including certificates."""
    import sparseopt as so

    rows = task["side"] * task.get("grow", 1) // (task["processes"] if task["alone"] else 1)
    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(0, 4, (rows // 64, task["side"] // 64)), np.ones((64, 64)))
    y = (truth + rng.standard_normal(truth.shape)).astype(task["dtype"])
    fit = partial(so.trend_filter, y, so.Graph.grid(truth.shape), so.L1(1.0), task["order"], "doge", tol=1e-30)

    def run(steps: int) -> tuple[float, int]:
        seconds, _, found = together(partial(fit, max_steps=steps, devices=task["devices"]))
        return seconds, int(found.steps)

    run(10)
    # The difference excludes the fixed cost of a fit.
    (short, few), (long, many) = min(run(10), run(10)), run(10 + GRID_STEPS)
    moved = truth.size * np.dtype(task["dtype"]).itemsize * (NODE_PASSES + EDGE_PASSES * (2 - min(task["order"], 1)))
    return {"seconds": (long - short) / (many - few), "steps": many, "moved": moved}


def gram_of_tokens(rng: Any, inputs: int) -> Any:
    tokens = rng.standard_normal((2 * inputs, inputs)).astype(np.float32)
    tokens += tokens[:, :8] @ rng.standard_normal((8, inputs)).astype(np.float32)
    return tokens.T @ tokens


def job_of(rng: Any, outputs: int, inputs: int, gram: Any, dtype: str = "float32") -> Any:
    """A random layer to prune to 50 %."""
    from sparseopt.layers.patterns import parse_pattern
    from sparseopt.layers.problem import LayerJob

    weight = (rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.dtype(dtype))
    return LayerJob(weight, gram, None, parse_pattern("unstructured", 0.5, weight.shape))


def layer(task: dict[str, Any]) -> dict[str, float]:
    """Seconds of a layer solve at 50 %."""
    from sparseopt.core.base.mesh import device_line
    from sparseopt.layers.methods import find_method, method_cost
    from sparseopt.layers.split import solve_within_memory

    outputs, inputs = task["outputs"] * task.get("grow", 1), task["inputs"]
    rng = np.random.default_rng(0)
    job = job_of(rng, outputs, inputs, gram_of_tokens(rng, inputs), task.get("dtype", "float32"))
    method, mesh = find_method(task["method"], task["preset"]), device_line(task["devices"])
    runs = [together(partial(solve_within_memory, job, method, mesh)) for _ in range(RUNS)]
    report = runs[-1].result
    cost = method_cost(method)
    flops = cost.products * 2.0 * inputs**2 * outputs + cost.inverses * INVERSE * inputs**3
    seconds, error = min(run.seconds for run in runs), float(report.relative_error)
    return {"seconds": seconds, "steps": int(report.steps), "error": error, "flops": flops}


def block(task: dict[str, Any]) -> dict[str, float]:
    """Seconds of solving the seven linears of a Llama block at 50 %, with their steps and errors."""
    from sparseopt.core.base.mesh import device_line, over, put
    from sparseopt.layers.methods import find_method
    from sparseopt.layers.side_by_side import LayerTask, solve_block

    width, wide, narrow = task["width"], task["wide"], task["narrow"]
    shapes = {"q": (width, width), "k": (narrow, width), "v": (narrow, width), "o": (width, width)}
    shapes |= {"gate": (wide, width), "up": (wide, width), "down": (width, wide)}
    rng, mesh = np.random.default_rng(0), device_line(task["devices"])

    def gram(inputs: int) -> Any:
        found = gram_of_tokens(rng, inputs)
        return found if mesh is None else put(found, over(mesh, None))

    attention, mixed, mlp, hidden = gram(width), gram(width), gram(width), gram(wide)
    grams = {"q": attention, "k": attention, "v": attention, "o": mixed, "gate": mlp, "up": mlp, "down": hidden}
    jobs = {name: job_of(rng, *shape, grams[name]) for name, shape in shapes.items()}
    linears = [LayerTask(name, shape, shape, partial(jobs.__getitem__, name)) for name, shape in shapes.items()]
    method = find_method(task["method"], task["preset"])
    runs = [together(lambda: [solved.report for solved in solve_block(linears, method, mesh)]) for _ in range(RUNS)]
    reports = runs[-1].result
    seconds, steps = min(run.seconds for run in runs), sum(int(report.steps) for report in reports)
    error = sum(float(report.relative_error) for report in reports) / len(reports)
    return {"seconds": seconds, "steps": steps, "error": error}


def machine(task: dict[str, Any]) -> dict[str, float]:
    """The speed of each process while all of them work: copies, products and exchanges."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from sparseopt.core.base.mesh import AXIS, device_line, over, put

    def quickest(call: Callable[[], Any]) -> float:
        timed(call)
        return min(together(call).seconds for _ in range(5))

    side, dtype = task.get("square", 1024), task.get("products", "float32")
    values, square = jnp.zeros(1 << 25, jnp.float32), jnp.full((side, side), 0.5, dtype)
    # Many turns in one buffer: allocating a new one would cost more than the copy.
    add = jax.jit(lambda x: jnp.sum(jax.lax.fori_loop(0, 20, lambda _, y: y + 1, x)))
    product = jax.jit(partial(jnp.matmul, precision=task.get("precision")))
    seconds = quickest(partial(add, values)) / 20
    rate = 2 * side**3 / quickest(partial(product, square, square))
    found = {"seconds": seconds, "bandwidth": 8 * values.size / seconds, "rate": rate}
    mesh = device_line(task["devices"])
    if mesh is None:
        return found

    def repeated(local: Callable[[Any], Any]) -> float:
        def loop(x: Any) -> Any:
            return jax.lax.fori_loop(0, 200, lambda _, y: local(y), x)

        each = PartitionSpec(AXIS)
        whole = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=each, out_specs=each, check_vma=False))
        return quickest(partial(whole, put([[0.5] * 3] * mesh.size, over(mesh)))) / 200

    ring = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]
    return found | {
        "sum_seconds": repeated(lambda y: jax.lax.psum(y, AXIS) / 2),
        "message_seconds": repeated(lambda y: jax.lax.ppermute(y, AXIS, ring) + 1),
    }


WORK: dict[str, Callable[[dict[str, Any]], dict[str, float]]]
WORK = {"machine": machine, "grid": grid, "layer": layer, "block": block}
MEASURED: dict[str, list[dict[str, Any]]] = {
    "machine": [{}],
    "grid": [
        {"side": 2048, "order": 0, "dtype": "float32"},
        {"side": 2048, "order": 1, "dtype": "float32"},
        {"side": 2048, "order": 0, "dtype": "float64"},
        {"side": 1024, "order": 0, "dtype": "float32", "weak": True},
    ],
    "layer": [
        {"outputs": 1536, "inputs": 576, "method": "maiht", "preset": "tuned"},
        {"outputs": 2048, "inputs": 1024, "method": "maiht", "preset": "paper"},
        {"outputs": 1024, "inputs": 1024, "method": "admm", "preset": None},
        {"outputs": 1024, "inputs": 1024, "method": "maiht", "preset": "paper", "weak": True},
    ],
    "block": [
        {"width": 576, "wide": 1536, "narrow": 192, "method": "maiht", "preset": "tuned"},
        {"width": 768, "wide": 2048, "narrow": 768, "method": "admm", "preset": None},
    ],
}
ON_DEVICE: dict[str, list[dict[str, Any]]] = {
    "machine": [
        {"square": 8192, "products": "bfloat16"},
        {"square": 8192, "products": "float32"},
        {"square": 8192, "products": "float32", "precision": "highest"},
    ],
    "layer": [
        {"outputs": outputs, "inputs": inputs, "method": method, "preset": preset, "dtype": "bfloat16"}
        for outputs, inputs in ((4096, 4096), (11008, 4096), (4096, 11008))
        for method, preset in (("maiht", "paper"), ("maiht", "tuned"), ("admm", None), ("sparsegpt", None))
    ],
    "grid": [
        {"side": side, "order": order, "dtype": "float32"} for side in (1024, 2048, 4096, 8192) for order in (0, 1)
    ],
}
# In place of the sizes on a device, for a trial.
SMALL = {"square": 256, "outputs": 96, "inputs": 64, "side": 128}


if __name__ == "__main__":
    main()
