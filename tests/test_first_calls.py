"""First calls: how many programs they trace and compile, which is where nearly all of their time goes."""

import jax
import numpy as np
import pytest

import sparseopt as so

COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED = "/jax/core/compile/jaxpr_trace_duration"


def lasso(rows, columns):
    rng = np.random.default_rng(0)
    matrix, target = rng.standard_normal((rows, columns)), rng.standard_normal(rows)
    return so.Problem(so.LeastSquares(matrix.astype(np.float32), target.astype(np.float32)), so.L1(2.0))


@pytest.fixture
def counted():
    """The programs that a call compiles, or takes from the folder of the tests, and what it traces."""
    seen = []

    def listen(event, _duration, **_):
        seen.append(event)

    def count(call):
        seen.clear()
        jax.block_until_ready(call())
        return seen.count(COMPILED), seen.count(TRACED)

    # This asks once whether jaxlib knows the options of quick programs.
    so.solve(lasso(4, 3), solver=so.AcceleratedProximalGradient())
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_first_solve_is_one_program_and_the_next_size_none(counted):
    assert counted(lambda: so.solve(lasso(45, 19)))[0] == 1
    for rows, columns in ((46, 19), (44, 20), (43, 21)):
        assert counted(lambda shape=(rows, columns): so.solve(lasso(*shape))) == (0, 0)


def test_a_first_fit_is_a_program_for_the_signal_one_for_the_fit_and_one_that_judges_the_means_of_its_pieces(counted):
    y = np.random.default_rng(0).standard_normal((6, 7))
    assert counted(lambda: so.trend_filter(y[0], so.Graph.chain(7), so.L1(0.5)))[0] == 2  # exact: they are its pieces
    assert counted(lambda: so.trend_filter(y, so.Graph.grid((6, 7)), so.L1(0.1)))[0] <= 3


@pytest.mark.parametrize(("max_steps", "loops"), [(0, False), (1, True)])
def test_a_solve_of_no_steps_has_no_loop(max_steps, loops):
    program = jax.jit(lambda b: so.solve(so.Problem(so.LeastSquares(np.eye(5), b), so.L1(2.0)), max_steps=max_steps))
    assert ("while" in program.lower(np.ones(5)).as_text()) == loops
