"""Anderson acceleration of a fixed-point map, and of the ADMM that uses it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.operators.differences import Difference, GridBase
from sparseopt.core.operators.maps import standard_split
from sparseopt.core.operators.normal_solves import cosine_solve
from sparseopt.core.problem.problem import Problem, Start
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.anderson import empty_memory, extrapolate, forget

pytestmark = pytest.mark.usefixtures("double")


def affine_map(rng, n):
    """A slow averaged map `p -> A p + b`, `A = (I + Q) / 2` with Q orthogonal, and its fixed point."""
    skew = rng.standard_normal((n, n))
    orthogonal = np.linalg.qr(np.eye(n) + 0.2 * (skew - skew.T))[0]
    matrix = (np.eye(n) + orthogonal * np.sign(np.diagonal(orthogonal))) / 2
    answer = rng.standard_normal(n)
    return jnp.asarray(matrix), jnp.asarray(answer - matrix @ answer), answer


jitted = jax.jit(extrapolate)


def run(matrix, offset, calls, depth, carry):
    """Points after each call, with what was carried along."""
    point = jnp.zeros_like(offset)
    memory = empty_memory(point, carry @ point, depth)
    memory, point, _ = jitted(memory, point, carry @ point)
    points = []
    for _ in range(calls):
        image = matrix @ point + offset
        memory, point, carried = jitted(memory, image, carry @ image)
        points.append((memory, point, carried))
    return points


def plain(matrix, offset, calls):
    point = jnp.zeros_like(offset)
    for _ in range(calls):
        point = matrix @ point + offset
    return point


def test_an_affine_map_of_n_unknowns_is_solved_by_n_differences(rng):
    # There type II is GMRES: n differences span the space.
    matrix, offset, answer = affine_map(rng, 6)
    carry = jnp.asarray(rng.standard_normal((3, 6)))
    points = run(matrix, offset, 9, 8, carry)
    assert np.linalg.norm(points[-1][1] - answer) < 1e-6
    assert np.linalg.norm(plain(matrix, offset, 9) - answer) > 1e-2
    for _, point, carried in points:
        np.testing.assert_allclose(carried, carry @ point, atol=1e-9)


def test_a_short_memory_replaces_its_oldest_difference(rng):
    basis, answer = np.linalg.qr(rng.standard_normal((12, 12)))[0], rng.standard_normal(12)
    matrix = (basis * np.linspace(0, 0.98, 12)) @ basis.T
    matrix, offset = jnp.asarray(matrix), jnp.asarray(answer - matrix @ answer)
    memory, point, _ = run(matrix, offset, 30, 3, jnp.eye(12))[-1]
    assert np.linalg.norm(point - answer) < 0.1 * np.linalg.norm(plain(matrix, offset, 30) - answer)
    rows = np.asarray(memory.residuals)
    np.testing.assert_allclose(memory.products, rows @ rows.T, rtol=1e-6, atol=1e-20)


def test_a_grown_residual_is_not_extrapolated_and_a_forgotten_memory_starts_afresh(rng):
    matrix, offset, _ = affine_map(rng, 5)
    memory, point, _ = run(matrix, offset, 4, 4, jnp.eye(5))[-1]
    image = point + 3 * float(memory.last) * jnp.ones(5)
    after, following, beside = jitted(memory, image, 2 * image)
    np.testing.assert_array_equal(following, image)
    np.testing.assert_array_equal(beside, 2 * image)
    assert int(after.taken) == int(memory.taken) > 0
    assert int(after.known) == 1
    kept, dropped = (jax.jit(forget)(memory, now) for now in (False, True))
    assert int(kept.known) == int(memory.known) > 1
    for calls in range(3):
        image = matrix @ point + offset
        dropped, point, _ = jitted(dropped, image, image)
        # The start, one residual, and only then a difference.
        assert int(dropped.taken) == (calls == 2)
        if calls < 2:
            np.testing.assert_array_equal(point, image)


def test_the_bound_falls_and_stops_what_does_not_converge():
    # A residual that stays as it is: the extrapolations are few, and then the plain iteration goes on.
    def step(carry, shift):
        memory, point, _ = extrapolate(carry[0], carry[1] + shift, carry[1])
        return (memory, point), memory.taken

    start = empty_memory(jnp.zeros(4), jnp.zeros(4), 3), jnp.zeros(4)
    taken = jax.jit(lambda: jax.lax.scan(step, start, jnp.tile(jnp.eye(4), (375, 1)))[1])()
    assert 100 < taken[-1] < 1000
    assert taken[-1] == taken[-300]


def strong_problem(rng, side=6, weight=3.0):
    """Strong smoothing on a grid, split for the standard ADMM."""
    i, j = np.mgrid[:side, :side]
    y = 20 * ((i - side / 2) ** 2 + (j - side / 3) ** 2 < side**2 / 9) + 5 * rng.standard_normal((side, side))
    y = y - y.mean()
    split = standard_split(Difference(GridBase((side, side)), 2), np.float64)
    node_solve = jax.tree.map(jnp.asarray, cosine_solve((side, side), (2,), np.float64))
    start = Start(jnp.asarray(y), jnp.zeros(split.row_shape(jnp.asarray(y))))
    return Problem(so.LeastSquares(None, jnp.asarray(y)), so.L1(weight), split), node_solve, start


def test_acceleration_saves_steps_where_smoothing_is_strong(rng):
    problem, node_solve, start = strong_problem(rng, 32, 100.0)

    def steps(depth):
        found = so.solve(problem, Admm(node_solve, 20.0, acceleration=depth), start, tol=1e-7, max_steps=20_000)
        assert int(found.status) == so.Status.CONVERGED
        return int(found.steps)

    assert steps(10) < 0.8 * steps(0)


def test_what_is_not_convex_is_not_accelerated_and_a_settled_start_keeps_its_rho(rng):
    problem, node_solve, start = strong_problem(rng)
    solver = Admm(node_solve, 1.0, acceleration=5)

    def past(solver, problem):
        return jax.eval_shape(solver.init, problem, start).past

    assert past(solver, problem) is not None
    assert past(solver, dataclasses.replace(problem, penalty=so.MCP(3.0))) is None
    assert past(dataclasses.replace(solver, acceleration=0), problem) is None
    for settled in (True, False):
        given = dataclasses.replace(start, rho=5.0, settled=jnp.asarray(settled))
        found = so.solve(problem, solver, given, tol=1e-8, max_steps=2000, history=True)
        assert int(found.status) == so.Status.CONVERGED
        rho = np.asarray(found.history.extra["rho"])[: int(found.steps)]
        rho = set(rho[np.isfinite(rho)].tolist())
        assert rho == {5.0} if settled else len(rho) > 1
