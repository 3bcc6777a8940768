"""Programs on a CPU compile quickly, and nothing else about a call changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.core.base import compile as compile_module
from sparseopt.core.base.compile import OPTIONS, Jitted

NAMES, MOST = ("first", "second", "third"), [most for most, _ in OPTIONS]
FIRST, SECOND, _ = MOST


@pytest.mark.parametrize("size", [4, SECOND, SECOND + 1])
def test_a_shape_is_traced_once_and_every_transformation_gives_what_a_call_gives(size):
    traces = []

    def function(x, power):
        traces.append(x.shape)
        return (x**power).sum()

    call, x = Jitted(function, static_argnums=1), jnp.full(size, 2.0)
    for _ in range(3):
        assert float(call(x, 3)) == 8 * size
    assert traces == [(size,)]
    # Known arguments inside a traced function: its program is part of the one around it.
    assert jax.jit(lambda: call(x, 3))() == jax.jit(call, static_argnums=1)(x, 3) == 8 * size
    np.testing.assert_array_equal(jax.vmap(lambda a: call(a, 3))(jnp.stack([x, 2 * x])), [8 * size, 64 * size])
    np.testing.assert_array_equal(jax.grad(lambda a: call(a, 3))(x), 3 * x**2)
    assert jax.vmap(lambda scale: scale * call(x, 3))(jnp.ones(2)).tolist() == [8 * size, 8 * size]


@pytest.mark.parametrize(
    ("size", "program"),
    [(3, "first"), (FIRST, "first"), (FIRST + 1, "second"), (SECOND, "second"), (SECOND + 1, "third")],
)
def test_the_entries_choose_the_program(monkeypatch, size, program):
    call, taken = Jitted(lambda x: x), []
    monkeypatch.setattr(compile_module, "_knows_options", lambda: True)
    monkeypatch.setattr(call, "usual", lambda x: taken.append("usual"))
    programs = [(most, lambda x, name=name: taken.append(name)) for name, most in zip(NAMES, MOST, strict=True)]
    monkeypatch.setattr(call, "on_cpu", programs)
    call(np.ones(size, np.float32))
    jax.jit(call)(np.ones(size, np.float32))
    assert taken == [program, "usual"]


def test_a_jaxlib_that_does_not_know_the_options_compiles_as_usual(monkeypatch):
    assert compile_module._knows_options.__wrapped__()
    monkeypatch.setattr(compile_module, "OPTIONS", [(9, {"xla_no_such_option": 1})])
    assert not compile_module._knows_options.__wrapped__()
