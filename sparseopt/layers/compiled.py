"""Programs compiled ahead of time, so that compiling and running are timed separately."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from sparseopt.core.base.dense import activation_precision
from sparseopt.core.base.mesh import on_device, over, put


class Timed(NamedTuple):
    """A finished result, the seconds it took on the device, and the seconds spent compiling for it (0 if cached)."""

    value: Any
    seconds: float
    compile_seconds: float


class Compiled:
    """A pure function compiled once for each structure, shape, dtype and layout of its arguments and each precision.

    The precision is that of products of activations, see `core.dense`.

    Where an argument is spread over several devices, those on one device are copied whole to each of them: a program
    runs on all devices or on one. What is used more than once is better copied before, by `laid_on`.
    """

    def __init__(self, function: Callable[..., Any], donate_argnums: tuple[int, ...] = ()) -> None:
        self._jitted = jax.jit(function, donate_argnums=donate_argnums)
        self._programs: dict[Any, Any] = {}

    @property
    def texts(self) -> list[str]:
        """The optimised programs in the order of their compilation."""
        return [program.as_text() for program in self._programs.values()]

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """The program before compilation, for arrays or their `jax.ShapeDtypeStruct`, of any device."""
        return self._jitted.lower(*arguments)

    def __call__(self, *arguments: Any) -> Timed:
        """Run to completion; the result's buffers are ready when this returns."""
        mesh = next((found for leaf in jax.tree.leaves(arguments) if (found := mesh_of(leaf))), None)
        arguments = laid_on(arguments, mesh) if mesh else on_device(arguments)
        leaves, structure = jax.tree.flatten(arguments)
        key = (activation_precision(), structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))
        spent = 0.0
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = self.lower(*arguments).compile()
            spent = time.perf_counter() - start
        start = time.perf_counter()
        value = jax.block_until_ready(self._programs[key](*arguments))
        return Timed(value, time.perf_counter() - start, spent)


def mesh_of(leaf: Any) -> Mesh | None:
    """The mesh that an array is spread over; None for one device and for anything but a JAX array."""
    layout = getattr(leaf, "sharding", None)
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def laid_on(tree: Any, mesh: Mesh | None) -> Any:
    """The tree with every leaf over the mesh: those that are not yet, whole on each device. Unchanged without one."""
    if mesh is None:
        return tree
    layout = over(mesh, None)
    return jax.tree.map(lambda leaf: leaf if mesh_of(leaf) else put(leaf, layout), tree)
