"""First calls: CPU seconds, programs and their compilation, each part in a fresh process without a cache. JSON lines.

    python benchmarks/bench_first_calls.py [--only lasso,chain] [--repeats 3] [--package FOLDER]

Each part is `import sparseopt`, or two calls: the first, and one of the next size. The least CPU seconds of some
processes count. FOLDER has another version of the package, for a comparison.
"""

import argparse
import json
import os
import subprocess
import sys

from common import emit_line

DRAW = "import jax, numpy as np, sparseopt as so; rng = np.random.default_rng(0); normal = rng.standard_normal\n"
LASSO = "so.solve(so.Problem(so.LeastSquares(normal(({0}, {1})), normal({0})), so.L1(1.0)))"
# For each part what is set up, and the calls.
PARTS = {
    "import jax, optax, scipy.sparse": ("", ["import jax, optax, scipy.sparse"]),
    "import sparseopt": ("", ["import sparseopt"]),
    "lasso": (DRAW, [LASSO.format(100, 20), LASSO.format(101, 21)]),
    "operator": (
        DRAW,
        [
            f"so.solve(so.Problem(so.LeastSquares(normal(({n + 80}, {n})), normal({n + 80})), so.L1(1.0), "
            f"np.diff(np.eye({n}), axis=0)))"
            for n in (20, 21)
        ],
    ),
    "chain": (DRAW, [f"so.trend_filter(normal({n}), so.Graph.chain({n}), so.L1(1.0))" for n in (300, 301)]),
    "grid": (DRAW, [f"so.trend_filter(normal(({n}, {n})), so.Graph.grid(({n}, {n})), so.L1(1.0))" for n in (40, 41)]),
}
RUN = """
import json, sys, time
setup, calls = json.loads(sys.argv[1])
programs = []
exec(setup)
if setup:
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: programs.append(seconds) if event.endswith("backend_compile_duration") else None)
found = []
for call in calls:
    programs.clear()
    start = time.process_time()
    exec(f"result = {call}" if setup else call)
    if setup:
        jax.block_until_ready(result.value)
    found.append((time.process_time() - start, len(programs)))
print(json.dumps(found))
"""


def measured(part: str, repeats: int, package: str | None) -> list[tuple[float, int]]:
    """The least CPU seconds of every call of a part, and its programs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, "-c", RUN, json.dumps(PARTS[part])]
    if package:
        environment["PYTHONPATH"] = package
    runs = []
    for _ in range(repeats):
        done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    return [(min(seconds for seconds, _ in calls), calls[0][1]) for calls in zip(*runs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"parts, comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each part")
    parser.add_argument("--package", help="a folder with another version of the package")
    given = parser.parse_args()
    from sparseopt.system.machine import environment

    emit_line("environment", **environment())
    for part in given.only.split(",") if given.only else PARTS:
        for call, (seconds, programs) in zip(
            ("first", "next size"), measured(part, given.repeats, given.package), strict=False
        ):
            emit_line("first call", part=part, call=call, cpu_seconds=seconds, programs=programs)


if __name__ == "__main__":
    main()
