"""Facts that hold for every penalty: one list, every test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so

SHAPE = (8, 6)
MASK = np.arange(48).reshape(SHAPE) % 3 != 0
PENALTIES = {
    "L0": so.L0(0.3),
    "L1": so.L1(0.3),
    "TopK": so.TopK(17),
    "NM": so.NM(2, 4),
    "NM along columns": so.NM(1, 3, axis=1),
    "Support": so.Support(MASK),
}


@pytest.fixture(params=PENALTIES.values(), ids=PENALTIES.keys())
def penalty(request):
    return request.param


@pytest.mark.parametrize("step", [0.1, 1.0, 7.0])
def test_no_perturbation_beats_the_prox(penalty, rng, step):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    best = np.asarray(penalty.prox(jnp.asarray(x), step))
    others = [best]
    for _ in range(60):
        moved = best + rng.standard_normal(SHAPE) * rng.choice([1e-3, 0.1, 1.0])
        swapped = x * rng.permuted((best != 0).ravel()).reshape(SHAPE)
        others += [moved, swapped, np.where(best != 0, moved, 0)]

    @jax.jit
    @jax.vmap
    def cost(u):
        return 0.5 * jnp.sum((u - x) ** 2) + step * penalty.value(u)

    costs = np.asarray(cost(jnp.asarray(np.stack(others), jnp.float32)))
    assert np.isfinite(costs[0])
    assert (costs[1:] >= costs[0] - 1e-4).all()


def test_zero_costs_nothing_and_is_a_fixed_point(penalty):
    zero = jnp.zeros(SHAPE)
    assert float(penalty.value(zero)) == 0
    assert (penalty.prox(zero, 1.0) == 0).all()


def test_prox_keeps_shape_and_dtype(penalty, rng):
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(rng.standard_normal(SHAPE), dtype)
        answer = penalty.prox(x, jnp.float32(0.5))
        assert answer.shape == SHAPE
        assert answer.dtype == dtype


def test_penalty_is_a_pytree_that_vmaps_and_satisfies_the_protocol(penalty, rng):
    assert isinstance(penalty, so.Penalty)
    batch = jnp.asarray(rng.standard_normal((3, *SHAPE)), jnp.float32)
    together = jax.vmap(lambda x: penalty.prox(x, 0.5))(batch)
    alone = jnp.stack([penalty.prox(x, 0.5) for x in batch])
    assert (together == alone).all()


def test_a_changed_weight_does_not_retrace(rng):
    traces = []

    @jax.jit
    def prox(penalty, x):
        traces.append(1)
        return penalty.prox(x, 1.0)

    x = jnp.asarray(rng.standard_normal(10), jnp.float32)
    for weight in (0.1, 0.2, 0.3):
        prox(so.L0(weight), x)
    assert len(traces) == 1


def test_indicators_are_infinite_off_their_set(rng):
    x = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    for indicator in (so.TopK(17), so.NM(2, 4), so.Support(MASK)):
        assert np.isinf(indicator.value(x))
        assert float(indicator.value(indicator.prox(x, 1.0))) == 0


def test_l0_threshold_is_the_root_of_twice_step_times_weight():
    x = jnp.array([0.99, 1.01, -1.01])
    assert so.L0(2.0).prox(x, 0.25).tolist() == pytest.approx([0.0, 1.01, -1.01])
