"""A penalty defined outside the package works as its own do; see also the tests of layers and of configs."""

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest

import sparseopt as so
from tests.experiments.toy import CappedL1
from tests.tiers import often


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
