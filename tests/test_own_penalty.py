"""A penalty of at most 20 lines, defined outside the package, works wherever a penalty is accepted."""

import inspect
import json

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest

import sparseopt as so
from sparseopt.experiments.config import load_config
from sparseopt.experiments.runs import execute
from tests.experiments.toy import CappedL1
from tests.layers.layers import make_layer
from tests.tiers import often


def test_it_is_short():
    assert len(inspect.getsource(CappedL1).splitlines()) <= 20
    assert isinstance(CappedL1(1.0), so.core.Penalty)


@pytest.mark.parametrize("graph", [so.Graph.grid((12, 9)), so.Graph.from_networkx(nx.cycle_graph(100))], ids=str)
@pytest.mark.parametrize("order", often([0, 1], 1))
def test_in_a_trend_filter_on_a_grid_and_on_a_graph(rng, graph, order):
    y = np.where(np.arange(graph.num_nodes) < graph.num_nodes / 2, 0.0, 8.0) + rng.standard_normal(graph.num_nodes)
    penalty, differences = CappedL1(1.0, cap=2.0), graph.matrix(order + 1)
    found = so.trend_filter(y.reshape(graph.shape or (-1,)), graph, penalty, order, tol=1e-6).check()
    fit = np.ravel(found.value)
    objective = np.sum((fit - y) ** 2) / 2 + penalty.value(differences @ fit)
    assert objective == pytest.approx(float(found.objective), rel=1e-5)
    assert objective < 0.7 * penalty.value(differences @ y)
    assert np.mean(np.abs(differences @ fit) < 1e-4) > 0.4


def test_in_prune_layer(rng):
    weight, gram, _ = make_layer(rng, outputs=24, inputs=24)
    result = so.pruning.prune_layer(weight, gram, 0.5, penalty=CappedL1(1.0))
    assert result.sparsity == 0.5
    assert result.relative_error < so.pruning.prune_layer(weight, gram, 0.5, method="wanda").relative_error


def test_in_an_optax_chain(rng):
    design = rng.standard_normal((80, 20)).astype(np.float32)
    truth = np.zeros(20, np.float32)
    truth[:4] = (3.0, -2.0, 4.0, -5.0)
    target = design @ truth
    rate = 0.3 / np.linalg.norm(design, 2) ** 2 * 80
    optimiser = optax.chain(optax.sgd(rate), so.proximal(CappedL1(0.3), rate))

    @jax.jit
    def update(x, state):
        gradient = jax.grad(lambda v: jnp.mean((design @ v - target) ** 2) / 2)(x)
        updates, state = optimiser.update(gradient, state, x)
        return optax.apply_updates(x, updates), state

    x = jnp.zeros(20)
    state = optimiser.init(x)
    for _ in range(400):
        x, state = update(x, state)
    assert set(np.flatnonzero(x)) == {0, 1, 2, 3}
    np.testing.assert_allclose(x, truth, atol=1e-3)  # no shrinkage beyond the cap


@pytest.mark.thorough
def test_by_its_path_in_a_config(tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text(
        "name: own\ntask: denoise\npicture: {name: camera, size: 24}\nnoise: 20\nrepeats: 1\n"
        "penalty: {name: tests.experiments.toy.CappedL1, weight: 10, cap: 60}\n"
    )
    (run,) = load_config(config, allow_code=True)
    outcome = execute(run, tmp_path / "runs", lambda *_: None)
    assert outcome.error is None
    (record,) = map(json.loads, (outcome.folder / "records.jsonl").read_text().splitlines())
    assert record["mse_after"] < record["mse_before"]
