"""Isotropic total variation on grids, and grids with a spacing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.trend.base.layout import layout_of
from tests.core import conic
from tests.tiers import often

WEIGHT = 1.5


def steps(shape, channels=(), noise=0.7):
    """Blocks, all at once or one a channel, with noise."""
    rng = np.random.default_rng(2)
    clean = sum(3 * (np.indices(shape)[axis] > shape[axis] // 3) for axis in range(len(shape)))
    clean = clean.reshape(*shape, *(1 for _ in channels)) * np.linspace(1, 2, *channels or (1,))
    return (clean.reshape(*shape, *channels) + noise * rng.standard_normal((*shape, *channels))).astype(float)


def groups_of(graph, channels):
    """The numbers of the rows of `kron(D, I)` that start at each node: of one channel, or of all."""
    tails = np.repeat(graph.edges.min(axis=1), channels or 1)
    return [np.flatnonzero(tails == node) for node in np.unique(tails)]


def conic_objective(y, graph, coupled, known=None):
    """The least objective, by Clarabel."""
    n, channels = graph.num_nodes, y.size // graph.num_nodes
    mass = np.ones(n) if known is None else known.reshape(-1).astype(float)
    rows = sparse.csr_array(sparse.kron(graph.matrix(1), sparse.eye_array(channels)))
    groups = groups_of(graph, channels)
    if not coupled:
        groups = [group[channel::channels] for group in groups for channel in range(channels)]
    program = conic.Conic(n * channels)
    conic.squares(program, sparse.eye_array(n * channels), y.reshape(-1), np.repeat(mass, channels))
    conic.lengths(program, rows, WEIGHT, groups)
    return program.least()


CASES = [
    ((16, 16), None, (), 0, False),
    ((16, 16), (1.0, 2.5), (), 0, True),
    ((5, 6), None, (2,), 0, False),
    ((5, 6), None, (2,), (0, -1), False),
    ((4, 5, 3), (1.0, 1.0, 2.5), (), 0, False),
]
QUICK = [("doge", *CASES[1]), ("doge", *CASES[2]), ("admm", *CASES[3]), ("admm", *CASES[4])]


@pytest.mark.parametrize(
    ("method", "shape", "spacing", "channels", "axis", "holes"),
    often([(method, *case) for method in ("doge", "admm") for case in CASES], *QUICK),
)
def test_the_optimum_is_that_of_an_independent_conic_solver(shape, spacing, channels, axis, holes, method):
    graph, y = so.Graph.grid(shape, spacing), steps(shape, channels)
    known = np.random.default_rng(0).random(shape) > 0.2 if holes else None
    weights = None if known is None else known.astype(float)
    penalty = so.GroupL2(WEIGHT, axis)
    tol = 1e-7 if holes else 1e-9
    fit = so.trend_filter(y, graph, penalty, 0, method, tol=tol, node_weights=weights).check()
    wanted = conic_objective(y, graph, axis != 0, known)
    assert float(fit.objective) == pytest.approx(wanted, rel=10 * tol)
    assert fit.value.shape == y.shape


def test_a_straight_edge_costs_what_it_costs_l1_and_a_slanted_one_less():
    rows, columns = np.indices((24, 24))
    straight, slanted = 10.0 * (rows > 11), 10.0 * (rows + columns > 23)
    graph, one_entry = so.Graph.grid((24, 24)), []
    for picture in (straight, slanted):
        gradient = layout_of(graph).base(np.float64).difference(jnp.asarray(picture))
        one_entry.append(float(so.GroupL2(1.0, axis=0).value(gradient) / so.L1(1.0).value(gradient)))
    assert one_entry[0] == 1
    assert 0.7 < one_entry[1] < 0.75  # 1 / sqrt(2), but for the nodes at the border


SPACED = so.Graph.grid((4, 5, 3), (1.0, 0.5, 2.0))


def test_spacing_is_that_of_weighted_edges():
    grid, y = SPACED, steps(SPACED.shape)
    edges = so.Graph.from_edges(grid.edges, weights=grid.weights)
    assert sorted(set(grid.weights)) == [0.25, 1.0, 4.0]
    for order in (1, 2, 3):
        rows = grid.matrix(order) @ y.reshape(-1)
        np.testing.assert_allclose(rows, edges.matrix(order) @ y.reshape(-1), atol=1e-12)
        with precision(np.dtype(np.float64)):
            laid = layout_of(grid).difference(order, np.float64).mv(jnp.asarray(y))
            np.testing.assert_allclose(laid, layout_of(grid).rows(rows, order), atol=1e-12)


@pytest.mark.parametrize(("order", "method"), often([(0, "doge"), (1, "admm"), (2, "doge")], (1, "admm")))
def test_a_fit_with_spacing_is_that_on_weighted_edges(order, method):
    grid, y = SPACED, steps(SPACED.shape)
    edges = so.Graph.from_edges(grid.edges, weights=grid.weights)
    fits = [
        so.trend_filter(y.reshape(-1), graph, so.L1(0.4), order, name, tol=1e-9).check()
        for graph, name in ((grid, method), (edges, "doge"))
    ]
    np.testing.assert_allclose(fits[0].value, fits[1].value, atol=1e-3)
    assert float(fits[0].objective) == pytest.approx(float(fits[1].objective), rel=1e-8)


def test_equal_spacing_only_scales_the_weight():
    y = steps((6, 7))
    wide = so.trend_filter(y, so.Graph.grid((6, 7), (2, 2)), so.GroupL2(3.0, axis=0), tol=1e-10)
    plain = so.trend_filter(y, so.Graph.grid((6, 7)), so.GroupL2(1.5, axis=0), tol=1e-10)
    np.testing.assert_allclose(wide.value, plain.value, atol=1e-4)


@pytest.mark.thorough
def test_the_planned_solver_takes_it_under_vmap_and_with_derivatives():
    graph, y = so.Graph.grid((6, 7), (1, 2)), steps((6, 7))
    with precision(np.dtype(np.float64)):
        solver = so.trend_solver(graph, 0)
        values = lambda y, weight: solver(y, so.GroupL2(weight, axis=0), tol=1e-12).value  # noqa: E731
        batch = jax.vmap(values, (0, None))(jnp.stack([y, 2 * y]), 1.0)
        alone = so.trend_filter(2 * y, graph, so.GroupL2(1.0, axis=0), tol=1e-12)
        np.testing.assert_allclose(batch[1], alone.value, atol=1e-5)
        along, step = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape)), 1e-4
        slope = jax.jvp(lambda y: values(y, 1.0), (jnp.asarray(y),), (along,))[1]
        apart = (values(y + step * along, 1.0) - values(y - step * along, 1.0)) / (2 * step)
        assert jnp.linalg.norm(slope - apart) < 0.02 * jnp.linalg.norm(apart)


def test_total_variation_takes_it():
    graph, y = so.Graph.grid((6, 7)), steps((6, 7))
    with precision(np.dtype(np.float64)):
        penalty = so.TotalVariation(graph, 2.0, axis=0, tol=1e-10, dtype=np.float64)
        wanted = so.trend_filter(y, graph, so.GroupL2(1.0, axis=0), tol=1e-10)
        np.testing.assert_allclose(penalty.prox(jnp.asarray(y), 0.5), wanted.value, atol=1e-4)
        loss = float(np.sum((y - np.asarray(wanted.value)) ** 2)) / 2
        value = float(penalty.value(jnp.asarray(wanted.value)))
        assert loss + value / 2 == pytest.approx(float(wanted.objective))


@pytest.mark.thorough
def test_degrees_of_freedom_of_a_path_are_the_divergence_along_random_signs():
    graph, y = so.Graph.grid((12, 12)), steps((12, 12))
    path = so.trend.trend_path(y, graph, so.GroupL2(1.0, axis=0), weights=[100.0, 1.0, 1e-3], tol=1e-9)
    rng = np.random.default_rng(0)
    signs = np.stack([rng.choice([-1.0, 1.0], (144,)) for _ in range(14)]).reshape(14, 12, 12)
    with precision(np.dtype(np.float64)):
        solver = so.trend_solver(graph, 0)
        fit = lambda y: solver(y, so.GroupL2(1.0, axis=0), tol=1e-12).value  # noqa: E731
        slopes = jax.vmap(lambda along: jax.jvp(fit, (jnp.asarray(y),), (along,))[1])(jnp.asarray(signs))
    of_means, middle, all_free = path.degrees_of_freedom
    assert of_means == pytest.approx(np.mean(signs.sum(axis=(1, 2)) ** 2) / 144, abs=1e-6)
    assert middle == pytest.approx(float(np.sum(signs * np.asarray(slopes))) / 14, rel=0.05)
    assert all_free == pytest.approx(144, rel=0.02)


REFUSED = {
    "takes order 0 and a grid of 2 or 3 axes, given order 1": {"order": 1},
    "takes order 0 and a grid of 2 or 3 axes, given order 0 on Graph.chain": {"graph": so.Graph.chain(30)},
    "by axis -1, the differences of a node along the axes of a grid by axis 0": {"penalty": so.GroupL2(1.0, axis=1)},
    "this one has none: use L1, or on a grid axis 0": {"penalty": so.GroupL2(1.0, axis=(0, -1))},
    "taken alone here": {"penalty": {-1: so.L1(1.0), 0: so.GroupL2(1.0, axis=0)}},
    'for isotropic total variation use "doge"': {"method": "doge_groups"},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_it_does_not_take_is_refused(text):
    given = {"graph": so.Graph.grid((5, 6)), "penalty": so.GroupL2(1.0, axis=0)} | REFUSED[text]
    with pytest.raises(ValueError, match=r"isotropic|couples|taken alone") as error:
        so.trend_filter(np.arange(30.0), **given)
    assert text in str(error.value)


@pytest.mark.parametrize("spacing", [(1, 2, 3), (1, 0), (1, np.nan), 2.0, (1, -1), ("a", 1)])
def test_a_spacing_that_does_not_fit_is_refused(spacing):
    with pytest.raises(ValueError, match="one positive number for each of its 2 axes"):
        so.Graph.grid((4, 5), spacing)
    with pytest.raises(ValueError, match="a grid of one axis takes no spacing"):
        so.Graph.grid((4,), (2.0,))
