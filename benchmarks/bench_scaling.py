"""Strong and weak scaling of both solvers over processes and virtual devices on this machine.

    python benchmarks/bench_scaling.py [--only machine,grid,layer,block] [--repeats 3]

Layouts: one process per core, joined by gloo, with one XLA thread each; one process with one thread (the baseline of
every ratio), with one thread per core, and with virtual devices. On grids also processes that work on their parts at
the same time without exchange: the best that the memory bandwidth allows. Processes are not pinned, since the thread
that waits for an exchange would block the one that serves it. The layouts of a comparison run in turn and are repeated;
the fastest run of each counts. Prints one JSON line per layout.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

GRID_STEPS = 100


def main() -> None:
    """Run the selected comparisons, or be one of the processes of a measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(WORK), help=f"comma-separated: {','.join(WORK)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(json.loads(arguments.worker))
        return
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        sys.exit("SKIPPED: bench-scaling needs two cores or more")
    from sparseopt.system.machine import environment

    print(json.dumps({"figure": "versions", **environment()}), flush=True)
    if unknown := set(arguments.only.split(",")) - set(WORK):
        sys.exit(f"unknown {', '.join(unknown)}; known are {', '.join(WORK)}")
    for name in arguments.only.split(","):
        for task in MEASURED[name]:
            compare(name, task, cores, arguments.repeats)


def compare(name: str, task: dict[str, Any], cores: int, repeats: int) -> None:
    """All layouts of one task in turn, `repeats` times."""
    layouts: dict[str, dict[str, Any]] = {
        "1 process, 1 thread": {"processes": 1, "threads": 1},
        f"{cores} processes, 1 thread each": {"processes": cores, "threads": 1},
        f"1 process, {cores} threads": {"processes": 1, "threads": cores},
        f"1 process, {cores} threads, 8 virtual devices": {"processes": 1, "threads": cores, "virtual": 8},
    }
    if name == "grid" and not task.get("weak"):
        apart = f"{cores} processes, 1 thread each, without exchange"
        layouts[apart] = {"processes": cores, "threads": 1, "apart": True}
    found: dict[str, list[dict[str, float]]] = {layout: [] for layout in layouts}
    for _ in range(repeats):
        for layout, how in layouts.items():
            print(f"{time.strftime('%H:%M:%S')} {name} {task}: {layout}", file=sys.stderr, flush=True)
            grown = task | {"grow": how["processes"]} if task.get("weak") else task
            found[layout].append(measure({"kind": name, **grown}, **how))
    best = {layout: min(runs, key=lambda run: run["seconds"]) for layout, runs in found.items() if runs}
    base = best["1 process, 1 thread"]["seconds"]
    for layout, run in best.items():
        line = {"figure": name, **task, "layout": layout, **run, "repeats": repeats}
        spread = [each["seconds"] for each in found[layout]]
        print(json.dumps({**line, "slowest_seconds": max(spread), "speedup": base / run["seconds"]}), flush=True)


def measure(
    task: dict[str, Any], processes: int, threads: int, virtual: int = 1, apart: bool = False
) -> dict[str, float]:
    """One layout: start its processes and read the output of the first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={virtual}" if virtual > 1 else ""
    started = []
    for index in range(processes):
        own = {"processes": processes, "index": index, "port": port, "virtual": virtual, "apart": apart}
        command = [sys.executable, __file__, "--worker", json.dumps(task | own)]
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True,
                env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": str(threads)},
            )
        )  # fmt: skip
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"a process of {task} failed with {[process.returncode for process in started]}")
    return json.loads(outputs[0].strip().splitlines()[-1])


def work(task: dict[str, Any]) -> None:
    """One process of a measurement."""
    from sparseopt.system import processes

    if task["processes"] > 1:
        processes.join(f"127.0.0.1:{task['port']}", task["processes"], task["index"])
    task["devices"] = "all" if task["processes"] * task["virtual"] > 1 and not task["apart"] else None
    with processes.together():
        found = WORK[task["kind"]](task)
    if processes.is_first():
        print(json.dumps(found), flush=True)


def grid(task: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step of Doge-ADMM on a square grid with noisy patches, including certificates."""
    import jax
    import numpy as np

    import sparseopt as so
    from sparseopt.system import processes

    rows = task["side"] * task.get("grow", 1) // (task["processes"] if task["apart"] else 1)
    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(0, 4, (rows // 64, task["side"] // 64)), np.ones((64, 64)))
    y = (truth + rng.standard_normal(truth.shape)).astype(task["dtype"])
    graph, penalty = so.Graph.grid(truth.shape), so.L1(1.0)

    def run(steps: int) -> tuple[float, int]:
        processes.barrier("start")
        start = time.perf_counter()
        found = so.trend_filter(
            y, graph, penalty, task["order"], "doge", tol=1e-30, max_steps=steps, devices=task["devices"]
        )
        jax.block_until_ready(found.value)
        return time.perf_counter() - start, int(found.steps)

    run(10)
    # The difference excludes the fixed cost of a fit.
    (short, few), (long, many) = min(run(10), run(10)), run(10 + GRID_STEPS)
    return {"seconds": (long - short) / (many - few), "fit_seconds": long, "steps": many}


def gram_of_tokens(rng: Any, inputs: int) -> Any:
    """The Gram matrix of tokens with some directions shared by all inputs."""
    import numpy as np

    tokens = rng.standard_normal((2 * inputs, inputs)).astype(np.float32)
    tokens += tokens[:, :8] @ rng.standard_normal((8, inputs)).astype(np.float32)
    return tokens.T @ tokens


def layer(task: dict[str, Any]) -> dict[str, float]:
    """Seconds of a layer solve at 50 %."""
    import numpy as np

    from sparseopt.core.base.mesh import device_line
    from sparseopt.layers.compiled import Stopwatch
    from sparseopt.layers.methods import find_method
    from sparseopt.layers.patterns import parse_pattern
    from sparseopt.layers.problem import LayerJob
    from sparseopt.layers.split import solve_within_memory
    from sparseopt.system import processes

    outputs, inputs = task["outputs"] * task.get("grow", 1), task["inputs"]
    rng = np.random.default_rng(0)
    gram = gram_of_tokens(rng, inputs)
    weight = (rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32)
    job = LayerJob(weight, gram, None, parse_pattern("unstructured", 0.5, weight.shape))
    method, mesh = find_method(task["method"], task["preset"]), device_line(task["devices"])
    found = []
    for _ in range(3):
        processes.barrier("start")
        watch = Stopwatch()
        report = solve_within_memory(job, method, mesh)
        found.append(watch.read(report)[0])
    return {"seconds": min(found), "steps": int(report.steps), "error": float(report.relative_error)}


def block(task: dict[str, Any]) -> dict[str, float]:
    """Seconds of solving the seven linears of a Llama block at 50 %, with their steps and errors."""
    import numpy as np

    from sparseopt.core.base.mesh import device_line, over, put
    from sparseopt.layers.methods import find_method
    from sparseopt.layers.patterns import parse_pattern
    from sparseopt.layers.problem import LayerJob
    from sparseopt.layers.side_by_side import LayerTask, solve_block
    from sparseopt.system import processes

    width, wide, narrow = task["width"], task["wide"], task["narrow"]
    shapes = {"q": (width, width), "k": (narrow, width), "v": (narrow, width), "o": (width, width)}
    shapes |= {"gate": (wide, width), "up": (wide, width), "down": (width, wide)}
    rng, mesh = np.random.default_rng(0), device_line(task["devices"])

    def gram(inputs: int) -> Any:
        found = gram_of_tokens(rng, inputs)
        return found if mesh is None else put(found, over(mesh, None))

    attention, mixed, mlp, hidden = gram(width), gram(width), gram(width), gram(wide)
    grams = {"q": attention, "k": attention, "v": attention, "o": mixed, "gate": mlp, "up": mlp, "down": hidden}

    def linear(name: str) -> LayerTask:
        outputs, inputs = shapes[name]
        weight = (rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32)
        job = LayerJob(weight, grams[name], None, parse_pattern("unstructured", 0.5, weight.shape))
        return LayerTask(name, (outputs, inputs), (outputs, inputs), lambda: job)

    linears, method = [linear(name) for name in shapes], find_method(task["method"], task["preset"])
    found = []
    for _ in range(3):
        processes.barrier("start")
        start = time.perf_counter()
        reports = [solved.report for solved in solve_block(linears, method, mesh)]
        found.append(time.perf_counter() - start)
    return {
        "seconds": min(found),
        "steps": sum(int(report.steps) for report in reports),
        "error": sum(float(report.relative_error) for report in reports) / len(reports),
    }


def machine(task: dict[str, Any]) -> dict[str, float]:
    """The speed of each process while all of them work: copies, products and exchanges."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from sparseopt.core.base.mesh import AXIS, device_line, over, put
    from sparseopt.system import processes

    def quickest(run: Callable[[], Any]) -> float:
        jax.block_until_ready(run())
        found = []
        for _ in range(5):
            processes.barrier("start")
            start = time.perf_counter()
            jax.block_until_ready(run())
            found.append(time.perf_counter() - start)
        return min(found)

    values, square = jnp.zeros(1 << 25, jnp.float32), jnp.full((1024, 1024), 0.5)
    # Many turns in one buffer: allocating a new one would cost more than the copy.
    add = jax.jit(lambda x: jnp.sum(jax.lax.fori_loop(0, 20, lambda _, y: y + 1, x)))
    product = jax.jit(lambda x: x @ x)
    seconds = quickest(lambda: add(values)) / 20
    found = {
        "seconds": seconds,
        "bandwidth": 8 * values.size / seconds,
        "rate": 2**31 / quickest(lambda: product(square)),
    }
    mesh = device_line(task["devices"])
    if mesh is None:
        return found

    def repeated(local: Callable[[Any], Any], times: int, size: int) -> float:
        def loop(x: Any) -> Any:
            return jax.lax.fori_loop(0, times, lambda _, y: local(y), x)

        each = PartitionSpec(AXIS)
        whole = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=each, out_specs=each, check_vma=False))
        x = put([[0.5] * size] * mesh.size, over(mesh))
        return quickest(lambda: whole(x)) / times

    ring = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]
    halves = repeated(lambda y: jax.lax.psum(y, AXIS) / 2, 200, 3)
    passed = repeated(lambda y: jax.lax.ppermute(y, AXIS, ring) + 1, 20, 1 << 20)
    return found | {
        "sum_seconds": halves,
        "message_seconds": repeated(lambda y: jax.lax.ppermute(y, AXIS, ring) + 1, 200, 3),
        "link": 8 * (1 << 20) / passed / 2,
    }


WORK: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "machine": machine,
    "grid": grid,
    "layer": layer,
    "block": block,
}
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


if __name__ == "__main__":
    main()
