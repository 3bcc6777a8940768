"""`so.trend_solver`: plan once, call often, under jit, vmap and grad."""

import ast
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.base.types import is_traced, precision
from sparseopt.core.problem import iterate as iterate_module
from sparseopt.core.problem.problem import Status
from sparseopt.core.solvers.admm import Admm
from sparseopt.trend.methods import plan as plan_module
from sparseopt.trend.methods.choice import AUTO, METHODS
from tests.programs import forget

DOUBLE = np.dtype(np.float64)
N = 24


def test_the_jacobian_in_y_is_the_mean_of_every_piece_at_order_0(rng):
    with precision(DOUBLE):
        solver = so.trend_solver(so.Graph.chain(N, ends="graph"), 0)
        y = jnp.asarray(np.repeat([0.0, 3.0, 1.0, 5.0], 6) + 0.1 * rng.normal(size=N))
        fit = jax.jit(lambda y: solver(y, so.L1(0.5)).value)
        pieces = np.cumsum(np.r_[0, np.abs(np.diff(fit(y))) > 1e-9])
        same = pieces[:, None] == pieces
        np.testing.assert_allclose(jax.jit(jax.jacrev(fit))(y), same / same.sum(axis=1), atol=1e-9)


def test_channels_and_pictures_keep_their_shape(rng):
    picture = rng.normal(size=(4, 6, 3)).astype(np.float32)
    solver = so.trend_solver(so.Graph.grid((4, 6)), 0, channels=3)
    found = solver(picture, so.GroupL2(0.5), tol=1e-4)
    assert found.value.shape == picture.shape
    np.testing.assert_allclose(
        solver(picture.reshape(N, 3), so.GroupL2(0.5), tol=1e-4).value, found.value.reshape(N, 3)
    )


FIRST_CALLS = {
    "prox": lambda graph, x, weight: so.TotalVariation(graph, weight).prox(x, 1.0),
    "solver": lambda graph, x, weight: so.trend_solver(graph)(x, so.L1(weight)).value,
    "solve": lambda graph, x, weight: (
        so.solve(so.Problem(so.LeastSquares(None, x), so.TotalVariation(graph, weight)), max_steps=3).value
    ),
}


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("name", FIRST_CALLS)
def test_a_first_call_under_jit_leaves_no_tracer_in_the_tables_of_a_graph(name, kind):
    ring = [(i, (i + 1) % 12) for i in range(12)]
    with precision(np.dtype(kind)):
        for graph in (so.Graph.chain(12), so.Graph.grid((3, 4)), so.Graph.from_edges(ring)):
            x = np.ones(12, kind)
            jax.eval_shape(lambda weight, graph=graph, x=x: FIRST_CALLS[name](graph, x, weight), 1.0)
            assert not is_traced(so.trend_solver(graph).plans)


def test_a_solver_made_under_jit_is_trend_filter(rng):
    graph, y = so.Graph.grid((4, 6)), rng.normal(size=(4, 6)).astype(np.float32)
    found = jax.jit(lambda y, weight: so.trend_solver(graph)(y, so.L1(weight)).value)(y, 0.3)
    np.testing.assert_allclose(found, so.trend_filter(y, graph, so.L1(0.3)).check().value, atol=1e-2)


def test_a_call_with_a_nonconvex_penalty_is_trend_filter(rng):
    graph, y = so.Graph.grid((4, 6)), np.repeat(rng.normal(size=6), 4) * 3 + 0.3 * rng.normal(size=N)
    with precision(DOUBLE):
        found = so.trend_solver(graph, 1, "doge")(y, so.MCP(0.5))
    expected = so.trend_filter(y, graph, so.MCP(0.5), 1, "doge")
    np.testing.assert_allclose(found.value, expected.value, atol=1e-12)
    assert int(found.steps) == int(expected.steps)


def test_jit_grad_and_plain_calls_share_one_trace(rng, traces_of):
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


def test_a_start_of_a_larger_weight_is_no_certificate_by_itself():
    """Its dual lies outside the ball of the smaller weight, and no step brings it inside."""
    solver, y = so.trend_solver(so.Graph.chain(6), order=0, method="doge"), np.r_[0.1, -0.1, 0, 5.1, 4.9, 5]
    found = solver(y, so.L1(0.05), max_steps=0, start=solver(y, so.L1(3.0)))
    optimum = float(solver(y, so.L1(0.05), tol=1e-6).objective)
    assert int(found.steps) == 0
    assert float(found.gap) >= float(found.objective) / optimum - 1 > 1


def test_a_negative_weight_under_jit_is_no_answer():
    """Where it is known it is an error."""
    solver, y = so.trend_solver(so.Graph.chain(6), method="doge"), np.r_[0.1, -0.1, 0, 5.1, 4.9, 5]
    found = jax.jit(lambda weight: solver(y, so.L1(weight)))(-1.0)
    assert Status(int(found.status)) is Status.NONFINITE
    assert np.isnan(found.value).all()


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
