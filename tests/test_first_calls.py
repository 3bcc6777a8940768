"""First calls: how many programs they trace and compile, which is where nearly all of their time goes."""

import jax
import numpy as np

import sparseopt as so
from tests.core.test_padding import lasso

COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED = "/jax/core/compile/jaxpr_trace_duration"


def counted(call):
    """The programs that a call compiles, or takes from the folder of the tests, and what it traces."""
    seen = []

    def listen(event, _duration, **_):
        seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(call())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return seen.count(COMPILED), seen.count(TRACED)


def test_a_first_solve_is_one_program_and_the_next_size_none():
    so.solve(lasso(4, 3))  # asks once whether jaxlib knows the options of quick programs
    jax.clear_caches()
    assert counted(lambda: so.solve(lasso(45, 19)))[0] == 1
    for rows, columns in ((46, 19), (44, 20), (43, 21)):
        assert counted(lambda shape=(rows, columns): so.solve(lasso(*shape))) == (0, 0)


def test_a_first_fit_is_one_program_and_one_that_judges_the_means_of_its_pieces():
    so.solve(lasso(4, 3))
    jax.clear_caches()
    y = np.random.default_rng(0).standard_normal((6, 7))
    assert counted(lambda: so.trend_filter(y[0], so.Graph.chain(7), so.L1(0.5)))[0] == 1  # exact: they are its pieces
    assert counted(lambda: so.trend_filter(y, so.Graph.grid((6, 7)), so.L1(0.1)))[0] <= 2


def test_a_solve_of_no_steps_has_no_loop():
    def loops(max_steps):
        problem = lasso(45, 19)
        text = (
            jax.jit(
                lambda b: so.solve(
                    so.Problem(so.LeastSquares(problem.loss.matrix, b), problem.penalty), max_steps=max_steps
                )
            )
            .lower(problem.loss.target)
            .as_text()
        )
        return text.count("while")

    assert loops(0) == 0 < loops(1)
