"""The speed of JAX's default device: rates of large products and of its memory."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def measure_gflops(seconds: float = 0.7) -> float:
    """The rate of large float32 matrix products in full precision, in 10⁹ operations per second."""
    size = 1024 if jax.default_backend() == "cpu" else 4096
    matrix = jnp.full((size, size), 1 / size, jnp.float32)
    return 2 * size**3 / _time_of(partial(jnp.matmul, precision="highest"), (matrix, matrix), seconds) / 1e9


def measure_gigabytes(seconds: float = 0.2) -> float:
    """The rate at which memory is read and written, in 10⁹ bytes per second, counting both."""
    # Larger than any cache.
    values = jnp.zeros(2**26, jnp.float32)
    return 2 * values.nbytes / _time_of(lambda x: x + 1, (values,), seconds) / 1e9


def _time_of(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> float:
    """The mean time of a call, measured for about this many seconds, without compilation."""
    run = jax.jit(function)
    jax.block_until_ready(run(*arguments))
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or not done:
        jax.block_until_ready(run(*arguments))
        done += 1
    return spent / done
