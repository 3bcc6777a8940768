"""The frozen-dataclass pytree decorator that every problem, penalty, solver and state uses; 64-bit types."""

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

T = TypeVar("T")
FloatArray = Float[Array, "..."]
BoolArray = Bool[Array, "..."]
Scalar = Float[Array, ""] | float
Count = Int[Array, ""] | int
# Called during long work: what is being done (a text, or an event such as a layer's record), steps done, steps in all.
Observer = Callable[[Any, int, int], None]


def wide_types() -> bool:
    """Whether 64-bit types are enabled, by the global flag or by a context."""
    return jnp.result_type(float) == jnp.float64


def is_traced(tree: Any) -> bool:
    """Whether the values of a tree, or some of them, are not known, as inside a function that is being compiled."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def known_on_cpu(tree: Any) -> bool:
    """Whether all arrays of a tree are known, and those of JAX on a CPU."""
    leaves = jax.tree.leaves(tree)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return not is_traced(arrays) and all({d.platform for d in leaf.devices()} == {"cpu"} for leaf in arrays)


def namespace(values: Any) -> Any:
    """`jax.numpy` for a JAX array, even a traced one; else `numpy`."""
    return jnp if isinstance(values, jax.Array) else np


def precision(dtype: np.dtype) -> contextlib.AbstractContextManager[Any]:
    """A context with 64-bit types if `dtype` needs them."""
    return jax.enable_x64(True) if dtype == np.float64 and not wide_types() else contextlib.nullcontext()


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree's structure: a choice, not an array. Changing it retraces."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@overload
def pytree(cls: type[T]) -> type[T]: ...
@overload
def pytree(*, eq: bool = True) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: Any = None, *, eq: bool = True) -> Any:
    """Make a class a frozen dataclass and a JAX pytree: plain fields are leaves, `static()` fields are structure.

    `dataclasses.replace` makes a changed copy. Changing a leaf between calls of a jitted function needs no new trace;
    changing a static field does. A class with a `prox` is a penalty: its `value` and `prox` turn integers into floats.
    """

    def wrap(cls: Any) -> Any:
        cls = dataclasses.dataclass(frozen=True, eq=eq)(cls)
        fields = dataclasses.fields(cls)
        meta = tuple(f.name for f in fields if f.metadata.get("static"))
        data = tuple(f.name for f in fields if not f.metadata.get("static"))
        _register(cls, data, meta)
        for name in ("value", "prox") if hasattr(cls, "prox") else ():
            method = inspect.getattr_static(cls, name, None)
            if isinstance(method, types.FunctionType) and not hasattr(method, "__wrapped__"):
                setattr(cls, name, _of_floats(method))
        return cls

    return wrap if cls is None else wrap(cls)


def _of_floats(method: Any) -> Any:
    """The method for floats: arrays of integers, whose dtype would round thresholds, are converted."""

    @functools.wraps(method)
    def called(self: Any, *given: Any, **named: Any) -> Any:
        if given and isinstance(given[0], np.ndarray | jax.Array) and given[0].dtype.kind in "biu":
            given = (jnp.asarray(given[0], jnp.result_type(float)), *given[1:])
        return method(self, *given, **named)

    return called


def _register(cls: type, data: tuple[str, ...], meta: tuple[str, ...]) -> None:
    """Register a node type whose structure equals only that of its own class.

    `jax.tree_util.register_dataclass` of jaxlib 0.10 compares the static fields of two nodes but not their types. Two
    penalties with one weight each then have equal structures, and if their hashes agree in 7 bits, `jax.jit` runs the
    program that it compiled for the other one.
    """
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(node, name) for name in data), tuple(getattr(node, name) for name in meta)

    def flatten_with_keys(node: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        leaves, choices = flatten(node)
        return tuple(zip(keys, leaves, strict=True)), choices

    def unflatten(choices: tuple[Any, ...], leaves: Any) -> Any:
        return cls(**dict(zip(data, leaves, strict=True)), **dict(zip(meta, choices, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
