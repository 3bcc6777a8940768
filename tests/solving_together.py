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

LAYERS = ("maiht", "admm", "beside the second", "beside the first")


def solved(devices: str | None) -> dict[str, np.ndarray]:
    """Answers by name, each with its steps: a layer by two methods, two side by side, fits on a grid and on a graph."""
    rng, mesh = np.random.default_rng(5), device_line(devices)
    tokens = rng.standard_normal((96, 24)).astype(np.float32)
    tokens += 0.3 * tokens[:, :4] @ rng.standard_normal((4, 24)).astype(np.float32)
    weight = rng.standard_normal((38, 24)).astype(np.float32)
    job = LayerJob(weight, tokens.T @ tokens, None, parse_pattern("unstructured", 0.5, weight.shape))
    others = [dataclasses.replace(job, weight=weight[::-1]), dataclasses.replace(job, weight=-2 * weight**3)]
    maiht = find_method("maiht", "paper")
    reports = [solve_within_memory(job, method, mesh) for method in (maiht, find_method("admm"))]
    alone = [solve_within_memory(other, maiht) for other in others] if mesh is None else None
    reports += alone or solve_side_by_side(others, maiht, mesh)
    found = {}
    for name, report in zip(LAYERS, reports, strict=True):
        found |= {name: np.asarray(report.weight), f"{name} steps": np.asarray(int(report.steps))}
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
