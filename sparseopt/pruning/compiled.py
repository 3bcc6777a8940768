"""Floor 6: programs compiled ahead of time, so that compiling and running are timed and counted apart."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Timed(NamedTuple):
    """A finished result, the seconds it ran on the device, and the seconds spent compiling for it (0 if cached)."""

    value: Any
    seconds: float
    compile_seconds: float


class Compiled:
    """A pure function compiled once for every distinct structure, shape and dtype of its arguments.

    Attributes:
        compilations: how many programs were compiled so far.
        compile_seconds: the time that took in all, tracing included.
    """

    def __init__(self, function: Callable[..., Any], donate_argnums: tuple[int, ...] = ()) -> None:
        self._jitted = jax.jit(function, donate_argnums=donate_argnums)
        self._programs: dict[Any, Any] = {}
        self.compilations = 0
        self.compile_seconds = 0.0

    def __call__(self, *arguments: Any) -> Timed:
        """Run to completion; the result's buffers are ready when this returns."""
        arguments = jax.tree.map(jnp.asarray, arguments)
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        spent = 0.0
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = self._jitted.lower(*arguments).compile()
            spent = time.perf_counter() - start
            self.compilations += 1
            self.compile_seconds += spent
        start = time.perf_counter()
        value = jax.block_until_ready(self._programs[key](*arguments))
        return Timed(value, time.perf_counter() - start, spent)
