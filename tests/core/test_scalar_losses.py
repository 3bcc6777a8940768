"""Facts that hold for every scalar loss: one list for all tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import wrightomega

import sparseopt as so
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.residuals import weighted_quantiles
from sparseopt.core.losses.scalar import ScalarLoss, wright_omega
from tests.jitted import Jitted

CASES = {
    "Poisson": (so.scalar.Poisson(), [0.0, 1.0, 7.0, 400.0]),
    "logistic": (so.scalar.Logistic(), [0.0, 0.3, 1.0]),
    "squared hinge": (so.scalar.SquaredHinge(), [-1.0, 1.0]),
    "Huber": (so.scalar.Huber(0.7), [-2.0, 0.0, 3.0]),
    "absolute": (so.scalar.Absolute(), [-2.0, 0.0, 3.0]),
    "quantile": (so.scalar.Quantile(0.9), [-2.0, 0.0, 3.0]),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    loss, observations = request.param
    return Jitted(loss, host=("wrong", "location", "curvature", "span", "refuses")), observations


pytestmark = pytest.mark.usefixtures("double")


def pairs(observations, reach=8.0, count=161, kind=np.float64):
    x, y = np.meshgrid(np.linspace(-reach, reach, count), observations)
    return x.ravel().astype(kind), y.ravel().astype(kind)


def finite_range(loss, y, reach):
    """The conjugate's domain for every y, cut at `reach` from its finite end where it has but one."""
    low, high = (np.broadcast_to(np.asarray(end, float), y.shape) for end in loss.dual_range(y))
    return np.where(np.isfinite(low), low, high - reach), np.where(np.isfinite(high), high, low + reach)


def duals(loss, y, count=41):
    """Points of the conjugate's domain, finite ends included, for every y."""
    low, high = finite_range(loss, y, 25)
    return low + np.linspace(0, 1, count)[:, None] * (high - low)


def test_the_least_value_is_zero_and_no_value_is_negative(case):
    loss, observations = case
    assert isinstance(loss.tree, ScalarLoss)
    assert loss.value(*pairs(observations, 40, 4001)).min() >= 0
    for observed in observations:
        found = minimize_scalar(lambda u, y=observed: float(loss.value(np.asarray(u), y)), bounds=(-40, 40))
        assert found.fun == pytest.approx(0, abs=1e-5)


def test_the_derivative_is_that_of_the_value_and_continuous_where_the_loss_is_smooth(case):
    loss, observations = case
    x, y = pairs(observations, count=160)  # no x is an observation, where the absolute loss has a kink
    slope = jax.jit(jax.vmap(jax.grad(loss.tree.value)))(x, y)
    np.testing.assert_allclose(loss.derivative(x, y), slope, rtol=1e-9, atol=1e-12)
    x, y = pairs(observations)  # -8, -7.9, ..., so every kink is near one of them
    jump = np.abs(loss.derivative(x + 1e-9, y) - loss.derivative(x - 1e-9, y)) / (1 + np.abs(loss.derivative(x, y)))
    assert (jump.max() < 1e-6) == loss.smooth


@pytest.mark.parametrize("step", [1e-8, 1.0, 1e6])
def test_no_point_beats_the_prox_which_solves_its_optimality_condition(case, step):
    loss, observations = case
    x, y = pairs(observations)
    np.testing.assert_allclose(loss.prox(x, y, 0.0), x, rtol=1e-15)
    u = loss.prox(x, y, step)
    others = u + np.concatenate([np.linspace(-3, 3, 601), [-1e-6, 1e-6]])[:, None]
    reached, costs = (0.5 * (v - x) ** 2 / step + loss.value(v, y) for v in (u, others))
    assert np.max(reached - costs.min(axis=0)) <= 1e-9
    # Moreau: (x - u) / step is a subgradient at u, so it and u are a Fenchel-Young pair.
    dual = (x - u) / step
    low, high = loss.dual_range(y)
    rounding = 1e-14 * (1 + np.abs(x)) / step + 1e-12
    assert np.all((dual >= low - rounding) & (dual <= high + rounding))
    # A step of 1e-8 loses half the digits of `dual`.
    np.testing.assert_allclose(loss.slack(u, np.clip(dual, low, high), y), 0, atol=1e-6 if step < 1e-6 else 1e-9)


def test_an_array_has_one_step_an_entry(case):
    loss, observations = case
    x, y = pairs(observations, count=21)
    steps = np.geomspace(1e-3, 1e3, x.size)
    apart = jax.jit(jax.vmap(loss.tree.prox))(x, y, steps)
    np.testing.assert_allclose(loss.prox(x, y, steps), apart, rtol=1e-12, atol=1e-14)


def test_fenchel_young(case):
    # slack = f(x) + f*(s) - s x for one f*, so slack(x) - f(x) + s x must not depend on x; its least value is 0.
    loss, observations = case
    for observed in observations:
        x = np.linspace(-30, 30, 6001)
        y = np.full(x.shape, observed)
        dual = duals(loss, y[:1])
        slack, value = loss.slack(x, dual, y), loss.value(x, y)
        assert slack.min() >= 0
        conjugate, near = slack - value + dual * x, np.abs(x) <= 8
        spread = np.ptp(conjugate[:, near], axis=1)
        assert np.max(spread / (1 + np.abs(value[near]).max())) <= 1e-12
        # Inside the domain the supremum is attained; the grid is fine to 0.005.
        assert slack.min(axis=1)[1:-1].max() <= 1e-2 * (1 + abs(observed))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_prox_its_gradients_and_slack_survive_the_far_ends(case, kind):
    loss, observations = case
    slopes = jax.jit(jax.grad(lambda x, y, step: jnp.sum(loss.prox(x, y, step)), argnums=(0, 2)))
    x, y = pairs(observations, 300, kind=kind)
    for step in np.array([0, 1e-6, 1, 1e8], kind):
        u = loss.prox(x, y, step)
        assert u.dtype == kind
        assert all(np.isfinite(part).all() for part in (u, *slopes(x, y, step)))
    slack = loss.slack(np.clip(x, -80, 80), duals(loss, y).astype(kind), y)
    assert np.all(np.isfinite(slack) & (slack >= 0))


def test_the_best_constant_beats_its_neighbours_and_host_methods_describe_the_data(rng, case):
    loss, observations = case
    y, weights = rng.choice(observations, 60), rng.uniform(0.2, 2, 60)
    y[:4] = [observations[0], observations[-1]] * 2
    labels = np.arange(60) % 2
    fit = loss.location(y, weights, labels)
    for label in (0, 1):
        mine = labels == label

        def cost(u, mine=mine):
            return np.sum(weights[mine] * loss.value(np.full(mine.sum(), u), y[mine]))

        for other in fit[label] + np.array([-1, -0.1, -1e-4, 1e-4, 0.1, 1]):
            assert cost(fit[label]) <= cost(other) * (1 + 1e-13)
    low, high = loss.span(y)
    assert np.all((low <= fit) & (fit <= high))
    assert (loss.curvature(y, weights, fit[labels]) > 0).all()
    assert not loss.wrong(y).any()
    assert loss.wrong(np.array([np.inf])).all()
    assert not hasattr(loss.tree, "refuses") or loss.refuses() is None


def test_the_loss_of_a_proportion_keeps_its_digits_near_the_best_fit():
    # In float32 log(1 + e^x) - y x and the entropy agree in all digits there.
    y = np.array([0.02, 0.3, 0.5, 0.97], np.float32)
    x = np.log(y / (1 - y)) + np.float32(0.01)
    np.testing.assert_allclose(Jitted(so.scalar.Logistic()).value(x, y), y * (1 - y) * 1e-4 / 2, rtol=0.02)


def test_wright_omega_agrees_with_scipy():
    z = np.concatenate([np.linspace(-600, 50, 3001), np.geomspace(50, 1e8, 200)])
    np.testing.assert_allclose(jax.jit(wright_omega)(z), wrightomega(z), rtol=1e-13)


@pytest.mark.parametrize("level", [1e-3, 0.5, 1 - 1e-12])
def test_weighted_quantiles_divide_the_weights(rng, level):
    labels, y, weights = rng.integers(0, 5, 200), rng.standard_normal(200), rng.uniform(0, 1, 200)
    for label, quantile in enumerate(weighted_quantiles(y, weights, labels, level)):
        mine = labels == label
        mass = weights[mine].sum()
        assert weights[mine & (y < quantile)].sum() < level * mass + 1e-12
        assert weights[mine & (y > quantile)].sum() <= (1 - level) * mass + 1e-12


def test_a_component_of_one_label_has_a_fit_of_margin_1():
    y, labels = np.array([1.0, 1, -1, -1, -1, 1]), np.array([0, 0, 1, 1, 2, 2])
    weights = np.array([1.0, 2, 1, 2, 1, 3])
    np.testing.assert_array_equal(so.scalar.SquaredHinge().location(y, weights, labels), [1, -1, 0.5])


def test_the_feasible_share_is_the_largest(rng, case):
    loss, observations = case
    y = rng.choice(observations, 50)
    weights = np.where(np.arange(50) == 7, 0, rng.uniform(0.5, 2, 50))
    node_loss = Jitted(DataLoss(loss.tree, None, *map(jnp.asarray, (y, weights, -9.0, 9.0))))
    low, high = loss.dual_range(y)
    anchor = -weights * np.mean(finite_range(loss, y, 2), axis=0)
    for size in (1e-3, 1.0, 100.0):
        q = anchor + size * rng.standard_normal(50)

        def inside(share, q=q):
            slope = -(anchor + share * (q - anchor)) / np.where(weights > 0, weights, 1)
            return np.all((weights == 0) | ((slope >= low) & (slope <= high)))

        share = float(node_loss.feasible_share(q, anchor))
        assert inside(share)
        assert share == 1 or not inside(share * (1 + 1e-12))
        assert float(node_loss.slack(rng.uniform(-5, 5, 50), anchor + share * (q - anchor))) >= 0
