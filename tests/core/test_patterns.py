"""Patterns and grids against enumerations of all their points."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.penalties.patterns import Within
from tests.jitted import Jitted

MASK = np.arange(24).reshape(4, 6)[:, :3] % 3 != 0


@jax.jit
def values(penalty, points):
    """The penalty of every point on its own."""
    return jax.vmap(penalty.value)(points)


# Of an array [4, 3], and how many supports lie in each.
SUPPORTED = {
    "TopK": (so.TopK(5), 1586),
    "NM": (so.NM(1, 2), 3**6),
    "NM along columns": (so.NM(2, 3, axis=1), 7**4),
    "RowTopK along columns": (so.RowTopK(2, axis=1), 7**4),
    "a count for every line": (so.RowTopK(np.array([0, 1, 4])), 1 * 5 * 16),
    "BlockTopK": (so.BlockTopK(1, (2, 3)), 127),
    "GroupTopK of rows": (so.GroupTopK(2), 1 + 4 * 7 + 6 * 49),
    "GroupTopK of pairs": (so.GroupTopK(1, 2), 127),
    "GroupTopK of labels": (so.GroupTopK(2, np.array([0, 1, 1, 2])), 4096 - 7 * 63 * 7),
    "Support": (so.Support(MASK), 256),
    "Within": (Within(so.TopK(2), MASK), 1 + 8 + 28),
    "Within, of lines": (Within(so.RowTopK(np.array([1, 2, 4])), MASK), 11 * 16),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_pattern_has_exactly_its_supports_and_projects_onto_the_nearest(rng, name):
    pattern, count = SUPPORTED[name]
    supports = np.array(list(itertools.product([0, 1], repeat=12)), np.float32).reshape(-1, 4, 3)
    allowed = supports[np.asarray(values(pattern, supports)) == 0]
    assert len(allowed) == count
    for _ in range(5):
        x = rng.standard_normal((4, 3)).astype(np.float32)
        kept = np.where(Jitted(pattern).prox(x, 1.0) != 0, 1, 0)
        assert (allowed == kept).all(axis=(1, 2)).any()
        energies = np.sum(allowed * x.astype(np.float64) ** 2, axis=(1, 2))
        assert np.sum(kept * x.astype(np.float64) ** 2) == pytest.approx(energies.max(), rel=1e-14)
        np.testing.assert_array_equal(Jitted(pattern).prox(x, 1.0), kept * x)


@pytest.mark.parametrize(
    "pattern", [None, so.Support(np.array([True, False, True, True])), so.TopK(2), so.NM(1, 2)], ids=repr
)
def test_a_grid_projects_onto_the_nearest_of_all_its_points(rng, pattern):
    grid = so.Grid(np.array([0.5, -0.7, 0.3, 0.6], np.float32), -1, 2, pattern)
    points = np.float32(list(itertools.product(range(-1, 3), repeat=4))) * grid.scale
    allowed = points[np.asarray(values(grid, points)) == 0]
    assert len(allowed) == {None: 256, so.Support: 64, so.TopK: 1 + 12 + 54, so.NM: 49}[pattern and type(pattern)]
    for x in rng.standard_normal((40, 4)).astype(np.float32):
        found = Jitted(grid).prox(x, 1.0)
        assert (allowed == found).all(axis=1).any()
        assert np.sum((found - x) ** 2) == pytest.approx(np.sum((allowed - x) ** 2, axis=1).min(), rel=1e-6)


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, np.float16), (1e19, np.float32), (1e-23, np.float32)])
def test_a_grid_in_a_pattern_neither_overflows_nor_underflows(scale, dtype):
    x = np.array([3.2, -3.0, 2.9, 0.0], np.float32) * scale * (100 if scale == 1 else 1)
    found = Jitted(so.Grid(scale, -1000, 1000, so.TopK(1))).prox(x.astype(dtype), 1.0)
    assert np.flatnonzero(found).tolist() == [0]


def test_a_projection_onto_a_grid_is_one_in_16_bits(rng):
    for scale in rng.uniform(0.01, 1, 20).astype(np.float32):
        grid = Jitted(so.Grid(scale, -127, 127))
        near = grid.prox(jnp.asarray(scale * rng.uniform(-130, 130, 500), jnp.bfloat16), 1.0)
        np.testing.assert_array_equal(grid.prox(near, 1.0), near)
        assert grid.value(near) == 0


def test_counts_are_exact_among_ties_and_the_first_win(rng):
    x = np.abs(rng.standard_normal((8, 6))).astype(np.float32)
    x[:, 2:4], x[4:6] = 1.0, x[0:2]
    for k in range(7):
        expected = np.zeros((8, 6), bool)
        np.put_along_axis(expected, np.argsort(-x, axis=1, kind="stable")[:, :k], True, axis=1)
        np.testing.assert_array_equal(Jitted(so.RowTopK(k, axis=1)).mask(x), expected)
        np.testing.assert_array_equal(Jitted(so.RowTopK(k)).mask(x.T), expected.T)
    for k in range(5):
        energies = np.sum(x.reshape(4, -1) ** 2, axis=1)
        expected = np.isin(np.arange(8) // 2, np.argsort(-energies, kind="stable")[:k])[:, None] & np.ones(6, bool)
        for pattern in (so.GroupTopK(k, 2), so.BlockTopK(k, (2, 6)), so.GroupTopK(k, np.arange(8) // 2)):
            np.testing.assert_array_equal(Jitted(pattern).mask(x), expected)
    # Only one of two lines has more ties than places.
    np.testing.assert_array_equal(
        Jitted(so.RowTopK(1)).mask(np.array([[1.0, 1.0], [1.0, 2.0]])), [[True, False], [False, True]]
    )
    cube = rng.standard_normal((3, 5, 4)).astype(np.float32)
    assert (np.count_nonzero(Jitted(so.RowTopK(2, axis=1)).prox(cube, 1.0), axis=1) == 2).all()
    assert np.count_nonzero(Jitted(so.RowTopK(2)).prox(cube[0, :, 0], 1.0)) == 2


def test_an_array_without_entries_lies_in_every_pattern():
    for pattern in (so.TopK(2), so.RowTopK(2), so.NM(2, 4)):
        assert pattern.prox(jnp.zeros((0, 3)), 1.0).shape == (0, 3)
        assert pattern.value(jnp.zeros((0, 3))) == 0
