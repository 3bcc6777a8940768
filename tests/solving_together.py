"""The problems of `test_solving_together.py`, solved on one device, or by all processes that run this script."""

import dataclasses
import sys

import numpy as np

import sparseopt as so
from sparseopt.core.base.mesh import device_line
from sparseopt.layers.methods import find_method
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import LayerJob
from sparseopt.layers.side_by_side import solve_side_by_side
from sparseopt.layers.split import solve_within_memory
from sparseopt.system import processes

METHODS = (("maiht", "paper"), ("admm", None))
BESIDE = ("beside the second", "beside the first")


def solved(devices: str | None) -> dict[str, np.ndarray]:
    """Answers by name: a layer by two methods, fits on a grid and on a graph, each with its steps."""
    rng, found = np.random.default_rng(5), {}
    tokens = rng.standard_normal((96, 24)).astype(np.float32)
    tokens += 0.3 * tokens[:, :4] @ rng.standard_normal((4, 24)).astype(np.float32)
    weight = rng.standard_normal((38, 24)).astype(np.float32)
    job = LayerJob(weight, tokens.T @ tokens, None, parse_pattern("unstructured", 0.5, weight.shape))
    for method, preset in METHODS:
        report = solve_within_memory(job, find_method(method, preset), device_line(devices))
        found |= {method: np.asarray(report.weight), f"{method} steps": np.asarray(int(report.steps))}
    others = [dataclasses.replace(job, weight=job.weight[::-1]), dataclasses.replace(job, weight=-2 * job.weight**3)]
    solver, mesh = find_method("maiht", "paper"), device_line(devices)
    if mesh is None:
        side_by_side = [solve_within_memory(other, solver) for other in others]
    else:
        side_by_side = solve_side_by_side(others, solver, mesh)
    for name, one in zip(BESIDE, side_by_side, strict=True):
        found |= {name: np.asarray(one.weight), f"{name} steps": np.asarray(int(one.steps))}
    nodes = 60
    ends = np.unique(np.sort(rng.integers(0, nodes, (140, 2)), axis=1), axis=0)
    network = so.Graph.from_edges(ends[ends[:, 0] < ends[:, 1]], nodes)
    for name, graph in (("grid", so.Graph.grid((18, 7))), ("graph", network)):
        y = np.repeat(rng.standard_normal(graph.num_nodes // 6), 6) * 3 + rng.standard_normal(graph.num_nodes)
        fit = so.trend_filter(y, graph, so.L1(0.7), 1, "doge", tol=1e-8, devices=devices)
        found |= {name: np.asarray(fit.value), f"{name} steps": np.asarray(int(fit.steps))}
        found |= {f"{name} gap": np.asarray(float(fit.gap)), f"{name} objective": np.asarray(float(fit.objective))}
    return found


if __name__ == "__main__":
    processes.join(timeout=120)
    with processes.together():
        answers = solved("all")
        if processes.is_first():
            np.savez(sys.argv[1], **answers)
