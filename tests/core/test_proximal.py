"""Penalties in an optax chain: the end of training, compared with `solve` and the optimality conditions."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparseopt as so
from tests.jitted import Jitted

WEIGHT, SIZE = 0.1, 20
SEPARABLE = {
    "L0": so.L0(0.05),
    "L1": so.L1(0.3),
    "MCP": so.MCP(0.4, 3.0),
    "SCAD": so.SCAD(0.4),
    "Support": so.Support(np.arange(6) % 2 == 0),
}
both = pytest.mark.parametrize("make", [so.proximal, so.proximal_adam], ids=["proximal", "proximal_adam"])


@pytest.fixture(scope="module")
def least_squares():
    """`1/2 <x - c, H (x - c)>` with columns of unequal size, so that Adam's metric is far from a multiple of I."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((60, SIZE)) * rng.uniform(0.3, 2, SIZE)
    truth = np.zeros(SIZE)
    truth[:5] = [2, -1.5, 1, -3, 0.8]
    y = rows @ truth + 0.1 * rng.standard_normal(60)
    hessian = rows.T @ rows / 60
    center = np.linalg.solve(hessian, rows.T @ y / 60)
    return so.Quadratic(jnp.asarray(hessian, jnp.float32), jnp.asarray(center, jnp.float32))


@pytest.fixture(scope="module")
def lasso(least_squares):
    problem = so.Problem(least_squares, so.L1(WEIGHT))
    return so.solve(problem, so.ProximalGradient(), jnp.zeros(SIZE), tol=1e-7, max_steps=20_000).value


def train(tx, loss, steps, x=None):
    """From 0, or from x."""

    @jax.jit
    def run(x):
        def body(_, carry):
            x, state = carry
            updates, state = tx.update(loss.gradient(x), state, x)
            return optax.apply_updates(x, updates), state

        return jax.lax.fori_loop(0, steps, body, (x, tx.init(x)))[0]

    return run(jnp.zeros(SIZE) if x is None else x)


def sgd(penalty, rate, step=None, **options):
    """The prox after a step of gradient descent."""
    return optax.chain(optax.sgd(rate, **options), so.proximal(penalty, rate if step is None else step))


def step_of(loss):
    return 0.9 / float(jnp.linalg.eigvalsh(loss.hessian)[-1])


def kkt_violation(loss, x, weight):
    """How far x is from `0 in gradient + weight * subgradient of ||x||_1`, relative to the weight."""
    gradient, x = np.asarray(loss.gradient(x)), np.asarray(x)
    off = np.maximum(np.abs(gradient) - weight, 0)
    return np.where(x == 0, off, np.abs(gradient + weight * np.sign(x))).max() / weight


@partial(jax.jit, static_argnums=0)
def apply_once(tx, params, updates):
    return optax.apply_updates(params, tx.update(updates, tx.init(params), params)[0])


def test_sgd_with_l1_ends_at_the_minimiser_that_solve_finds(least_squares, lasso):
    x = train(sgd(so.L1(WEIGHT), step_of(least_squares)), least_squares, 3000)
    np.testing.assert_allclose(x, lasso, atol=1e-5)
    assert ((x == 0) == (lasso == 0)).all()
    assert 0 < int((x != 0).sum()) < SIZE


def test_with_momentum_the_step_is_the_rate_over_one_minus_the_momentum(least_squares):
    rate = 0.1 * step_of(least_squares)

    def violation(step):
        x = train(sgd(so.L1(WEIGHT), rate, step, momentum=0.9), least_squares, 3000)
        return kkt_violation(least_squares, x, WEIGHT)

    assert violation(rate / (1 - 0.9)) < 1e-3
    assert violation(rate) == pytest.approx(0.9, abs=0.01)  # it solves the problem of weight (1 - 0.9) * WEIGHT


def test_adam_needs_the_prox_in_its_own_metric(least_squares, lasso):
    rate = optax.cosine_decay_schedule(0.05, 4000)
    naive = train(optax.chain(optax.adam(rate), so.proximal(so.L1(WEIGHT), rate)), least_squares, 4000)
    scaled = train(so.proximal_adam(so.L1(WEIGHT), rate), least_squares, 4000)
    assert kkt_violation(least_squares, scaled, WEIGHT) < 1e-3
    np.testing.assert_allclose(scaled, lasso, atol=1e-4)
    assert ((scaled == 0) == (lasso == 0)).all()
    assert kkt_violation(least_squares, naive, WEIGHT) > 0.5
    assert np.abs(naive - lasso).max() > 0.05


@pytest.mark.parametrize("penalty", [so.L0(0.05), so.SCAD(0.1), so.TopK(5)], ids=["L0", "SCAD", "k"])
def test_adam_with_an_unbiased_penalty_ends_at_the_least_squares_fit_of_the_true_support(penalty, least_squares):
    x = train(so.proximal_adam(penalty, 0.01, eps=0.1), least_squares, 5000, least_squares.center)
    fit = jnp.linalg.solve(least_squares.hessian[:5, :5], (least_squares.hessian @ least_squares.center)[:5])
    np.testing.assert_allclose(x, np.append(fit, np.zeros(SIZE - 5)), atol=1e-4)


def test_a_small_eps_lets_l0_delete_fitted_entries(least_squares):
    x = train(so.proximal_adam(so.L0(0.05), 0.01, eps=1e-8), least_squares, 20_000, least_squares.center)
    assert int((x != 0).sum()) < 5


def test_without_a_penalty_it_is_adam(least_squares):
    ours, adam = (
        train(tx, least_squares, 50, jnp.ones(SIZE)) for tx in (so.proximal_adam(so.L1(0.0), 0.01), optax.adam(0.01))
    )
    np.testing.assert_allclose(ours, adam, rtol=1e-5, atol=1e-6)


# One update of Adam, against the scalar problems that it stands for.


def drawn(rng):
    """A point and its gradient; where Adam's first step, of m = g and v = g², leads; and its metric."""
    p, g = rng.standard_normal(6), rng.uniform(0.05, 5, 6) * rng.choice([-1, 1], 6)
    curvature = np.abs(g) + 0.05
    return jnp.float32(p), jnp.float32(g), p - 0.3 * g / curvature, curvature / 0.3


def once(penalty, p, g):
    return np.asarray(apply_once(so.proximal_adam(penalty, 0.3, eps=0.05), p, g))


@pytest.mark.parametrize("penalty", SEPARABLE.values(), ids=SEPARABLE.keys())
def test_the_scaled_prox_of_a_separable_penalty_beats_a_grid_entry_by_entry(penalty, rng):
    assert penalty.separable
    p, g, z, d = drawn(rng)
    u = once(penalty, p, g)

    @jax.jit
    @jax.vmap
    def cost(u):
        return 0.5 * jnp.sum(d * (u - z) ** 2) + penalty.value(u)

    others = np.tile(u, (6, 4001, 1))
    for i in range(6):
        others[i, :, i] = np.linspace(-4, 4, 4001)
    best = float(cost(jnp.float32(u[None]))[0])
    assert float(cost(jnp.float32(others.reshape(-1, 6))).min()) >= best - 1e-5
    x, steps = jnp.float32(rng.standard_normal(6)), np.float32(rng.uniform(0.05, 6, 6))
    alone = [Jitted(penalty).prox(x, step)[i] for i, step in enumerate(steps)]
    np.testing.assert_allclose(Jitted(penalty).prox(x, steps), alone, rtol=1e-6)


def test_the_scaled_projection_beats_every_other_support(rng):
    penalty = so.NM(1, 2)
    supports = np.array(list(itertools.product([0, 1], repeat=6)))
    allowed = supports[np.asarray(jax.vmap(penalty.value)(jnp.float32(supports))) == 0]
    jitted = jax.jit(lambda p, g: apply_once(so.proximal_adam(penalty, 0.3, eps=0.05), p, g))
    different = 0
    for _ in range(30):
        p, g, z, d = drawn(rng)
        u = np.asarray(jitted(p, g))
        best = (0.5 * np.sum(d * (allowed * z - z) ** 2, axis=1)).min()
        assert 0.5 * np.sum(d * (u - z) ** 2) == pytest.approx(best, rel=1e-4)
        different += ((u != 0) != np.asarray(penalty.prox(jnp.float32(z), 1.0) != 0)).any()
    assert different  # the plain projection often keeps another support


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.second = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))[:, 0]


def kernels(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


@pytest.mark.parametrize(
    "tx",
    [
        so.proximal_adam(so.L1(0.006), 0.01, mask=kernels),
        optax.chain(optax.sgd(0.2), so.proximal(so.GroupL2(0.01), 0.2, mask=kernels)),
    ],
    ids=["L1 and Adam", "GroupL2 and SGD"],
)
def test_a_flax_model_drops_the_inputs_that_do_not_matter(tx):
    # All corners of a cube, without noise: the other inputs are exactly uncorrelated with the target of variance 2.
    x = jnp.float32(list(itertools.product([-1, 1], repeat=8)))
    y = x[:, 0] + x[:, 1] * x[:, 2]

    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    @nnx.jit
    def fit(model, optimizer):
        def body(_, carry):
            model, optimizer = carry
            optimizer.update(model, nnx.grad(loss)(model))
            return carry

        nnx.fori_loop(0, 2000, body, (model, optimizer))

    model = Mlp(nnx.Rngs(0))
    fit(model, nnx.Optimizer(model, tx, wrt=nnx.Param))
    kernel = np.asarray(model.first.kernel[...])
    assert np.flatnonzero((kernel != 0).any(axis=1)).tolist() == [0, 1, 2]
    assert (np.abs(kernel[:3]).max(axis=1) > 0.5).all()
    assert float(loss(model)) < 1e-3


PARAMS = {"kernel": jnp.array([[0.3, -2.0], [1.5, 0.2]]), "bias": jnp.array([0.1, -0.2])}


@pytest.mark.parametrize("mask", [{"kernel": True, "bias": False}, kernels], ids=["tree", "function"])
def test_a_mask_leaves_biases_and_leaves_without_values_alone(mask):
    updates = jax.tree.map(lambda p: jnp.full_like(p, 0.1), PARAMS)
    after = apply_once(so.proximal(so.L1(1.0), 0.5, mask=mask), PARAMS, updates)
    assert after["kernel"].tolist() == [[0, pytest.approx(-1.4)], [pytest.approx(1.1), 0]]
    assert (after["bias"] == PARAMS["bias"] + 0.1).all()
    scaled = apply_once(so.proximal_adam(so.L1(1.0), 0.05, mask=mask), PARAMS, updates)
    plain = apply_once(optax.adam(0.05), PARAMS, updates)
    assert scaled["kernel"][0, 0] == 0
    np.testing.assert_allclose(scaled["bias"], plain["bias"], rtol=1e-6)
    without = {"kernel": PARAMS["kernel"], "bias": None}
    for make in (so.proximal, so.proximal_adam):
        assert apply_once(make(so.L1(1.0), 0.1), without, without)["bias"] is None


@both
def test_the_step_follows_its_schedule(make):
    schedule = optax.linear_schedule(0.1, 0.4, 3)
    tx, x, u = make(so.L1(1.0), schedule), jnp.array([5.0]), jnp.array([-0.5])
    state = tx.init(x)
    for count in range(3):
        expected, _ = make(so.L1(1.0), float(schedule(count))).update(u, state, x)
        updates, state = tx.update(u, state, x)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)
    assert int(state.count) == 3


@pytest.mark.parametrize(
    ("dtype", "update_dtype"), [(jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float32), (jnp.float32, jnp.bfloat16)]
)
def test_zeros_are_exact_in_every_precision(dtype, update_dtype, rng):
    p = jnp.asarray(rng.standard_normal(4096) * 10.0 ** rng.uniform(-6, 4, 4096), dtype)
    u = jnp.asarray(rng.standard_normal(4096), update_dtype)
    tx = so.proximal(so.L0(0.5), 1.0)
    updates, _ = jax.jit(tx.update)(u, tx.init(p), p)
    landed = optax.apply_updates(p, updates)
    wanted = Jitted(so.L0(0.5)).prox(np.asarray(p, np.float32) + np.asarray(u, np.float32), 1.0)
    assert updates.dtype == jnp.result_type(p, u)
    assert landed.dtype == dtype
    assert 0 < int((wanted == 0).sum()) < 4096
    assert ((landed == 0) == (wanted == 0)).all()


def test_adam_keeps_float32_moments_for_bfloat16_parameters():
    p = jnp.ones(4, jnp.bfloat16)
    tx = so.proximal_adam(so.L1(2.0), 0.5)
    updates, state = tx.update(p, tx.init(p), p)
    assert state.nu.dtype == state.mu.dtype == jnp.float32
    assert updates.dtype == jnp.bfloat16
    assert (optax.apply_updates(p, updates) == 0).all()


@both
def test_the_penalty_may_be_an_argument_of_jit_and_vmap(make, rng):
    def once(penalty, step, p, u):
        return apply_once(make(penalty, step), p, u)

    p, u = jnp.float32(rng.standard_normal((2, 7)))
    compiled, weights = jax.jit(once), jnp.array([0.1, 0.5, 2.0])
    answers = [compiled(so.L1(float(weight)), 0.3, p, u) for weight in weights]
    together = jax.vmap(lambda w: once(so.L1(w), 0.3, p, u))(weights)
    np.testing.assert_allclose(together, jnp.stack(answers), rtol=1e-6, atol=1e-7)
    assert len({int((answer == 0).sum()) for answer in answers}) > 1
