"""`so.trend_solver`: plan once, call often, under jit, vmap and grad."""

import ast
import dataclasses
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.problem import iterate as iterate_module
from sparseopt.core.problem.problem import Status
from sparseopt.core.solvers.admm import Admm
from sparseopt.trend.methods import plan as plan_module
from sparseopt.trend.methods.choice import AUTO, METHODS
from tests.programs import forget
from tests.tiers import often
from tests.trend.problems import random_graph

DOUBLE = np.dtype(np.float64)
N = 24
GRAPHS = {
    "chain": so.Graph.chain(N, ends="graph"),
    "grid": so.Graph.grid((4, 6)),
    "graph": random_graph(np.random.default_rng(5), n=N, extra=6),
}


def signal(rng):
    return np.repeat(rng.normal(size=6), 4) * 3 + 0.3 * rng.normal(size=N)


@pytest.mark.parametrize(("name", "order"), often(itertools.product(GRAPHS, (0, 1, 2)), ("chain", 0), ("graph", 1)))
def test_derivatives_are_those_of_central_differences(rng, name, order):
    graph = GRAPHS[name]
    rows = graph.num_nodes if order % 2 else graph.num_edges
    with precision(DOUBLE):
        solver = so.trend_solver(graph, order)
        pull = jnp.asarray(rng.normal(size=N))

        @jax.jit
        def found(y, weight, node_weights):
            fit = solver(y, so.L1(weight), node_weights, tol=1e-13, max_steps=100_000)
            return jnp.stack([jnp.vdot(pull, fit.value), fit.objective])

        point = (
            jnp.asarray(signal(rng)),
            jnp.asarray(rng.uniform(0.3, 0.6, rows)),
            jnp.asarray(rng.uniform(0.5, 2, N)),
        )
        move = tuple(jnp.asarray(rng.normal(size=part.shape)) for part in point)
        gradients = jax.jit(jax.jacrev(found, (0, 1, 2)))(*point)
        for place, (gradient, along) in enumerate(zip(gradients, move, strict=True)):
            ends = [found(*(p + s * along if i == place else p for i, p in enumerate(point))) for s in (1e-5, -1e-5)]
            np.testing.assert_allclose(gradient @ along, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_the_jacobian_in_y_is_the_mean_of_every_piece_at_order_0(rng):
    with precision(DOUBLE):
        solver = so.trend_solver(GRAPHS["chain"], 0)
        y = jnp.asarray(np.repeat([0.0, 3.0, 1.0, 5.0], 6) + 0.1 * rng.normal(size=N))
        fit = jax.jit(lambda y: solver(y, so.L1(0.5)).value)
        pieces = np.cumsum(np.r_[0, np.abs(np.diff(fit(y))) > 1e-9])
        same = pieces[:, None] == pieces
        np.testing.assert_allclose(jax.jit(jax.jacrev(fit))(y), same / same.sum(axis=1), atol=1e-9)


@pytest.mark.parametrize(("name", "order"), often([("chain", 0), ("grid", 1)], ("grid", 1)))
def test_vmap_over_signals_weights_and_node_weights_is_as_many_calls(rng, name, order):
    with precision(DOUBLE):
        solver = so.trend_solver(GRAPHS[name], order)
        signals = jnp.asarray(np.stack([signal(rng) for _ in range(64)]))
        weights, nodes = jnp.asarray(rng.uniform(0.1, 2, 64)), jnp.asarray(rng.uniform(0.5, 2, (64, N)))
        one = jax.jit(lambda y, weight, nodes: solver(y, so.L1(weight), nodes, tol=1e-8))
        many = jax.jit(jax.vmap(one))(signals, weights, nodes)
        each = [one(*lane) for lane in zip(signals, weights, nodes, strict=True)]
        np.testing.assert_allclose(many.value, np.stack([fit.value for fit in each]), atol=1e-12)
        np.testing.assert_array_equal(many.steps, np.stack([fit.steps for fit in each]))
        assert set(np.asarray(many.status)) == {Status.CONVERGED}


def test_a_call_is_trend_filter_and_a_start_makes_it_short(rng):
    y = signal(rng)
    for name, penalty, node_weights in (("grid", so.L1(0.5), rng.uniform(0.5, 2, N)), ("graph", so.MCP(0.5), None)):
        graph = GRAPHS[name]
        with precision(DOUBLE):
            solver = so.trend_solver(graph, 1, "doge")
            found = solver(y, penalty, node_weights)
            again = solver(y, penalty, node_weights, start=found)
        expected = so.trend_filter(y, graph, penalty, 1, "doge", node_weights=node_weights)
        np.testing.assert_allclose(found.value, expected.value, atol=1e-12)
        assert int(found.steps) == int(expected.steps)
        assert int(again.steps) < int(found.steps) / 2


def test_channels_and_pictures_keep_their_shape(rng):
    picture = rng.normal(size=(4, 6, 3)).astype(np.float32)
    solver = so.trend_solver(GRAPHS["grid"], 0, channels=3)
    found = solver(picture, so.GroupL2(0.5), tol=1e-4)
    assert found.value.shape == picture.shape
    np.testing.assert_allclose(
        solver(picture.reshape(N, 3), so.GroupL2(0.5), tol=1e-4).value, found.value.reshape(N, 3)
    )


def test_traced_once_for_all_signals_weights_and_gradients(rng, traces_of):
    traces = traces_of(Admm)
    forget(iterate_module._iterate)
    forget(plan_module.fit)
    solver = so.trend_solver(so.Graph.grid((3, 5)), 0)
    loss = jax.jit(jax.grad(lambda y, weight: jnp.sum(solver(y, so.L1(weight)).value ** 2)))
    for _ in range(3):
        y = jnp.asarray(rng.normal(size=(3, 5)))
        solver(y, so.L1(rng.uniform(0.1, 1)))
        loss(y, rng.uniform(0.1, 1))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: so.trend_solver(GRAPHS["chain"], method="interior"), "works on the host"),
        (lambda: so.trend_solver(GRAPHS["chain"], method="newton"), "unknown method 'newton'; known are auto, doge"),
        (lambda: so.trend_solver(GRAPHS["grid"], method="fast_admm"), "needs a chain"),
        (lambda: so.trend_solver(GRAPHS["chain"], method=so.trend.Doge(B=2)), "B is a whole number from 1 to 1"),
        (lambda: so.trend_solver(GRAPHS["chain"], -1), "order is a whole number from 0"),
        (lambda: so.trend_solver(GRAPHS["chain"])(np.ones(N), so.ElasticNet(1.0, -1.0)), "ridge must not be negative"),
        (lambda: so.trend_solver(GRAPHS["chain"])(np.ones(N), so.Box(2.0, 1.0)), "must be low <= high"),
        (lambda: so.trend_solver(GRAPHS["chain"], channels=0), "channels is a whole number of at least 1"),
        (lambda: so.trend_solver(GRAPHS["chain"], dtype=np.float64), "needs 64-bit types"),
        (lambda: so.trend_solver(GRAPHS["chain"], dtype=np.float16), "float32 or float64"),
        (lambda: so.trend_solver(so.Graph.from_edges([], 3)), "no edges"),
        (lambda: so.trend_solver((3, 4)), "sparseopt.Graph"),
        (lambda: jax.jit(lambda y: so.trend_filter(y, GRAPHS["chain"], so.L1(1.0)))(np.zeros(N)), "make a solver by"),
        (lambda: so.trend_solver(GRAPHS["chain"])(np.zeros(5), so.L1(1.0)), "have the shape (24,)"),
        (lambda: so.trend_solver(GRAPHS["chain"])(np.zeros(N), so.L1(np.ones(5))), "each of the 23 rows"),
        (lambda: so.trend_solver(GRAPHS["chain"])(np.zeros(N), so.L1(1.0), np.ones(3)), "24 nodes need as many"),
        (lambda: so.trend_solver(GRAPHS["chain"], 0, "fast_admm")(np.zeros(N), so.MCP(1.0)), "solves the L1 penalty"),
        (lambda: so.trend_solver(GRAPHS["grid"], 1, "admm")(np.zeros(N), 5.0), "`value` and `prox`"),
        (lambda: so.trend_solver(GRAPHS["chain"])(np.zeros(N), so.L1(-1.0)), "weight must not be negative, given -1.0"),
        (
            lambda: so.trend_solver(GRAPHS["chain"])(np.zeros(N), Doubled(-1.0)),
            "weight must not be negative, given -1.0",
        ),
        (
            lambda: so.trend_solver(GRAPHS["grid"], 0, "doge_groups")(np.zeros(N), so.GroupL2(0.5, axis=0)),
            'for isotropic total variation use "doge"',
        ),
    ],
)
def test_what_does_not_fit_is_said(call, text, monkeypatch):
    monkeypatch.setattr(plan_module, "iterate", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert text in str(caught.value)


@pytest.mark.thorough
@pytest.mark.parametrize("order", [0, 1])
def test_the_literal_form_is_found_by_its_name_and_ends_where_the_fused_form_does(rng, order):
    for graph in (GRAPHS["grid"], GRAPHS["graph"], dataclasses.replace(GRAPHS["grid"], spacing=(1.0, 3.0))):
        y = signal(rng)
        one, other = (so.trend_filter(y, graph, so.L1(0.5), order, name, tol=1e-9) for name in ("doge", "doge_groups"))
        np.testing.assert_allclose(one.value, other.value, atol=1e-3)
        assert other.gap <= 1e-9


def test_a_start_of_a_larger_weight_is_no_certificate_by_itself():
    """Its dual lies outside the ball of the smaller weight, and no step brings it inside."""
    solver, y = so.trend_solver(so.Graph.chain(6), order=0, method="doge"), np.r_[0.1, -0.1, 0, 5.1, 4.9, 5]
    found = solver(y, so.L1(0.05), max_steps=0, start=solver(y, so.L1(3.0)))
    optimum = float(solver(y, so.L1(0.05), tol=1e-6).objective)
    assert int(found.steps) == 0
    assert float(found.gap) >= float(found.objective) / optimum - 1 > 1


def test_a_negative_weight_under_jit_is_no_answer():
    """Where it is known it is an error; see above."""
    solver, y = so.trend_solver(so.Graph.chain(6), method="doge"), np.r_[0.1, -0.1, 0, 5.1, 4.9, 5]
    found = jax.jit(lambda weight: solver(y, so.L1(weight)))(-1.0)
    assert Status(int(found.status)) is Status.NONFINITE
    assert np.isnan(found.value).all()


@so.pytree
class Doubled:
    """A penalty of a user's own."""

    weight: object

    def value(self, x):
        return self.weight * jnp.sum(jnp.abs(x))

    def prox(self, x, step):
        return so.L1(self.weight).prox(x, step)


def test_the_walk_from_a_call_to_its_loop_is_short(rng, monkeypatch):
    """Files of the package that a call on a grid passes before its loop, and how often it goes from one to another."""
    package = Path(so.__file__).parent
    y, graph, walked, program = rng.normal(size=(20, 30)), so.Graph.grid((20, 30)), [], plan_module.fit
    so.trend_filter(y, graph, so.L1(1.0))

    def walk(frame, event, _):
        if event == "call" and package in (file := Path(frame.f_code.co_filename)).parents:
            walked.append(file)

    def loop(*args, **kwargs):
        sys.setprofile(None)
        return program(*args, **kwargs)

    monkeypatch.setattr(plan_module, "fit", loop)
    sys.setprofile(walk)
    try:
        so.trend_filter(y, graph, so.L1(1.0))
    finally:
        sys.setprofile(None)
    assert len(set(walked)) <= 11
    assert sum(a != b for a, b in itertools.pairwise(walked)) <= 42


def test_names_of_methods_are_compared_in_one_file():
    room = Path(so.__file__).parent / "trend"
    files = set()
    for file in room.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                if any(value in (AUTO, *METHODS) for value in constants if isinstance(value, str)):
                    files.add(file.relative_to(room).as_posix())
    assert files <= {"methods/choice.py"}
