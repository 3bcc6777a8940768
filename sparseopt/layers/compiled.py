"""Programs compiled ahead of time, whose compiling is timed apart from the work."""

import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh, NamedSharding

from sparseopt.core.base.dense import activation_precision
from sparseopt.core.base.mesh import on_device, over, put


class Compiled:
    """A pure function compiled once for each structure, shape, dtype and layout of its arguments and each precision.

    The precision is the one of products of activations, see `core.base.dense`.

    If an argument is spread over several devices, arguments on one device are copied whole to each of them: a program
    runs on all devices or on one. What is used more than once is better copied before, with `laid_on`.

    Attributes:
        seconds: compile time of all programs of the process.
    """

    seconds: ClassVar[float] = 0.0

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

    def __call__(self, *arguments: Any) -> Any:
        """The result, whose buffers a GPU or TPU may still be computing."""
        mesh = next((found for leaf in jax.tree.leaves(arguments) if (found := mesh_of(leaf))), None)
        arguments = laid_on(arguments, mesh) if mesh else on_device(arguments)
        leaves, structure = jax.tree.flatten(arguments)
        key = (activation_precision(), structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = self.lower(*arguments).compile()
            Compiled.seconds += time.perf_counter() - start
        value = self._programs[key](*arguments)
        # A CPU would run several programs at once, each with its own workspace.
        return jax.block_until_ready(value) if jax.default_backend() == "cpu" else value


class Stopwatch:
    """Seconds since it was made, with compile time apart."""

    def __init__(self) -> None:
        self._start, self._compiling = time.perf_counter(), Compiled.seconds

    def read(self, awaited: Any = None) -> tuple[float, float]:
        """Seconds without compiling until the arrays `awaited` are ready, and seconds of compiling."""
        jax.block_until_ready(awaited)
        compiling = Compiled.seconds - self._compiling
        return time.perf_counter() - self._start - compiling, compiling


def mesh_of(leaf: Any) -> Mesh | None:
    """The mesh that an array is spread over; None for one device and for anything but a JAX array."""
    layout = getattr(leaf, "sharding", None)
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def laid_on(tree: Any, mesh: Mesh | None) -> Any:
    """The tree with every leaf over the mesh: other leaves are put whole on each device. Unchanged without a mesh."""
    if mesh is None:
        return tree
    layout = over(mesh, None)
    return jax.tree.map(lambda leaf: leaf if mesh_of(leaf) else put(leaf, layout), tree)
