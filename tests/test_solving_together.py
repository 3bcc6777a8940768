"""Two and four real processes, joined by gloo, give the results of one device: mAIHT, ADMM, Doge-ADMM.

Each process runs this file as a script.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.base.mesh import device_line
from sparseopt.layers.methods import find_method
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import LayerJob
from sparseopt.layers.side_by_side import solve_side_by_side
from sparseopt.layers.split import solve_within_memory
from sparseopt.system import processes
from tests.processes import run_scripts

pytestmark = pytest.mark.processes
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


@pytest.fixture(scope="module")
def alone():
    return solved(None)


@pytest.fixture(scope="module", params=[2, 4], ids=["two processes", "four processes"])
def together(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    ended = run_scripts(Path(__file__), request.param, folder, str(folder / "found.npz"))
    assert [process.status for process in ended] == [0] * request.param, ended[0].err
    with np.load(folder / "found.npz") as arrays:
        return {name: arrays[name] for name in arrays}


@pytest.mark.parametrize("method", LAYERS)
def test_layers_have_the_same_support_and_weights_to_rounding(together, alone, method):
    ours, theirs = together[method], alone[method]
    assert np.count_nonzero(ours) == ours.size // 2
    np.testing.assert_array_equal(ours != 0, theirs != 0)
    # Conjugate gradients, which refit after ADMM, let rounding grow with the condition of the Gram.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 if method == "admm" else 1e-5)
    assert together[f"{method} steps"] == alone[f"{method} steps"]


@pytest.mark.parametrize("name", ["grid", "graph"])
def test_fits_have_the_same_steps_certificates_and_values_to_rounding(together, alone, name):
    assert together[f"{name} gap"] <= 1e-8
    assert together[f"{name} steps"] == alone[f"{name} steps"]
    assert together[f"{name} objective"] == pytest.approx(float(alone[f"{name} objective"]), rel=1e-12)
    np.testing.assert_allclose(together[name], alone[name], rtol=0, atol=1e-10)


if __name__ == "__main__":
    processes.join(timeout=120)
    with processes.together():
        answers = solved("all")
        if processes.is_first():
            np.savez(sys.argv[1], **answers)
