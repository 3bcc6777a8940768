"""Floor 0: the frozen-dataclass pytree decorator that every problem, penalty, solver and state uses."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform, overload

import jax

T = TypeVar("T")


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

    `dataclasses.replace` makes a changed copy. Leaves may be changed between calls of a jitted function
    without a new trace; static fields may not.
    """

    def wrap(cls: Any) -> Any:
        cls = dataclasses.dataclass(frozen=True, eq=eq)(cls)
        fields = dataclasses.fields(cls)
        meta = [f.name for f in fields if f.metadata.get("static")]
        data = [f.name for f in fields if not f.metadata.get("static")]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)

    return wrap if cls is None else wrap(cls)
