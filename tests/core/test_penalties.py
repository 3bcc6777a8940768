"""Facts that hold for every penalty: one list for all tests."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.operators.matrices import linear_map
from sparseopt.core.penalties.patterns import Within
from sparseopt.core.penalties.protocols import Norm
from sparseopt.core.penalties.sums import Lifted, stack
from tests.jitted import Jitted

SHAPE = (8, 6)
CHAIN = so.Graph.chain(8)
COTANGENT = np.linspace(-1, 2, 48).reshape(SHAPE)
LABELS = np.array([0, 1, 1, 2, 0, 1, 1, 1])
MASK = np.arange(48).reshape(SHAPE) % 3 != 0
PENALTIES = {
    "L0": so.L0(0.3),
    "L1": so.L1(0.3),
    "L1 of many weights": so.L1(np.linspace(0, 1, 6)),
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
    "ElasticNet": so.ElasticNet(0.3, 0.5),
    "LogSum": so.LogSum(0.3, eps=1.0),
    "LHalf": so.LHalf(0.3),
    "Nonnegative": so.Nonnegative(0.2),
    "Box": so.Box(-0.5, 1.0, weight=0.2),
    "Box without a roof": so.Box(np.linspace(-1, 0, 6), np.inf, weight=0.2),
    "Simplex": so.Simplex(3.0),
    "GroupL2 of labels": so.GroupL2(np.linspace(0.3, 1, 3), groups=LABELS),
    "SparseGroup": so.SparseGroup(0.2, 0.4),
    "SparseGroup of labels": so.SparseGroup(np.linspace(0.1, 0.5, 6), np.linspace(0.3, 1, 3), groups=LABELS),
    "NuclearNorm": so.NuclearNorm(0.4),
}


@jax.jit
def values(penalty, points):
    """The penalty of every point on its own."""
    return jax.vmap(penalty.value)(points)


@pytest.fixture(params=PENALTIES.values(), ids=PENALTIES.keys())
def penalty(request):
    return request.param


@pytest.mark.parametrize("step", [0.1, 1.0, 7.0])
def test_no_perturbation_beats_the_prox(penalty, rng, step):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    best = Jitted(penalty).prox(x, step)
    others = [best]
    for _ in range(60):
        moved = best + rng.standard_normal(SHAPE) * rng.choice([1e-3, 0.1, 1.0])
        swapped = x * rng.permuted((best != 0).ravel()).reshape(SHAPE)
        # The last one lies in the set of an indicator.
        others += [moved, swapped, np.where(best != 0, moved, 0), Jitted(penalty).prox(moved.astype(np.float32), step)]

    others = np.stack(others).astype(np.float32)
    costs = 0.5 * np.sum((others - x) ** 2, axis=(1, 2)) + step * np.asarray(values(penalty, others))
    assert np.isfinite(costs[0])
    assert (costs[1:] >= costs[0] - 1e-4).all()


@pytest.mark.parametrize("name", sorted(PENALTIES.keys() - {"Simplex"}))
def test_zero_costs_nothing_and_is_a_fixed_point(name):
    penalty = PENALTIES[name]
    zero = np.zeros(SHAPE, np.float32)
    assert values(penalty, zero[None]) == 0
    assert (Jitted(penalty).prox(zero, 1.0) == 0).all()


def test_a_sum_of_norms_is_a_norm_and_of_others_is_none(rng):
    both = stack([so.L1(0.5), so.GroupL2(0.7)], [3, 5])
    assert isinstance(both, Norm)
    assert not isinstance(stack([so.L1(0.5), so.L0(0.7)], [3, 5]), Norm)
    x, dual = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    norm = Jitted(both)
    inside = norm.project_dual(dual)
    np.testing.assert_allclose(norm.project_dual(inside), inside, rtol=1e-6)
    slack = norm.slack(x, inside)
    assert slack.min() >= -1e-6
    assert slack.sum() == pytest.approx(norm.value(x) - np.vdot(inside, x), rel=1e-5)


WITH_GRADIENTS = PENALTIES | {
    "MCP": so.MCP(0.3),
    "SCAD": so.SCAD(0.3),
    "GroupL2": so.GroupL2(0.3),
    "GroupL2 along columns": so.GroupL2(0.3, axis=0),
    "NormSum": stack([so.L1(0.5), so.GroupL2(0.7)], [3, 5]),
    "Lifted": Lifted(
        so.L1(0.3), linear_map(CHAIN.matrix(1)), 2 * np.ones(7), np.arange(7)[:, None] % 6 == np.arange(6)
    ),
}


@pytest.mark.parametrize("penalty", WITH_GRADIENTS.values(), ids=WITH_GRADIENTS.keys())
def test_the_prox_has_finite_gradients_at_zero_entries_and_slices(penalty, rng):
    gradients = jax.jit(jax.grad(lambda x, step: jnp.sum(COTANGENT * penalty.prox(x, step)), argnums=(0, 1)))
    x = rng.standard_normal(SHAPE).astype(np.float32)
    x[2:5], x[6, 1] = 0, 0
    for point in (np.zeros_like(x), x):
        for step in (0.0, 1.0):
            assert all(np.isfinite(gradient).all() for gradient in gradients(point, step))


@pytest.mark.parametrize("penalty", [so.L1(0.0), so.GroupL2(0.0), so.SparseGroup(0.0, 0.0)], ids=repr)
def test_without_a_weight_the_prox_is_the_identity_with_its_derivative_also_at_zero(penalty):
    point = jnp.array([[0.0, 0.0], [3.0, 0.0]])
    np.testing.assert_array_equal(penalty.prox(point, 1.0), point)
    jacobian = jax.jacfwd(lambda x: penalty.prox(x, 1.0))(point)
    np.testing.assert_array_equal(jacobian.reshape(4, 4), np.eye(4))


def test_prox_keeps_shape_and_dtype(penalty, rng):
    for dtype in (jnp.float32, jnp.bfloat16):
        answer = Jitted(penalty).prox(rng.standard_normal(SHAPE).astype(dtype), 0.5)
        assert answer.shape == SHAPE
        assert answer.dtype == dtype


def test_penalty_is_a_pytree_that_vmaps_and_satisfies_the_protocol(penalty, rng):
    assert isinstance(penalty, so.core.Penalty)
    batch = rng.standard_normal((3, *SHAPE)).astype(np.float32)
    together = jax.jit(jax.vmap(lambda x: penalty.prox(x, 0.5)))(batch)
    # A batch may be multiplied and summed in another order.
    np.testing.assert_allclose(together, [Jitted(penalty).prox(x, 0.5) for x in batch], rtol=1e-6, atol=1e-6)


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
    x = rng.standard_normal(SHAPE).astype(np.float32)
    patterns = (so.TopK(17), so.NM(2, 4), so.RowTopK(3), so.BlockTopK(3, (2, 3)), so.GroupTopK(2, 2), so.Support(MASK))
    patterns = (*patterns, Within(so.TopK(17), MASK))
    for indicator in (*patterns, so.Nonnegative(), so.Box(-0.1, 0.2), so.Simplex()):
        assert np.isinf(values(indicator, x[None]))
        assert values(indicator, Jitted(indicator).prox(x, 1.0)[None]) == 0


def test_l0_threshold_is_the_root_of_twice_step_times_weight():
    x = jnp.array([0.99, 1.01, -1.01])
    assert so.L0(2.0).prox(x, 0.25).tolist() == pytest.approx([0.0, 1.01, -1.01])


def test_within_a_support_a_pattern_keeps_the_largest_of_it_and_never_more_than_it_has(rng):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    x[0, 1:3] = 0
    for k in (0, 5, 31, 40):
        kept = np.asarray(Jitted(Within(so.TopK(k), MASK)).mask(np.abs(x)))
        assert kept.sum() == min(k, MASK.sum())
        assert not kept[~MASK].any()
        left = np.sort(np.abs(x)[MASK])[::-1][: kept.sum()]
        np.testing.assert_array_equal(np.sort(np.abs(x)[kept])[::-1], left)
    counts = np.array([0, 1, 2, 3, 4, 8])
    kept = np.asarray(Jitted(Within(so.RowTopK(counts), MASK)).mask(np.abs(x)))
    np.testing.assert_array_equal(kept.sum(axis=0), np.minimum(counts, MASK.sum(axis=0)))


def test_row_top_k_keeps_the_largest_of_every_row_and_counts_are_exact_among_ties(rng):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    x[:, 2:4] = 1.0  # ties at the threshold
    for k in range(7):
        mask = Jitted(so.RowTopK(k, axis=1)).mask(np.abs(x))
        order = np.argsort(-np.abs(x), axis=1, kind="stable")[:, :k]
        expected = np.zeros(SHAPE, bool)
        np.put_along_axis(expected, order, True, axis=1)
        np.testing.assert_array_equal(mask, expected)
        np.testing.assert_array_equal(Jitted(so.RowTopK(k)).mask(np.abs(x.T)), expected.T)


def test_row_top_k_acts_along_one_axis_of_any_array(rng):
    x = rng.standard_normal((3, 5, 4)).astype(np.float32)
    kept = Jitted(so.RowTopK(2, axis=1)).prox(x, 1.0)
    assert (np.count_nonzero(kept, axis=1) == 2).all()
    assert np.count_nonzero(Jitted(so.RowTopK(2)).prox(x[0, :, 0], 1.0)) == 2


@pytest.mark.parametrize("shape", [(2, 3), (8, 1), (1, 6), (4, 2), (8, 6), (1, 1)])
def test_block_top_k_keeps_the_blocks_of_largest_energy(rng, shape):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    high, wide = shape
    corners = [(i, j) for i in range(0, 8, high) for j in range(0, 6, wide)]
    energy = [np.sum(x[i : i + high, j : j + wide].astype(np.float64) ** 2) for i, j in corners]
    k = max(1, len(corners) // 3)
    expected = np.zeros_like(x)
    for place in np.argsort(energy)[-k:]:
        i, j = corners[place]
        expected[i : i + high, j : j + wide] = x[i : i + high, j : j + wide]
    np.testing.assert_array_equal(Jitted(so.BlockTopK(k, shape)).prox(x, 1.0), expected)


def test_blocks_that_do_not_tile_are_an_error():
    with pytest.raises(ValueError, match=r"blocks of 3 x 2 tile .* shape \(8, 6\)"):
        so.BlockTopK(1, (3, 2)).mask(jnp.ones(SHAPE))
    with pytest.raises(ValueError, match=r"shape \(48,\)"):
        so.BlockTopK(1, (3, 2)).mask(jnp.ones(48))


@pytest.mark.parametrize("groups", [1, 2, 4, LABELS], ids=["rows", "pairs", "fours", "labels"])
def test_group_top_k_projects_onto_the_nearest_of_all_choices_of_groups(rng, groups):
    labels = LABELS if groups is LABELS else np.arange(8) // groups
    count = labels.max() + 1
    for x in (rng.standard_normal(SHAPE), rng.standard_normal(8)):
        for k in {0, 1, count // 2, count}:
            choices = [np.isin(labels, chosen) for chosen in itertools.combinations(range(count), k)]
            kept = max(choices, key=lambda rows: np.sum(x[rows] ** 2))
            expected = np.where(kept[:, None] if x.ndim == 2 else kept, x, 0).astype(np.float32)
            found = Jitted(so.GroupTopK(k, groups)).prox(x.astype(np.float32), 1.0)
            np.testing.assert_array_equal(found, expected)


def test_consecutive_groups_are_blocks_as_wide_as_the_matrix_and_equal_labels(rng):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    x[4:6] = x[0:2]  # on a tie the first win
    for k in range(5):
        mask = Jitted(so.GroupTopK(k, 2)).mask(np.abs(x))
        np.testing.assert_array_equal(mask, Jitted(so.BlockTopK(k, (2, 6))).mask(np.abs(x)))
        np.testing.assert_array_equal(mask, Jitted(so.GroupTopK(k, np.arange(8) // 2)).mask(np.abs(x)))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (3, r"groups of 3 rows need .* shape \(8, 6\)"),
        (0, "groups of 0 rows"),
        ([0, 1], r"given 2 labels, 2 of them distinct, for an array of shape \(8, 6\)"),
        ([0, 1, 3, 0, 1, 3, 0, 1], "integers 0 to G - 1, each at least once; given 8 labels, 3 of them distinct"),
    ],
)
def test_groups_that_do_not_fit_the_rows_are_an_error(groups, message):
    with pytest.raises(ValueError, match=message):
        so.GroupTopK(1, groups).mask(jnp.ones(SHAPE))


def test_the_count_of_a_pattern_is_a_leaf(rng):
    traces = []

    @jax.jit
    def prox(penalty, x):
        traces.append(type(penalty))
        return penalty.prox(x, 1.0)

    x = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    for k in (1, 2, 4):
        assert np.count_nonzero(prox(so.RowTopK(k), x)) == 6 * k
        assert np.count_nonzero(prox(so.BlockTopK(k, (4, 2)), x)) == 8 * k
        assert np.count_nonzero(prox(so.GroupTopK(k, [0, 1, 2, 3] * 2), x)) == 12 * k
    assert len(traces) == 3


def test_the_prox_of_a_log_sum_keeps_what_its_square_would_overflow():
    x = jnp.array([3e19, -3e38, 1e30, 0.0], jnp.float32)
    np.testing.assert_allclose(so.LogSum(1.0, 1.0).prox(x, 1.0), x, rtol=1e-6)


@pytest.mark.parametrize("penalty", [so.TopK(2), so.RowTopK(2), so.NM(2, 4)])
def test_an_array_without_entries_lies_in_every_pattern(penalty):
    x = jnp.zeros((0, 3))
    assert penalty.prox(x, 1.0).shape == (0, 3)
    assert penalty.value(x) == 0


@pytest.mark.parametrize("penalty", [so.L1(0.5), so.LogSum(0.5, 0.5), so.Box(-0.5, 0.5), so.GroupL2(0.5), so.TopK(1)])
def test_integers_are_floats_to_a_penalty(penalty):
    x = jnp.array([-3, 0, 2])
    np.testing.assert_array_equal(penalty.prox(x, 1.0), penalty.prox(x.astype(float), 1.0))
    np.testing.assert_array_equal(penalty.value(x), penalty.value(x.astype(float)))


def test_labels_are_checked_beside_their_number_too():
    x = jnp.array([3.0, -1.0, 2.0, -4.0])
    by_list = so.GroupL2(1.0, groups=[0, 1, 2, 2], num_groups=3).prox(x, 1.0)
    np.testing.assert_array_equal(by_list, so.GroupL2(1.0, groups=np.array([0, 1, 2, 2])).prox(x, 1.0))
    with pytest.raises(ValueError, match="num_groups=2 and a label 2"):
        so.GroupL2(1.0, groups=np.array([0, 1, 2, 2]), num_groups=2)
    with pytest.raises(ValueError, match=r"an integer from 0 on, .* from -1"):
        so.GroupL2(1.0, groups=np.array([0, -1]), num_groups=2)


def test_classes_of_ones_own_with_a_prox_stay_as_they_are():
    @so.pytree
    class NoValue:
        weight: object

        @staticmethod
        def prox(x, step):
            return x * step

    @so.pytree
    class Named:
        weight: object

        def value(self, x):
            return jnp.sum(x)

        def prox(self, v, t):
            return v - t * self.weight

    x = jnp.array([1, 2])
    np.testing.assert_array_equal(NoValue(1.0).prox(x, 2), [2, 4])
    np.testing.assert_array_equal(Named(0.5).prox(v=x.astype(float), t=1.0), [0.5, 1.5])
    np.testing.assert_array_equal(Named(0.5).prox(x, 1.0), [0.5, 1.5])


def test_a_problem_with_labels_has_derivatives_in_every_leaf(rng):
    loss = so.LeastSquares(rng.standard_normal((6, 3)), np.ones(6))
    problem = so.Problem(loss, so.GroupL2(0.5, groups=np.array([0, 0, 1])))
    found = jax.grad(lambda each: so.solve(each).value.sum(), allow_int=True)(problem).penalty.weight
    step = 1e-2
    near = [
        so.solve(so.Problem(loss, so.GroupL2(0.5 + move, groups=problem.penalty.groups)), tol=1e-8)
        for move in (step, -step)
    ]
    assert float(found) == pytest.approx(float((near[0].value - near[1].value).sum()) / (2 * step), rel=0.05)
