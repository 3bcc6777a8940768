import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparseopt.core.base import thresholds
from sparseopt.core.base.thresholds import n_of_m_mask, soft_threshold

# Compiled once for every size: what is tested is one program for every count.
kth_largest, top_k_mask = jax.jit(thresholds.kth_largest), jax.jit(thresholds.top_k_mask)

magnitudes = hnp.arrays(
    np.float32,
    st.sampled_from([1, 7, 60]),
    elements=st.floats(0, 2.0**100, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0]),
)


@settings(max_examples=40, deadline=None)
@given(magnitudes, st.data())
def test_exactly_k_entries_are_kept_and_none_of_them_is_below_the_kth_largest(x, data):
    k = data.draw(st.integers(0, x.size))
    mask, ordered = np.asarray(top_k_mask(jnp.asarray(x), k)), np.sort(x)[::-1]
    assert mask.sum() == k
    np.testing.assert_array_equal(np.sort(x[mask])[::-1], ordered[:k])
    if k:
        assert float(kth_largest(jnp.asarray(x), k)) == ordered[k - 1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_kth_largest_is_that_of_a_sort_in_every_weight_dtype(rng, dtype):
    x = jnp.abs(jnp.asarray(rng.standard_normal((20, 30)), dtype))
    for k in (1, 100, 299, 600):
        assert float(kth_largest(x, k)) == float(jnp.sort(x.ravel())[-k])
        assert int(top_k_mask(x, k).sum()) == k
    assert top_k_mask(x, 700).all()
    assert np.isinf(kth_largest(x, 0))


@pytest.mark.parametrize("shape", [(), (1,), (6, 7), (3, 4, 5)])
def test_equal_scores_win_in_the_order_of_the_flattened_array(rng, shape):
    score = np.asarray(rng.integers(0, 3, shape), np.float32)
    for k in range(score.size + 1):
        first = np.argsort(-score, axis=None, kind="stable")[:k]
        mask = np.asarray(top_k_mask(jnp.asarray(score), k))
        assert mask.shape == shape
        assert sorted(first) == np.flatnonzero(mask).tolist()


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, 0), (1, 4, 1), (3, 3, 1)])
def test_n_of_m_mask_keeps_the_first_of_the_largest_n_of_every_group(rng, n, m, axis):
    for score in (rng.random((24, 48)).astype(np.float32), np.asarray(rng.integers(0, 3, (24, 48)), np.float32)):
        mask = np.moveaxis(np.asarray(n_of_m_mask(jnp.asarray(score), n, m, axis)), axis, 0)
        groups = np.moveaxis(score, axis, 0).reshape(-1, m, mask.shape[1])
        expected = np.zeros(groups.shape, bool)
        np.put_along_axis(expected, np.argsort(-groups, axis=1, kind="stable")[:, :n], True, axis=1)
        np.testing.assert_array_equal(mask.reshape(groups.shape), expected)


def test_the_slope_of_a_soft_threshold_of_zero_is_that_from_above():
    x = jnp.array([-2.0, 0.5, jnp.nan])
    np.testing.assert_array_equal(soft_threshold(x, 0.0), x)
    slope = jax.jacfwd(lambda threshold: soft_threshold(x[:2], threshold))(0.0)
    np.testing.assert_array_equal(slope, [1.0, -1.0])
