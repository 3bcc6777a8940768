"""Floor 6: programs compiled ahead of time, so that compiling and running are timed and counted apart."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sparseopt.core.mesh import over, put


class Timed(NamedTuple):
    """A finished result, the seconds it ran on the device, and the seconds spent compiling for it (0 if cached)."""

    value: Any
    seconds: float
    compile_seconds: float


class Compiled:
    """A pure function compiled once for every distinct structure, shape, dtype and layout of its arguments.

    Where an argument lies over several devices, those that lie on one are laid whole on each of them: a program runs
    on all devices or on one. What is used more than once is better laid out before, by `laid_on`.

    Attributes:
        compilations: how many programs were compiled so far.
        compile_seconds: the time that took in all, tracing included.
    """

    def __init__(self, function: Callable[..., Any], donate_argnums: tuple[int, ...] = ()) -> None:
        self._jitted = jax.jit(function, donate_argnums=donate_argnums)
        self._programs: dict[Any, Any] = {}
        self.compilations = 0
        self.compile_seconds = 0.0

    @property
    def texts(self) -> list[str]:
        """The optimised programs in the order of their compilation."""
        return [program.as_text() for program in self._programs.values()]

    def __call__(self, *arguments: Any) -> Timed:
        """Run to completion; the result's buffers are ready when this returns."""
        mesh = next((found for leaf in jax.tree.leaves(arguments) if (found := mesh_of(leaf))), None)
        arguments = jax.tree.map(jnp.asarray, arguments) if mesh is None else laid_on(arguments, mesh)
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))
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


def mesh_of(leaf: Any) -> Mesh | None:
    """The line of devices that an array lies over; None for one device and for what is no array of JAX."""
    layout = getattr(leaf, "sharding", None)
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def laid_on(tree: Any, mesh: Mesh) -> Any:
    """The tree with every leaf over the mesh: those that are not yet, whole on each device."""
    layout = over(mesh, None)
    return jax.tree.map(lambda leaf: leaf if mesh_of(leaf) else put(leaf, layout), tree)
