"""Facts that hold for every penalty, for every one with a known conjugate, and for every norm: one table of cases.

Then penalties against independent computations, and patterns and grids against enumerations of all their points.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.operators.matrices import linear_map
from sparseopt.core.penalties.groups import threshold_singular_values
from sparseopt.core.penalties.patterns import Within
from sparseopt.core.penalties.protocols import Norm
from sparseopt.core.penalties.sums import Lifted, stack
from tests.experiments.toy import CappedL1
from tests.jitted import Jitted
from tests.tiers import often

DOUBLE = np.dtype(np.float64)
SHAPE = (8, 6)
COTANGENT = np.linspace(-1, 2, 48).reshape(SHAPE)
LABELS = np.array([0, 1, 1, 2, 0, 1, 1, 1])
MASK = np.arange(48).reshape(SHAPE) % 3 != 0
NORMS = {
    "L1 of many weights": so.L1(np.linspace(0.2, 1, 6)),
    "GroupL2": so.GroupL2(0.7),
    "GroupL2 of labels": so.GroupL2(np.linspace(0.3, 1, 3), groups=LABELS),
    "SparseGroup along columns": so.SparseGroup(0.2, 0.4, axis=0),
    "SparseGroup of labels": so.SparseGroup(np.linspace(0.1, 0.5, 6), np.linspace(0.3, 1, 3), groups=LABELS),
    "NuclearNorm": so.NuclearNorm(0.4),
    "sum of norms": stack([so.L1(0.5), so.GroupL2(0.7)], [3, 5]),
}
CONJUGATES = NORMS | {
    "ElasticNet": so.ElasticNet(0.3, 0.5),
    "Nonnegative": so.Nonnegative(0.2),
    "Box": so.Box(-0.5, np.linspace(0, 1, 6), weight=0.2),
    "Box without 0": so.Box(0.3, 0.7, weight=0.2),
    "Box without a roof": so.Box(np.linspace(-1, 1, 6), np.inf, weight=0.2),
    "Box without a floor": so.Box(-np.inf, np.linspace(-1, 1, 6), weight=0.2),
    "Simplex": so.Simplex(3.0),
    "sum with others": stack([so.L1(0.5), so.ElasticNet(0.3, 0.5)], [3, 5]),
}
PENALTIES = CONJUGATES | {
    "L0": so.L0(0.3),
    "L1, some of weight 0": so.L1(np.linspace(0, 1, 6)),
    "GroupL2 along columns": so.GroupL2(0.3, axis=0),
    "MCP": so.MCP(0.3),
    "SCAD": so.SCAD(0.3),
    "LogSum": so.LogSum(0.3, eps=1.0),
    "LHalf": so.LHalf(0.3),
    "CappedL1, of a user": CappedL1(0.7),
    "Sum": stack([so.L1(0.3), so.L0(0.2), so.TopK(4)], [3, 4, 1]),
    "TopK": so.TopK(17),
    "NM": so.NM(2, 4),
    "NM along columns": so.NM(1, 3, axis=1),
    "RowTopK": so.RowTopK(3),
    "RowTopK along columns": so.RowTopK(2, axis=1),
    "BlockTopK": so.BlockTopK(3, (2, 3)),
    "GroupTopK": so.GroupTopK(2, 2),
    "GroupTopK of labels": so.GroupTopK(2, LABELS),
    "Support": so.Support(MASK),
    "Within": Within(so.TopK(17), MASK),
    "Within, of lines": Within(so.RowTopK(np.arange(6)), MASK),
    "Grid": so.Grid(np.linspace(-0.5, 0.5, 6), -3, 2),
    "Grid of a support": so.Grid(0.4, -8, 7, so.Support(MASK)),
    "Grid of a count": so.Grid(0.4, -2, 2, so.TopK(17)),
    "Grid of n:m": so.Grid(np.full((8, 1), 0.7), -1, 1, so.NM(2, 4)),
}
WITHOUT_ZERO = ("Simplex", "Box without 0", "Box without a roof", "Box without a floor")
INDICATORS = ("TopK", "NM", "RowTopK", "BlockTopK", "GroupTopK", "Support", "Within", "Simplex", "Grid", "Grid of n:m")
DIFFERENCES = linear_map(so.Graph.chain(8).matrix(1))
ROWS_OF_A_CHAIN = Lifted(so.L1(0.3), DIFFERENCES, 2 * np.ones(7), np.arange(7)[:, None] % 6 == np.arange(6))
GRADIENTS = PENALTIES | {"Lifted": ROWS_OF_A_CHAIN}


@jax.jit
def values(penalty, points):
    """The penalty of every point on its own."""
    return jax.vmap(penalty.value)(points)


def drawn(rng, scale=1):
    return (scale * rng.standard_normal(SHAPE)).astype(np.float32)


# Their code runs in others too: the same along another axis, with labels, or on one side.
SELDOM = {
    *("GroupL2 of labels", "SparseGroup along columns", "GroupL2 along columns", "Box without a roof"),
    *("Box without a floor", "sum with others", "NM along columns", "RowTopK along columns", "GroupTopK of labels"),
    *("Within, of lines", "Grid of a support", "Grid of n:m"),
}
USUAL = [name for name in PENALTIES if name not in SELDOM]


def names(table, *kept):
    """The cases of a table; all but the kept ones in the thorough tests alone."""
    return often(table, *(name for name in table if name in (kept or USUAL)))


@pytest.mark.parametrize("name", names(PENALTIES))
def test_no_perturbation_beats_the_prox(name, rng):
    penalty, x, zero = PENALTIES[name], drawn(rng), np.zeros(SHAPE, np.float32)
    prox = Jitted(penalty).prox
    for step in (0.1, 1.0, 7.0):
        best = prox(x, step)
        others = [best, x, zero]
        for _ in range(60):
            moved = best + rng.standard_normal(SHAPE) * rng.choice([1e-3, 0.1, 1.0])
            swapped = x * rng.permuted((best != 0).ravel()).reshape(SHAPE)
            # The last one lies in the set of an indicator.
            others += [moved, swapped, np.where(best != 0, moved, 0), prox(moved.astype(np.float32), step)]
        others = np.stack(others).astype(np.float32)
        heights = np.asarray(values(penalty, others))
        costs = 0.5 * np.sum((others - x) ** 2, axis=(1, 2)) + step * heights
        assert np.isfinite(costs[0])
        assert (costs[1:] >= costs[0] - 1e-4).all()
        if name in INDICATORS:
            assert heights[0] == 0
        if name in (*INDICATORS, "Box", "Nonnegative"):
            assert heights[1] == np.inf
    if name not in WITHOUT_ZERO:
        assert heights[2] == 0
        assert (prox(zero, 1.0) == 0).all()


@pytest.mark.parametrize(
    "name", names(PENALTIES, "SparseGroup of labels", "NuclearNorm", "Sum", "Simplex", "NM", "Grid")
)
def test_a_prox_keeps_shape_and_dtype_and_has_lanes(name, rng):
    penalty = PENALTIES[name]
    assert isinstance(penalty, so.core.Penalty)
    for dtype in (jnp.float32, jnp.bfloat16):
        answer = Jitted(penalty).prox(rng.standard_normal(SHAPE).astype(dtype), 0.5)
        assert (answer.shape, answer.dtype) == (SHAPE, dtype)
    batch = np.stack([drawn(rng) for _ in range(3)])
    together = jax.jit(jax.vmap(lambda x: penalty.prox(x, 0.5)))(batch)
    # A batch may be multiplied and summed in another order.
    np.testing.assert_allclose(together, [Jitted(penalty).prox(x, 0.5) for x in batch], rtol=1e-6, atol=1e-6)


SMOOTHED = ("GroupL2", "SparseGroup of labels", "NuclearNorm", "Simplex", "LogSum", "MCP", "Box", "TopK", "Sum")


@pytest.mark.parametrize("name", names(GRADIENTS, *SMOOTHED, "Lifted"))
def test_the_prox_has_finite_gradients_at_zero_entries_and_slices(name, rng):
    penalty = GRADIENTS[name]
    gradients = jax.jit(jax.grad(lambda x, step: jnp.sum(COTANGENT * penalty.prox(x, step)), argnums=(0, 1)))
    x = drawn(rng)
    x[2:5], x[6, 1] = 0, 0
    for point, step in itertools.product((np.zeros_like(x), x), (0.0, 1.0)):
        assert all(np.isfinite(gradient).all() for gradient in gradients(point, step))


@pytest.mark.parametrize("name", names(CONJUGATES))
def test_the_slack_of_a_conjugate_is_that_of_fenchel_and_young_and_its_dual_norm_scales(name, rng):
    assert isinstance(CONJUGATES[name], so.core.Conjugate)
    jitted = Jitted(CONJUGATES[name])
    for _ in range(5):
        v, w, dual = drawn(rng, 2), drawn(rng, 2), drawn(rng, 3)
        x, y, dual = jitted.prox(v, 1.0), jitted.prox(w, 1.0), dual / max(jitted.dual_norm(dual), 1)
        at_x, at_y = jitted.slack(x, dual), jitted.slack(y, dual)
        assert min(at_x.min(), at_y.min()) >= -1e-5
        gap = jitted.value(x) - jitted.value(y) - np.vdot(dual, x - y)
        assert at_x.sum() - at_y.sum() == pytest.approx(gap, abs=1e-4)
    # By Moreau v - x is a subgradient at x, for which Fenchel's inequality is an equality.
    np.testing.assert_allclose(jitted.slack(x, v - x), 0, atol=5e-5)
    assert jitted.dual_norm(v - x) <= 1 + 1e-5
    for t in (0, 1e-12, 0.3, 1e12):
        assert jitted.dual_norm(np.float32(t) * v) == pytest.approx(t * jitted.dual_norm(v), rel=1e-5)


@pytest.mark.parametrize("name", names(NORMS))
def test_a_norm_has_a_dual_ball_in_which_its_prox_is_zero_and_on_which_it_projects(name, rng):
    assert isinstance(NORMS[name], Norm)
    jitted, u, x = Jitted(NORMS[name]), drawn(rng, 2), drawn(rng)
    size = jitted.dual_norm(u)
    assert not jitted.prox(u * (1 - 1e-4), size).any()
    assert jitted.prox(u * (1 + 1e-4), size).any()
    inside = jitted.project_dual(u)
    np.testing.assert_allclose(inside, u - jitted.prox(u, 1.0), atol=2e-6)
    np.testing.assert_allclose(jitted.project_dual(inside), inside, atol=2e-6)
    assert jitted.dual_norm(inside) <= 1 + 4e-6
    assert jitted.slack(x, inside).sum() == pytest.approx(jitted.value(x) - np.vdot(inside, x), rel=1e-5)


def test_a_lifted_penalty_is_that_of_the_rows_of_its_groups(rng):
    x = drawn(rng)
    of_groups = np.diff(x, axis=0)[np.arange(7)[:, None] % 6 == np.arange(6)]
    assert Jitted(ROWS_OF_A_CHAIN).value(x) == pytest.approx(0.3 * np.abs(of_groups).sum(), rel=1e-5)


def test_what_is_no_norm_does_not_pass_for_one():
    for name in CONJUGATES.keys() - NORMS.keys():
        assert not isinstance(CONJUGATES[name], Norm), name
    assert not isinstance(stack([so.L1(0.5), so.L0(0.7)], [3, 5]), Norm)
    assert not isinstance(so.LogSum(1.0, 1.0), so.core.Conjugate)


SCALARS = {
    "L1": so.L1(0.7),
    "L0": so.L0(0.9),
    "MCP": so.MCP(0.7, 3.0),
    "steep MCP": so.MCP(0.7, 1.2),
    "SCAD": so.SCAD(0.7, 3.7),
    "steep SCAD": so.SCAD(0.7, 2.1),
    "LogSum": so.LogSum(0.8, 1.0),
    "steep LogSum": so.LogSum(0.8, 0.3),
    "CappedL1, of a user": CappedL1(0.7),
}


@pytest.mark.parametrize("penalty", SCALARS.values(), ids=SCALARS)
def test_no_grid_point_beats_the_scalar_prox(penalty):
    with precision(DOUBLE):
        x, grid = np.linspace(-8, 8, 161), np.linspace(-9, 9, 6001)
        heights = np.asarray(values(penalty, grid))
        for step in (0.0, 0.02, 0.1, 0.3, 1.0, 1.5, 4.0):
            u = Jitted(penalty).prox(x, step)
            reached = 0.5 * (u - x) ** 2 + step * np.asarray(values(penalty, u))
            best = np.min(0.5 * (grid - x[:, None]) ** 2 + step * heights, axis=1)
            assert np.max(reached - best) <= 1e-12, step


CONCAVE = [so.MCP(1.2, 2.5), so.SCAD(0.8, 3.1), so.LogSum(0.8, 0.3), so.LogSum(0.8, 1.0)]


@pytest.mark.parametrize("penalty", CONCAVE, ids=repr)
def test_the_slope_is_the_derivative_of_the_value(penalty):
    with precision(DOUBLE):
        x = np.linspace(0.05, 5, 80)
        np.testing.assert_allclose(
            Jitted(penalty).slope(x), jax.jit(jax.vmap(jax.grad(penalty.value)))(x), rtol=1e-12, atol=1e-14
        )


def test_the_prox_of_the_log_sum_is_continuous_up_to_the_square_of_eps():
    with precision(DOUBLE):
        x = np.linspace(0, 3, 30_001)
        jumps = [np.diff(Jitted(so.LogSum(1.0, 0.5)).prox(x, step)).max() for step in (0.2, 0.25, 0.5)]
    assert max(jumps[:2]) < 0.01 < 0.1 < jumps[2]
    huge = np.array([3e19, -3e38, 1e30, 0.0], np.float32)  # what its square would overflow
    np.testing.assert_allclose(Jitted(so.LogSum(1.0, 1.0)).prox(huge, 1.0), huge, rtol=1e-6)


@pytest.mark.parametrize("penalty", [so.L1(0.0), so.SparseGroup(0.0, 0.0)], ids=repr)
def test_without_a_weight_the_prox_is_the_identity_with_its_derivative_also_at_zero(penalty):
    point = np.array([[0.0, 0.0], [3.0, 0.0]])
    np.testing.assert_array_equal(Jitted(penalty).prox(point, 1.0), point)
    jacobian = jax.jit(jax.jacfwd(lambda x: penalty.prox(x, 1.0)))(point)
    np.testing.assert_array_equal(jacobian.reshape(4, 4), np.eye(4))


def test_weights_counts_and_labels_may_change_without_a_retrace(rng):
    traces = []

    @jax.jit
    def prox(penalty, x):
        traces.append(type(penalty))
        return penalty.prox(x, 1.0), penalty.value(x)

    x = drawn(rng)
    for weight, k in ((0.1, 1), (0.2, 2), (0.3, 4)):
        np.testing.assert_array_equal(prox(so.L0(weight), x)[0] != 0, np.abs(x) > np.sqrt(2 * weight))
        assert np.count_nonzero(prox(so.RowTopK(k), x)[0]) == 6 * k
        assert np.count_nonzero(prox(so.BlockTopK(k, (4, 2)), x)[0]) == 8 * k
        assert np.count_nonzero(prox(so.GroupTopK(k, [0, 1, 2, 3] * 2), x)[0]) == 12 * k
    three = jnp.array([3.0, 4.0, 2.0])
    assert prox(so.GroupL2(1.0, groups=np.array([0, 0, 1])), three)[1] == 7
    assert prox(so.GroupL2(1.0, groups=np.array([1, 0, 1])), three)[1] == pytest.approx(4 + 13**0.5)
    assert len(traces) == 5


def test_integers_are_floats_to_a_penalty():
    x = np.array([-3, 0, 2])
    for penalty in (so.L1(0.5), so.LogSum(0.5, 0.5), so.Box(-0.5, 0.5), so.GroupL2(0.5), so.TopK(1)):
        np.testing.assert_array_equal(Jitted(penalty).prox(x, 1.0), Jitted(penalty).prox(x.astype(np.float32), 1.0))
        np.testing.assert_array_equal(Jitted(penalty).value(x), Jitted(penalty).value(x.astype(np.float32)))


def test_groups_of_equal_sizes_may_be_labelled_or_lie_along_an_axis(rng):
    x, dual = drawn(rng), drawn(rng)
    for kind, weights in ((so.GroupL2, (0.7,)), (so.SparseGroup, (0.2, 0.7))):
        labelled, along = Jitted(kind(*weights, groups=np.repeat(range(4), 2))), Jitted(kind(*weights))
        for name in ("prox", "project_dual", "slack", "value", "dual_norm"):
            second = {"prox": 0.5, "slack": dual}.get(name)
            rest = () if second is None else (second,)
            flat = tuple(np.reshape(a, (4, 12)) if np.ndim(a) else a for a in (x, *rest))
            one, other = getattr(labelled, name)(x, *rest), getattr(along, name)(*flat)
            np.testing.assert_allclose(np.ravel(one), np.ravel(other), rtol=1e-5, atol=1e-6, err_msg=name)
    listed = so.GroupL2(1.0, groups=[0, 1, 2, 2] * 2, num_groups=3).prox(x, 1.0)
    np.testing.assert_array_equal(listed, so.GroupL2(1.0, groups=np.array([0, 1, 2, 2] * 2)).prox(x, 1.0))


def test_a_zero_needs_no_weight_and_a_nonzero_dual_without_one_is_outside_every_ball():
    weights = np.array([1.0, 0.0])
    for penalty in (so.L1(weights), so.Nonnegative(weights), so.GroupL2(weights, groups=[0, 1])):
        norm = Jitted(penalty)
        assert norm.dual_norm(np.array([3.0, 0.0], np.float32)) == 3
        assert norm.dual_norm(np.array([3.0, 1e-9], np.float32)) == np.inf
    assert Jitted(so.Nonnegative()).dual_norm(np.array([-1.0, 0.0], np.float32)) == 0
    assert Jitted(so.SparseGroup(weights, 0.0)).dual_norm(np.array([3.0, 1.0], np.float32)) == np.inf


@pytest.mark.parametrize("group_weight", [0.0, 1e-3, 50.0])
def test_the_dual_norm_of_sparse_groups_is_the_root_of_its_equation(rng, group_weight):
    with precision(DOUBLE):
        u = rng.standard_normal((3, 200)) ** 3
        norm = Jitted(so.SparseGroup(0.5, group_weight))
        found, short = norm.dual_norm(u), norm.dual_norm(u.astype(np.float32))

    def over(t, row):
        return np.linalg.norm(np.maximum(np.abs(row) - 0.5 * t, 0)) - group_weight * t

    roots = [brentq(over, 0, 1e3, args=(row,), xtol=1e-15, rtol=1e-15) for row in u] if group_weight else []
    most = max(roots, default=np.abs(u).max() / 0.5)
    assert found == pytest.approx(most, rel=1e-14)
    assert short == pytest.approx(most, rel=1e-6)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_the_nuclear_norm_is_that_of_the_singular_values(rng, shape):
    with precision(DOUBLE):
        x, dual = rng.standard_normal((2, *shape))
        x[1] = x[0]
        left, singular, right = np.linalg.svd(x, full_matrices=False)
        norm = Jitted(so.NuclearNorm(0.7))
        assert norm.value(x) == pytest.approx(0.7 * singular.sum(), rel=1e-12)
        assert norm.dual_norm(x) == pytest.approx(singular.max() / 0.7, rel=1e-12)
        kept = (left * np.maximum(singular - 1.4, 0)) @ right
        np.testing.assert_allclose(norm.prox(x, 2.0), kept, atol=1e-12)
        assert norm.slack(x, dual).sum() == pytest.approx(norm.value(x) - np.vdot(dual, x), rel=1e-12)

        # The derivative against central differences, at a matrix of deficient rank with equal singular values as well.
        equal = (left * np.array([2.0, 2.0, 0.5, *[0.0] * (len(singular) - 3)])) @ right
        threshold = jax.jit(threshold_singular_values)
        tangent = jax.jit(lambda *both: jax.jvp(threshold_singular_values, both[:2], both[2:])[1])
        for point, level_dot in itertools.product((x, equal), (0.0, 1.0)):
            ahead, behind = (threshold(point + h * dual, 1.0 + h * level_dot) for h in (1e-6, -1e-6))
            found = tangent(point, 1.0, dual, level_dot)
            np.testing.assert_allclose(found, (ahead - behind) / 2e-6, atol=1e-8)


@pytest.mark.parametrize(("radius", "shift"), [(1e-3, 0.0), (50.0, 0.0), (1.0, 1e4)])
def test_the_projection_onto_the_simplex_has_the_level_found_by_bisection(rng, radius, shift):
    v = (rng.standard_normal(300) + shift).astype(np.float32)
    exact = v.astype(np.float64)
    level = brentq(lambda t: np.maximum(exact - t, 0).sum() - radius, exact.min() - radius, exact.max(), xtol=1e-13)
    simplex = Jitted(so.Simplex(radius))
    found = simplex.prox(v, 1.0)
    np.testing.assert_allclose(found, np.maximum(exact - level, 0), rtol=0, atol=2e-6 * radius)
    assert simplex.value(found) == 0
    assert simplex.value(found * 1.01) == np.inf
    assert simplex.value(found - radius / 300) == np.inf


def test_a_projection_onto_the_simplex_with_many_equal_entries_keeps_its_sum():
    v = np.full(100_000, -0.7, np.float32)
    v[0] = 0.3 - 2e-6
    simplex = Jitted(so.Simplex())
    assert simplex.value(simplex.prox(v, 1.0)) == 0


def test_a_prox_of_ones_own_stays_as_it_is():
    @so.pytree
    class Named:
        weight: object

        def prox(self, v, t):
            return v - t * self.weight

    np.testing.assert_array_equal(Named(0.5).prox(v=jnp.array([1.0, 2.0]), t=1.0), [0.5, 1.5])
    assert Named(2).prox(3, t=1) == 1


HOLES = np.arange(24).reshape(4, 6)[:, :3] % 3 != 0


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
    "Support": (so.Support(HOLES), 256),
    "Within": (Within(so.TopK(2), HOLES), 1 + 8 + 28),
    "Within, of lines": (Within(so.RowTopK(np.array([1, 2, 4])), HOLES), 11 * 16),
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
