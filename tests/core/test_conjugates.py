"""Facts that hold for every convex penalty with a known conjugate, and penalties against independent computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.penalties.groups import threshold_singular_values
from sparseopt.core.penalties.protocols import Norm
from sparseopt.core.penalties.sums import stack
from tests.core.test_penalties import LABELS, SHAPE
from tests.jitted import Jitted

DOUBLE = np.dtype(np.float64)
NORMS = {
    "L1": so.L1(np.linspace(0.2, 1, 6)),
    "GroupL2": so.GroupL2(0.7),
    "GroupL2 of labels": so.GroupL2(np.linspace(0.3, 1, 3), groups=LABELS),
    "SparseGroup": so.SparseGroup(0.2, 0.4, axis=0),
    "SparseGroup of labels": so.SparseGroup(np.linspace(0.1, 0.5, 6), np.linspace(0.3, 1, 3), groups=LABELS),
    "NuclearNorm": so.NuclearNorm(0.4),
    "sum": stack([so.L1(0.5), so.GroupL2(0.7)], [3, 5]),
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


@pytest.fixture(params=CONJUGATES.values(), ids=CONJUGATES.keys())
def penalty(request):
    return request.param


@pytest.fixture(params=NORMS.values(), ids=NORMS.keys())
def norm(request):
    return request.param


def test_slack_is_never_negative_and_differs_between_points_as_the_gap_does(penalty, rng):
    assert isinstance(penalty, so.core.Conjugate)
    jitted = Jitted(penalty)
    for _ in range(5):
        x, y = (jitted.prox(v, 1.0) for v in 2 * rng.standard_normal((2, *SHAPE)).astype(np.float32))
        dual = 3 * rng.standard_normal(SHAPE).astype(np.float32)
        dual = dual / max(jitted.dual_norm(dual), 1)
        at_x, at_y = jitted.slack(x, dual), jitted.slack(y, dual)
        assert min(at_x.min(), at_y.min()) >= -1e-5
        gap = jitted.value(x) - jitted.value(y) - np.vdot(dual, x - y)
        assert at_x.sum() - at_y.sum() == pytest.approx(gap, abs=1e-4)


def test_slack_is_zero_where_the_dual_is_a_subgradient(penalty, rng):
    # By Moreau v = x + u with x the prox, and u a subgradient at x, for which Fenchel's inequality is an equality.
    jitted = Jitted(penalty)
    v = 2 * rng.standard_normal(SHAPE).astype(np.float32)
    x = jitted.prox(v, 1.0)
    np.testing.assert_allclose(jitted.slack(x, v - x), 0, atol=5e-5)
    assert jitted.dual_norm(v - x) <= 1 + 1e-5


def test_the_dual_norm_scales_with_its_argument(penalty, rng):
    jitted = Jitted(penalty)
    u = rng.standard_normal(SHAPE).astype(np.float32)
    for t in (1e-12, 0.3, 1e12):
        assert jitted.dual_norm(np.float32(t) * u) == pytest.approx(t * jitted.dual_norm(u), rel=1e-5)
    assert jitted.dual_norm(0 * u) == 0


def test_the_prox_of_a_norm_is_zero_exactly_inside_the_dual_ball(norm, rng):
    jitted = Jitted(norm)
    u = rng.standard_normal(SHAPE).astype(np.float32)
    size = jitted.dual_norm(u)
    assert not jitted.prox(u * (1 - 1e-4), size).any()
    assert jitted.prox(u * (1 + 1e-4), size).any()


def test_the_projection_of_a_norm_is_onto_the_dual_ball(norm, rng):
    assert isinstance(norm, Norm)
    jitted = Jitted(norm)
    u = 2 * rng.standard_normal(SHAPE).astype(np.float32)
    inside = jitted.project_dual(u)
    np.testing.assert_allclose(inside, u - jitted.prox(u, 1.0), atol=2e-6)
    np.testing.assert_allclose(jitted.project_dual(inside), inside, atol=2e-6)
    assert jitted.dual_norm(inside) <= 1 + 4e-6


def test_what_is_no_norm_does_not_pass_for_one():
    for name in CONJUGATES.keys() - NORMS.keys():
        assert not isinstance(CONJUGATES[name], Norm), name
    assert not isinstance(so.LogSum(1.0, 1.0), so.core.Conjugate)


def test_a_zero_needs_no_weight_and_a_nonzero_dual_without_one_is_outside_every_ball():
    weights = np.array([1.0, 0.0])
    for penalty in (so.L1(weights), so.Nonnegative(weights), so.GroupL2(weights, groups=[0, 1])):
        norm = Jitted(penalty)
        assert norm.dual_norm(np.array([3.0, 0.0], np.float32)) == 3
        assert norm.dual_norm(np.array([3.0, 1e-9], np.float32)) == np.inf
    assert Jitted(so.Nonnegative()).dual_norm(np.array([-1.0, 0.0], np.float32)) == 0
    assert Jitted(so.SparseGroup(weights, 0.0)).dual_norm(np.array([3.0, 1.0], np.float32)) == np.inf


@pytest.mark.parametrize("group_weight", [0.0, 1e-3, 1.0, 50.0])
def test_the_dual_norm_of_sparse_groups_is_the_root_of_its_equation(rng, group_weight):
    with precision(DOUBLE):
        u = rng.standard_normal((3, 200)) ** 3
        found = Jitted(so.SparseGroup(0.5, group_weight)).dual_norm(u)
        short = Jitted(so.SparseGroup(0.5, group_weight)).dual_norm(u.astype(np.float32))

    def over(t, row):
        return np.linalg.norm(np.maximum(np.abs(row) - 0.5 * t, 0)) - group_weight * t

    if group_weight:
        roots = [brentq(over, 0, 1e3, args=(row,), xtol=1e-15, rtol=1e-15) for row in u]
    else:
        roots = np.abs(u).max(axis=1) / 0.5
    assert found == pytest.approx(max(roots), rel=1e-14)
    assert short == pytest.approx(max(roots), rel=1e-6)


def test_groups_of_equal_sizes_may_be_labelled_or_lie_along_an_axis(rng):
    x, dual = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    for kind, weights in ((so.GroupL2, (0.7,)), (so.SparseGroup, (0.2, 0.7))):
        labelled, along = Jitted(kind(*weights, groups=np.repeat(range(4), 2))), Jitted(kind(*weights))
        for name in ("prox", "project_dual", "slack", "value", "dual_norm"):
            second = {"prox": 0.5, "slack": dual}.get(name)
            rest = () if second is None else (second,)
            flat = tuple(np.reshape(a, (4, 12)) if np.ndim(a) else a for a in (x, *rest))
            one, other = getattr(labelled, name)(x, *rest), getattr(along, name)(*flat)
            np.testing.assert_allclose(np.ravel(one), np.ravel(other), rtol=1e-5, atol=1e-6, err_msg=name)


def test_wrong_labels_are_an_error():
    for labels in ([0.0, 1.0], [[0], [1]], [-1, 0]):
        with pytest.raises(ValueError, match="one label for every row, an integer from 0 on"):
            so.GroupL2(1.0, groups=labels)
    with pytest.raises(ValueError, match=r"2 labels need an array of as many rows, given the shape \(3,\)"):
        so.SparseGroup(1.0, 1.0, groups=[0, 1]).value(jnp.ones(3))
    with pytest.raises(ValueError, match="give GroupL2 num_groups"):
        jax.jit(lambda labels: so.GroupL2(1.0, groups=labels).value(jnp.ones(2)))(jnp.array([0, 1]))
    # One step a row would not be the prox of a group.
    with pytest.raises(ValueError, match="labelled groups take one step"):
        so.GroupL2(1.0, groups=[0, 1]).prox(jnp.ones((2, 3)), jnp.ones((2, 1)))


def test_labels_may_change_without_a_retrace():
    traces = []

    @jax.jit
    def value(penalty, x):
        traces.append(1)
        return penalty.value(x)

    x = jnp.array([3.0, 4.0, 2.0])
    assert value(so.GroupL2(1.0, groups=np.array([0, 0, 1])), x) == 7
    assert value(so.GroupL2(1.0, groups=np.array([1, 0, 1])), x) == pytest.approx(4 + 13**0.5)
    assert len(traces) == 1


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_the_nuclear_norm_is_that_of_the_singular_values(rng, shape):
    with precision(DOUBLE):
        x, dual = rng.standard_normal((2, *shape))
        x[1] = x[0]
        left, values, right = np.linalg.svd(x, full_matrices=False)
        norm = Jitted(so.NuclearNorm(0.7))
        assert norm.value(x) == pytest.approx(0.7 * values.sum(), rel=1e-12)
        assert norm.dual_norm(x) == pytest.approx(values.max() / 0.7, rel=1e-12)
        kept = (left * np.maximum(values - 1.4, 0)) @ right
        np.testing.assert_allclose(norm.prox(x, 2.0), kept, atol=1e-12)
        assert norm.slack(x, dual).sum() == pytest.approx(norm.value(x) - np.vdot(dual, x), rel=1e-12)

        # The derivative against central differences, at a matrix of deficient rank with equal singular values as well.
        equal = (left * np.array([2.0, 2.0, 0.5, *[0.0] * (len(values) - 3)])) @ right
        threshold = jax.jit(threshold_singular_values)
        tangent = jax.jit(lambda *both: jax.jvp(threshold_singular_values, both[:2], both[2:])[1])
        for point in (x, equal):
            for level_dot in (0.0, 1.0):
                ahead, behind = (threshold(point + h * dual, 1.0 + h * level_dot) for h in (1e-6, -1e-6))
                found = tangent(point, 1.0, dual, level_dot)
                np.testing.assert_allclose(found, (ahead - behind) / 2e-6, atol=1e-8)


def test_singular_values_need_a_matrix():
    with pytest.raises(ValueError, match=r"a matrix \[m, n\], given the shape \(3,\)"):
        so.NuclearNorm(1.0).prox(jnp.ones(3), 1.0)


@pytest.mark.parametrize("radius", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("shift", [0.0, 1e4])
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


@pytest.mark.parametrize("step", [0.0, 0.02, 0.2, 1.0, 5.0])
@pytest.mark.parametrize("eps", [0.3, 1.0])
def test_no_grid_point_beats_the_prox_of_the_log_sum(step, eps):
    with precision(DOUBLE):
        penalty = so.LogSum(0.8, eps)
        x = np.linspace(-4, 4, 161)
        found = Jitted(penalty).prox(x, step)
        grid = np.linspace(-5, 5, 20_001)
        costs = 0.5 * (grid - x[:, None]) ** 2 + step * 0.8 * np.log1p(np.abs(grid) / eps)
        reached = 0.5 * (found - x) ** 2 + step * 0.8 * np.log1p(np.abs(found) / eps)
        assert (reached <= costs.min(axis=1) + 1e-12).all()
        slope = jax.vmap(jax.grad(penalty.value))(np.abs(x[x != 0]))
        np.testing.assert_allclose(penalty.slope(jnp.asarray(x[x != 0])), slope, rtol=1e-12)


def test_the_prox_of_the_log_sum_is_continuous_up_to_the_square_of_eps():
    with precision(DOUBLE):
        x = np.linspace(0, 3, 30_001)
        jumps = [np.diff(Jitted(so.LogSum(1.0, 0.5)).prox(x, step)).max() for step in (0.2, 0.25, 0.5)]
    assert max(jumps[:2]) < 0.01 < 0.1 < jumps[2]
