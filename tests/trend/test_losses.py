"""Counts, labels and outliers: facts about the fits, and the answers of independent solvers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from scipy.special import xlogy

import sparseopt as so
from sparseopt.core.problem import iterate as iterate_module
from sparseopt.core.solvers.loss_admm import LossAdmm
from tests.core import conic
from tests.programs import forget
from tests.tiers import often
from tests.trend.problems import GRAPHS, exact_fit, of_block, two_parts

LOSSES = {
    "poisson": so.scalar.Poisson(),
    "logistic": so.scalar.Logistic(),
    "squared_hinge": so.scalar.SquaredHinge(),
    "huber": so.scalar.Huber(0.8),
    "absolute": so.scalar.Absolute(),
    "quantile": so.scalar.Quantile(0.9),
}
WEIGHTS = {"poisson": 0.8, "logistic": 0.15, "squared_hinge": 0.3, "huber": 0.4, "absolute": 0.3, "quantile": 0.1}


def observations(rng, name, n):
    """Data with a fit in every component."""
    if name == "poisson":
        return rng.poisson(rng.choice([0.5, 6.0], n)) + 1.0 * (np.arange(n) % 5 == 0)
    if name in ("logistic", "squared_hinge"):
        y = rng.integers(0, 2, n).astype(float)
        y[:2], y[6:8] = (0, 1), (0, 1)
        if name == "squared_hinge":
            return 2 * y - 1
        y[2:5] = (0.25, 0.9, 0.004)  # proportions
        return y
    return 2 * rng.standard_normal(n) + 15 * (rng.random(n) < 0.1)


def node_values(name, b, y):
    """f and its derivative, written anew."""
    if name == "poisson":
        return np.exp(b) - y * b + xlogy(y, y) - y, np.exp(b) - y
    if name == "logistic":
        return np.logaddexp(0, b) - y * b + xlogy(y, y) + xlogy(1 - y, 1 - y), 1 / (1 + np.exp(-b)) - y
    if name == "squared_hinge":
        lack = np.maximum(1 - y * b, 0)
        return lack**2 / 2, -y * lack
    r = b - y
    if name == "quantile":
        return np.where(r > 0, 0.1 * r, -0.9 * r), np.where(r > 0, 0.1, -0.9)
    if name == "huber":
        return np.where(abs(r) <= 0.8, r * r / 2, 0.8 * abs(r) - 0.32), np.clip(r, -0.8, 0.8)
    return abs(r), np.sign(r)


def objective(name, b, y, graph, weight, order, w=1.0):
    b = np.asarray(b, float)
    return np.sum(w * node_values(name, b, y)[0]) + weight * np.abs(graph.matrix(order + 1) @ b).sum()


TERMS = {
    "poisson": conic.poisson,
    "logistic": conic.logistic,
    "squared_hinge": conic.squared_hinge,
    "huber": conic.huber(0.8),
    "absolute": conic.slopes(-1.0, 1.0),
    "quantile": conic.slopes(-0.9, 0.1),
}


def independent(name, y, graph, weight, order, w=None):
    """The least objective, by Clarabel."""
    w = np.ones(graph.num_nodes) if w is None else w
    form = conic.Conic(graph.num_nodes)
    TERMS[name](form, sparse.eye_array(graph.num_nodes, format="csr"), y, w)
    conic.absolute(form, graph.matrix(order + 1), weight)
    entropy = np.sum(w * (xlogy(y, y) + xlogy(1 - y, 1 - y))) if name == "logistic" else 0.0
    return form.least() + entropy


def status(solution):
    return so.Status(int(solution.status))


def two_components(rng):
    """A chain of 6 and a triangle with a tail."""
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8), (6, 8), (8, 9)]
    return so.Graph.from_edges(edges, 10)


CASES = [
    ("poisson", two_components, 0, "doge", 1),
    ("poisson", GRAPHS["chain"], 2, "admm", None),
    ("logistic", GRAPHS["grid"], 1, "admm", None),
    ("logistic", GRAPHS["weighted"], 1, "doge", 1),
    ("squared_hinge", GRAPHS["chain"], 1, "admm", None),
    ("huber", GRAPHS["weighted"], 2, "doge", 3),
    ("absolute", two_components, 0, "admm", None),
    ("absolute", GRAPHS["random"], 1, "doge", 2),
    ("quantile", GRAPHS["chain"], 0, "admm", None),
]
QUICK = [CASES[i] for i in (0, 2, 4, 6, 8)]


@pytest.mark.parametrize(("name", "kind", "order", "method", "block"), often(CASES, *QUICK))
def test_fits_agree_with_an_independent_solver_and_the_gap_bounds_what_they_lack(rng, name, kind, order, method, block):
    graph, loss, weight = kind(rng), LOSSES[name], WEIGHTS[name]
    y, w = observations(rng, name, graph.num_nodes), rng.uniform(0.5, 2, graph.num_nodes)
    best = independent(name, y, graph, weight, order, w)

    def fit(level, **keywords):
        return so.trend_filter(
            y, graph, so.L1(level), order, of_block(method, block), node_weights=w, loss=loss, **keywords
        )

    found = fit(weight, tol=1e-7)
    assert status(found) is so.Status.CONVERGED
    reached = objective(name, found.value, y, graph, weight, order, w)
    assert float(found.objective) == pytest.approx(reached, rel=1e-9)
    # No point of any solver lies below the certificate's bound, and the independent one is good enough to be a test.
    assert reached <= best * (1 + 1.001e-7)
    assert best <= reached * (1 + 2e-5)

    for steps in (5, 10, 20, 40, 80, 400):
        early = fit(weight, tol=1e-15, max_steps=steps)
        lacks = objective(name, early.value, y, graph, weight, order, w) / reached - 1
        assert lacks <= float(early.gap) + 2e-7
    assert float(early.gap) < 0.1

    if name in ("poisson", "logistic"):
        # Constants cost nothing, so fitted and observed means agree in every component.
        apart = w * (np.asarray(loss.mean(jnp.asarray(found.value))) - y)
        np.testing.assert_allclose(np.bincount(graph.components, apart), 0, atol=1e-2)

    constant = fit(1e3, tol=1e-7)
    assert status(constant) is so.Status.CONVERGED
    np.testing.assert_allclose(
        constant.value, loss.location(y, w, graph.components)[graph.components], rtol=1e-12, atol=1e-15
    )


@so.pytree
class SquareLoss(so.scalar.Huber):
    """A loss of one's own: the square, which the trend filter otherwise solves by itself."""

    def value(self, x, y):
        return (x - y) ** 2 / 2

    def derivative(self, x, y):
        return x - y

    def prox(self, x, y, step):
        return (x + step * y) / (1 + step)

    def dual_range(self, y):
        return -jnp.inf, jnp.inf

    def slack(self, x, dual, y):
        return (x - y - dual) ** 2 / 2

    def location(self, y, weights, labels):
        return np.bincount(labels, weights * y) / np.bincount(labels, weights)


def test_the_square_by_the_general_solver_is_the_trend_filters_own(rng):
    graph = so.Graph.grid((4, 5))
    y, w = 5 * rng.standard_normal(20), rng.uniform(0.5, 2, 20)
    general, own, wide = (
        so.trend_filter(y, graph, so.L1(0.7), 1, tol=1e-10, node_weights=w, loss=loss)
        for loss in (SquareLoss(), "square", so.scalar.Huber(1e3))
    )
    np.testing.assert_allclose(general.value, exact_fit(y, graph, 0.7, 1, w), atol=1e-3)
    assert float(general.objective) == pytest.approx(float(own.objective), rel=3e-10)
    assert float(wide.objective) == pytest.approx(float(own.objective), rel=3e-10)


def test_the_default_loss_is_the_square(rng):
    y, graph = rng.standard_normal(30), so.Graph.grid((5, 6))
    plain = so.trend_filter(y, graph, so.L1(0.3), 1)
    named = so.trend_filter(y, graph, so.L1(0.3), 1, loss=so.scalar.Squared())
    np.testing.assert_array_equal(plain.value, named.value)
    assert int(plain.steps) == int(named.steps)


# On one grid with node weights, so that the tests below share their compiled programs.
ON_GRID = [
    ("poisson", 0, "doge"),
    ("logistic", 1, "admm"),
    ("huber", 0, "admm"),
    ("absolute", 0, "admm"),
]


@pytest.mark.parametrize(("name", "order", "method"), often(ON_GRID, ON_GRID[0], ON_GRID[2]))
def test_missing_nodes_have_no_say(rng, name, order, method):
    graph, weight = so.Graph.grid((4, 5)), WEIGHTS[name]
    y, w = observations(rng, name, 20), rng.uniform(0.5, 2, 20)
    w[[3, 12]] = 0
    best = independent(name, y, graph, weight, order, w)
    y[[3, 12]] = np.nan
    found = so.trend_filter(
        y, graph, so.L1(weight), order, method, tol=1e-6, node_weights=w, missing="nan", loss=LOSSES[name]
    )
    assert status(found) is so.Status.CONVERGED
    reached = objective(name, found.value, np.where(np.isnan(y), 0, y), graph, weight, order, w)
    assert best * (1 - 2e-5) <= reached <= best * (1 + 1.01e-6)


def test_rates_far_below_one_have_their_own_range_at_missing_nodes():
    """On a chain at order 0 a missing node only joins its neighbours, so leaving it out is the same problem."""
    rng = np.random.default_rng(0)
    rate, exposure = np.where(np.arange(60) < 30, 2e-3, 6e-3), rng.integers(500, 3000, 60).astype(float)
    y, seen = rng.poisson(rate * exposure) / exposure, rng.random(60) >= 0.4
    options = {"loss": "poisson", "tol": 1e-8}
    whole = so.trend_filter(y, so.Graph.chain(60), so.L1(2.0), node_weights=exposure * seen, **options)
    left = so.trend_filter(y[seen], so.Graph.chain(seen.sum()), so.L1(2.0), node_weights=exposure[seen], **options)
    assert 0 <= float(whole.gap) <= 1e-8
    assert float(whole.objective) == pytest.approx(float(left.objective), rel=1e-7)


@pytest.mark.parametrize("name", ["huber", "absolute"])
def test_a_shift_of_the_data_shifts_the_fit_and_a_far_outlier_may_move_further(rng, name):
    graph, w = so.Graph.grid((4, 5)), rng.uniform(0.5, 2, 20)
    w[11] = 1  # so that its four edges, at .31 each, hold it against its loss
    y = observations(rng, name, 20)
    y[11] = 40
    further = y.copy()
    further[11] = 400

    def fit(y, tol):
        return so.trend_filter(y, graph, so.L1(0.31), 0, "admm", tol=tol, node_weights=w, loss=LOSSES[name])

    plain, shifted, moved = fit(y, 1e-9), fit(y + 100, 1e-9), fit(further, 1e-10)
    assert float(shifted.objective) == pytest.approx(float(plain.objective), rel=3e-9)
    # The loss of the outlier grows by its slope; nothing else changes.
    slope = w[11] * float(getattr(LOSSES[name], "delta", 1.0))
    assert float(moved.objective) - slope * 360 == pytest.approx(float(plain.objective), rel=1e-6)
    if name == "huber":
        np.testing.assert_allclose(shifted.value - 100, plain.value, atol=1e-2)
        np.testing.assert_allclose(moved.value, plain.value, atol=1e-2)


def test_swapping_the_labels_swaps_the_sign(rng):
    graph, y, w = so.Graph.grid((4, 5)), observations(rng, "logistic", 20), rng.uniform(0.5, 2, 20)
    first, second = (
        so.trend_filter(labels, graph, so.L1(0.1), 1, "admm", tol=1e-9, node_weights=w, loss="logistic").value
        for labels in (y, 1 - y)
    )
    np.testing.assert_allclose(second, -first, atol=1e-3)


def test_a_quantile_leaves_its_share_of_the_observations_below_the_fit(rng):
    graph, y = so.Graph.chain(40), rng.standard_normal(40)
    loss = so.scalar.Quantile(0.9)
    constant = so.trend_filter(y, graph, so.L1(1e4), 0, "admm", tol=1e-8, loss=loss)
    assert status(constant) is so.Status.CONVERGED
    assert np.ptp(constant.value) == 0
    assert np.mean(y <= constant.value[0]) == 0.9
    assert np.quantile(y, 0.9, method="inverted_cdf") == constant.value[0]
    # So does every fit: the penalty does not see constants, so the subgradients of the loss sum to 0.
    found = so.trend_filter(y, graph, so.L1(0.05), 0, "admm", tol=1e-8, loss=loss)
    assert np.mean(y < np.asarray(found.value) - 1e-6) <= 0.9 <= np.mean(y <= np.asarray(found.value) + 1e-6)


def test_a_part_of_one_label_is_fitted_at_margin_1_and_has_no_say(rng):
    # Its dual is 0, an end of the conjugate's domain: a rounding error of a warm start or of cosines must not matter.
    graph = so.Graph.from_edges([(i, i + 1) for i in range(19) if i != 9], 20)
    mixed, w = observations(rng, "squared_hinge", 20), rng.uniform(0.5, 2, 20)
    pure = np.where(np.arange(20) < 10, mixed, 1)

    def fit(y, **keywords):
        return so.trend_filter(
            y, graph, so.L1(0.3), 1, "admm", tol=1e-7, node_weights=w, loss="squared_hinge", **keywords
        )

    apart = fit(mixed)
    for found in (fit(pure), fit(pure, start=apart)):
        assert status(found) is so.Status.CONVERGED
        np.testing.assert_array_equal(found.value[10:], 1)
        assert float(found.objective) == pytest.approx(
            objective("squared_hinge", apart.value[:10], mixed[:10], so.Graph.chain(10, ends="graph"), 0.3, 1, w[:10]),
            rel=2e-7,
        )
    labels = np.stack([np.ones(20), mixed], axis=1)
    grid = so.trend_filter(labels, so.Graph.grid((4, 5)), so.L1(0.3), 1, "doge", loss="squared_hinge")
    assert status(grid) is so.Status.CONVERGED
    np.testing.assert_array_equal(grid.value[:, 0], 1)


@pytest.mark.thorough
def test_relabelling_the_nodes_relabels_the_answer(rng):
    ring = np.arange(20)
    edges = np.concatenate([np.stack([ring, (ring + reach) % 20], axis=1) for reach in (1, 3)])
    graph, y, place = so.Graph.from_edges(edges, 20), observations(rng, "poisson", 20), rng.permutation(20)
    moved = so.Graph.from_edges(place[edges][rng.permutation(40)][:, ::-1], 20)
    relabelled = np.empty(20)
    relabelled[place] = y
    first = so.trend_filter(y, graph, so.L1(0.5), 0, tol=1e-9, loss="poisson").value
    second = so.trend_filter(relabelled, moved, so.L1(0.5), 0, tol=1e-9, loss="poisson").value
    np.testing.assert_allclose(second[place], first, atol=1e-3)


@pytest.mark.thorough
def test_channels_are_solved_together_and_apart(rng):
    graph = so.Graph.grid((4, 5))
    y = np.stack([observations(rng, "poisson", 20) for _ in range(3)], axis=1)

    def fit(y, penalty, tol):
        return so.trend_filter(y, graph, penalty, 0, "doge", tol=tol, loss="poisson")

    together = fit(y, so.L1(0.8), 1e-7)
    assert together.value.shape == (20, 3)
    apart = sum(float(fit(column, so.L1(0.8), 1e-7).objective) for column in y.T)
    assert float(together.objective) == pytest.approx(apart, rel=3e-7)
    coupled = fit(y, so.GroupL2(0.8), 1e-5)
    assert status(coupled) is so.Status.CONVERGED
    assert float(coupled.objective) <= float(together.objective) * (1 + 2e-5)


@pytest.mark.parametrize("name", ["poisson", "huber"])
def test_nonconvex_penalties_end_at_a_stationary_point_without_a_certificate(rng, name):
    graph = so.Graph.chain(40)
    half = np.arange(40) >= 20
    y = {
        # Without a count of 0: it may run off to minus infinity where a penalty that levels off holds it.
        "poisson": 1 + rng.poisson(np.where(half, 20.0, 2.0)),
        "huber": 10 * half + rng.standard_normal(40),
    }[name].astype(float)
    found = so.trend_filter(y, graph, so.MCP(WEIGHTS[name], 3.0), 0, tol=1e-6, loss=LOSSES[name])
    assert status(found) is so.Status.STATIONARY
    assert np.isnan(found.gap)
    # Stationary: the loss's derivative is in balance with that of the penalty, flow by flow along the chain.
    b, slope = np.asarray(found.value), node_values(name, np.asarray(found.value), y)[1]
    rows, flow = -np.diff(b), np.cumsum(-slope)[:-1]
    jumps = abs(rows) > 1e-3
    expected = np.sign(rows) * np.maximum(WEIGHTS[name] - abs(rows) / 3, 0)
    np.testing.assert_allclose(flow[jumps], expected[jumps], atol=1e-3)
    assert 0 < jumps.sum() < len(jumps)
    assert np.all(abs(flow) <= WEIGHTS[name] + 1e-3)


@pytest.mark.thorough
def test_a_warm_start_is_quicker_and_the_history_shows_every_check(rng):
    graph, y = so.Graph.grid((8, 8)), rng.poisson(3.0, 64)

    def fit(**keywords):
        return so.trend_filter(
            y, graph, so.L1(0.9), 1, "admm", tol=1e-7, max_steps=5000, loss="poisson", history=True, **keywords
        )

    cold = fit()
    assert int(fit(start=cold).steps) < int(cold.steps) / 2
    steps = int(cold.steps)
    assert np.all(np.isfinite(np.asarray(cold.history.gap)[4:steps:5]))
    for name in ("rho", "sigma"):
        assert np.all(np.asarray(cold.history.extra[name])[4:steps:5] > 0)
    with pytest.raises(ValueError, match="whose dual has the shape"):
        so.trend_filter(
            y[:8],
            so.Graph.chain(8),
            so.L1(0.9),
            1,
            loss="poisson",
            start=dataclasses.replace(cold, value=cold.value[:8]),
        )


@pytest.mark.parametrize("name", ["poisson", "huber", "absolute"])
def test_exact_answers_need_no_step(name):
    link = np.log if name == "poisson" else np.asarray
    found = so.trend_filter(np.full(12, 3.0), so.Graph.grid((3, 4)), so.L1(1.0), 1, loss=name)
    np.testing.assert_allclose(found.value, link(np.full(12, 3.0)), rtol=1e-15)
    assert (int(found.steps), float(found.gap), float(found.objective)) == (0, 0, 0)
    y = np.arange(1.0, 5.0)
    for graph, weight in ((so.Graph.chain(4), 0.0), (so.Graph.from_edges([], 4), 1.0)):
        np.testing.assert_allclose(so.trend_filter(y, graph, so.L1(weight), loss=name).value, link(y), rtol=1e-15)


def test_a_component_without_a_finite_fit_is_named(rng):
    graph = two_parts(rng)
    y = np.arange(11.0)
    y[6:10] = 0
    for order in (0, 1):
        with pytest.raises(
            ValueError, match=r"component of node 6 \(4 nodes\) has no positive count.*-inf.*\(1 such\)"
        ):
            so.trend_filter(y, graph, so.L1(1.0), order, loss="poisson")
    with pytest.raises(ValueError, match=r"node 10 has only one of the labels.*\+inf.*\(1 such\)"):
        so.trend_filter(np.array([0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1]), graph, so.L1(1.0), loss="logistic")
    with pytest.raises(ValueError, match=r"node 0 has no positive count.*raise the penalty's weight"):
        so.trend_filter(np.arange(4.0), so.Graph.chain(4), so.L1(0.0), loss="poisson")
    both = np.stack([np.ones(4), np.zeros(4)], axis=1)
    with pytest.raises(ValueError, match=r"component of node 0 .* in channel 1 has no positive count"):
        so.trend_filter(both, so.Graph.chain(4), so.L1(1.0), loss="poisson")
    # A positive count without weight is no observation.
    with pytest.raises(ValueError, match="no positive count"):
        so.trend_filter(np.array([0, 0, 5.0]), so.Graph.chain(3), so.L1(1.0), node_weights=[1, 1, 0], loss="poisson")


@pytest.mark.parametrize(
    ("y", "loss", "match"),
    [
        ([1.0, 2, -3, -4], "poisson", r"takes counts, finite and not negative, given -3 at node 2 \(2 such\)"),
        ([0.0, 1, 2, 1], "logistic", r"takes labels 0 or 1 or proportions between them, given 2 at node 2 \(1 such\)"),
        ([-0.5, 1, 0, 1], "logistic", "given -0.5 at node 0"),
        ([1.0, np.inf, 0, 0], "poisson", "1 infinite values"),
        ([1.0, 0, -1, 1], "squared_hinge", r"takes labels -1 or 1, given 0 at node 1 \(1 such\)"),
        ([1.0, 2, 3, 4], so.scalar.Quantile(0.0), "level between 0 and 1, both excluded.*given 0.0"),
        ([1.0, 2, 3, 4], so.scalar.Quantile(1.0), "level between 0 and 1"),
        ([1.0, 2, 3, 4], so.scalar.Quantile(np.nan), "level between 0 and 1"),
        ([1.0, 2, 3, 4], so.scalar.Huber(0.0), "positive, finite delta.*given 0.0"),
        ([1.0, 2, 3, 4], so.scalar.Huber(-1.0), "positive, finite delta"),
        ([1.0, 2, 3, 4], so.scalar.Huber(np.nan), "positive, finite delta"),
        ([1.0, 2, 3, 4], "cauchy", "unknown loss 'cauchy'; known are square, poisson, logistic, squared_hinge, huber"),
    ],
)
def test_bad_input_is_named(y, loss, match):
    with pytest.raises(ValueError, match=match):
        so.trend_filter(np.array(y), so.Graph.chain(4), so.L1(1.0), loss=loss)


def test_bad_input_is_named_in_pictures_and_other_arguments():
    picture = np.ones((2, 3, 2))
    picture[1, 2, 1] = -1
    with pytest.raises(ValueError, match=r"given -1 at node 5, pixel \(1, 2\), channel 1"):
        so.trend_filter(picture, so.Graph.grid((2, 3)), so.L1(1.0), loss="poisson")
    with pytest.raises(TypeError, match="a loss is a name or an object"):
        so.trend_filter(np.ones(4), so.Graph.chain(4), so.L1(1.0), loss=so.scalar.Poisson)
    with pytest.raises(ValueError, match="solves the square loss only"):
        so.trend_filter(np.arange(4.0), so.Graph.chain(4), so.L1(1.0), method="fast_admm", loss="huber")
    with pytest.raises(ValueError, match="not defined at missing nodes"):
        so.trend_filter(np.array([1, np.nan, 2]), so.Graph.chain(3), so.L1(0.0), missing="nan", loss="absolute")


def test_float32_reaches_a_tolerance_of_its_own(rng):
    graph, w = so.Graph.grid((4, 5)), rng.uniform(0.5, 2, 20)
    y = observations(rng, "huber", 20)
    found, sharp = (
        so.trend_filter(y.astype(kind), graph, so.L1(0.4), 0, "admm", tol=tol, node_weights=w, loss=LOSSES["huber"])
        for kind, tol in ((np.float32, 1e-4), (np.float64, 1e-7))
    )
    assert status(found) is so.Status.CONVERGED
    assert found.value.dtype == np.float32
    assert objective("huber", found.value, y, graph, 0.4, 0, w) <= 1.00011 * float(sharp.objective)


def test_one_compile_for_all_data_weights_and_deltas(traces_of):
    seen = traces_of(LossAdmm)
    forget(iterate_module._iterate)
    graph = so.Graph.grid((7, 9))
    for loss in ("poisson", so.scalar.Huber(0.5)):
        before = len(seen)
        for seed in range(3):
            y = np.random.default_rng(seed).poisson(3.0, 63)
            loss = so.scalar.Huber(0.5 + seed) if isinstance(loss, so.scalar.Huber) else loss
            so.trend_filter(y, graph, so.L1(0.5 + seed), 1, "doge", tol=1e-3, max_steps=50 + seed, loss=loss)
        assert len(seen) == before + 1
