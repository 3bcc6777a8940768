"""A line of devices, of this process or of many, and arrays that are distributed over it.

Each process holds the parts of its own devices only, and every process runs the same program.
"""

import contextlib
import functools
import math
import numbers
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The name of the line's only axis.
AXIS = "devices"

Devices = int | Literal["all"] | Mesh | None


def device_line(devices: Devices) -> Mesh | None:
    """The devices to use, as a mesh of one axis; None for JAX's default device.

    Args:
        devices: the number of devices, over all processes; "all"; a `Mesh` of one axis named "devices"; or None for one
            device. Several processes use all their devices.

    Raises:
        ValueError: for a number below 1 or above the number of devices, or a mesh with other axes.
    """
    if devices is None:
        return None
    if isinstance(devices, Mesh):
        if devices.axis_names != (AXIS,):
            raise ValueError(f'the mesh must have one axis, "{AXIS}", given the axes {devices.axis_names}')
        return devices if devices.size > 1 else None
    present = jax.devices()
    if devices == "all":
        devices = len(present)
    if isinstance(devices, bool) or not isinstance(devices, numbers.Integral) or not 1 <= devices <= len(present):
        raise ValueError(
            f'devices must be a number from 1 to {len(present)}, what JAX sees here, or "all"; given {devices!r}. '
            "On a CPU the environment variable XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight"
        )
    if jax.process_count() > 1 and devices != len(present):
        raise ValueError(
            f"{jax.process_count()} processes work on all their {len(present)} devices together, given {devices}"
        )
    return None if devices == 1 else Mesh(np.asarray(present[:devices]), (AXIS,))


def over(mesh: Mesh, axis: int | None = 0) -> NamedSharding:
    """The layout that cuts one axis of an array into one equal part per device; None replicates the array."""
    return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS))


def on_device(tree: Any) -> Any:
    """A tree with its host arrays and numbers on the default device; arrays of JAX stay where they are.

    A copy and no more: `jnp.asarray` compiles a program for every shape, and makes two.
    """
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), tree)


def allocate(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """A host array to fill, of which `on_device` makes no copy on a CPU; do not change it after that.

    JAX takes over memory that begins at a multiple of 64 bytes. NumPy's begins at 16 bytes after one.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def put(values: Any, layout: NamedSharding) -> jax.Array:
    """A host array, the same in every process, distributed over a mesh; each process copies its own parts only."""
    values = np.asarray(values)
    return jax.make_array_from_callback(values.shape, layout, lambda part: values[part])


def whole(values: Any) -> Any:
    """A distributed array, or a tree of them, as host arrays in every process; all processes must call this."""
    apart = [leaf for leaf in jax.tree.leaves(values) if not (leaf.is_fully_addressable or leaf.is_fully_replicated)]
    if apart:
        values = _bring_together(over(apart[0].sharding.mesh, None))(values)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf if leaf.is_fully_addressable else leaf.addressable_data(0)), values
    )


@functools.cache
def _bring_together(layout: NamedSharding) -> Any:
    """A function that changes the layout; cached, since a new function would be compiled again at each call."""
    return jax.jit(lambda tree: tree, out_shardings=layout)


def at_work(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which programs are traced for arrays over a mesh, for `parts_at_work`."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def parts_at_work() -> int:
    """The number of parts of arrays in the program that is being traced; 1 outside `at_work`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape.get(AXIS, 1)
