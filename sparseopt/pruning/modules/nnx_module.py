"""A Flax NNX module: `Linear`, `LinearGeneral`, `Einsum`, `Conv`, and modules built from them, such as attention.

While a module is watched, the `__call__` of these classes, and of its blocks, passes the calls of its parts to a visit.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jax
import numpy as np
from flax import nnx

from sparseopt.pruning.modules.flax_module import FlaxModule, Structure, Values, kind_of, layout_of
from sparseopt.pruning.modules.layouts import Layout
from sparseopt.pruning.modules.watched import Linear, Visit, block_names, visited

# By thread: the function that calls of patched classes go to, see `_patched`.
_here = threading.local()
# The original `__call__` of each patched class, and how many watch it.
_own_calls: dict[type, tuple[Any, int]] = {}
_lock = threading.Lock()


class NnxModule(FlaxModule):
    """An NNX module; a copy of it runs and is changed."""

    def __init__(self, module: Any, call: Callable[[Any, Any], Any] | None = None, *, inplace: bool = False) -> None:
        super().__init__()
        self._given, self._inplace = module, inplace
        self._call = call or (lambda module, batch: module(batch))
        self.module = nnx.clone(module)
        self.module.eval()
        tree = _Tree(self.module)
        self._parts, variables = tree.parts, dict[int, list[str]]()
        for path, variable in tree.variables:
            variables.setdefault(id(variable), []).append(path)
        kinds = {name: kind for name, part in tree.parts.items() if (kind := kind_of(type(part), "flax.nnx"))}
        self.linears = {}
        for name, kind in kinds.items():
            kernel = tree.parts[name].kernel
            layout = layout_of(tree.parts[name], kind, kernel.shape)
            tied = tuple(path.removesuffix(".kernel") for path in variables[id(kernel)] if path != f"{name}.kernel")
            shape = layout.shape(kernel.shape) if isinstance(layout, Layout) else (0, 0)
            self.linears[name] = Linear(shape, layout, tied)
        self.left_out = {
            path: f"a weight of {list(variable.shape)} that is no linear's"
            for path, variable in tree.variables
            if isinstance(variable, nnx.Param) and len(variable.shape) > 1 and path.rpartition(".")[0] not in kinds
        }
        self.blocks = block_names(tree.children, tree.lists, self.linears)

    def call(self, batch: Any) -> Any:
        # Caches, counters and sown values begin each pass as they were given.
        graph, params, *others = nnx.split(self.module, nnx.Param, ...)
        module = nnx.merge(graph, params, *jax.tree.map(lambda leaf: leaf, others), copy=False)
        watched = {*self.linears, *self.blocks}
        names = {id(part): name for name, part in _Tree(module).parts.items() if name in watched}

        def on_call(part: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return self._visit(names.get(id(part)), run, args, kwargs)

        with _visited(on_call):
            return self._call(module, batch)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with _patched(type(self._parts[name]) for name in (*self.linears, *self.blocks)):
            yield

    def part(self, name: str) -> tuple[Structure, Values]:
        graph, params, *rest = nnx.split(self._parts[name], nnx.Param, ...)
        return NnxPart(graph, None if name else self._call), (params, rest[0])

    def set_params(self, name: str, params: Any) -> None:
        nnx.update(self._parts[name], params)

    def kernel(self, name: str) -> Any:
        return self._parts[name].kernel[...]

    def write(self, name: str, weight: np.ndarray) -> None:
        self._parts[name].kernel[...] = self._as_kernel(name, weight)

    def dense(self) -> "NnxModule":
        return NnxModule(self.module, self._call)

    def result(self) -> Any:
        found = self._given if self._inplace else nnx.clone(self._given)
        nnx.update(found, nnx.state(self.module, nnx.Any(nnx.Param, nnx.PathContains("kernel"))))
        return found


@jax.tree_util.register_static
@dataclass(frozen=True)
class NnxPart:
    """The structure of a part."""

    graph: Any
    call: Callable[..., Any] | None = None  # of the whole module

    def __call__(self, values: Values, args: Any, kwargs: Any, visit: Visit | None) -> Any:
        part = nnx.merge(self.graph, *values, copy=True)  # changed in this program alone
        names = {} if visit is None else {id(own): name for name, own in _Tree(part).parts.items()}

        def on_call(own: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return visited(visit, names.get(id(own)), run, args, kwargs)

        with _visited(on_call):
            return part(*args, **kwargs) if self.call is None else self.call(part, *args)


class _Tree:
    """The parts of a module.

    Attributes:
        parts: the modules by name, each under its first name.
        variables: the names of all variables; shared ones appear under each of their names.
        children: names and classes of the modules in each part and list, by its name.
        lists: the names of the lists.
    """

    def __init__(self, module: Any) -> None:
        self.parts: dict[str, Any] = {}
        self.variables: list[tuple[str, Any]] = []
        self.children: dict[str, list[tuple[str, type]]] = {}
        self.lists: list[str] = []
        self._known: set[int] = set()
        self._add("", module)

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, nnx.Variable):
            self.variables.append((name, value))
            return
        if not isinstance(value, nnx.Pytree | list | tuple | dict) or id(value) in self._known:
            return
        self._known.add(id(value))
        is_list = isinstance(value, nnx.List | list | tuple)
        if isinstance(value, nnx.Module) and not is_list:
            self.parts[name] = value
        if is_list:
            self.lists.append(name)
            entries = {str(index): each for index, each in enumerate(value)}
        elif isinstance(value, dict):
            entries = {str(key): each for key, each in value.items()}
        else:
            entries = {key: each for key, each in vars(value).items() if not key.startswith("_pytree")}
        below = {f"{name}.{key}".lstrip("."): each for key, each in entries.items()}
        kinds = (nnx.Pytree, list, tuple, dict)
        self.children[name] = [
            (path, type(each))
            for path, each in below.items()
            if isinstance(each, kinds) and not isinstance(each, nnx.Variable)
        ]
        for path, each in below.items():
            self._add(path, each)


@contextmanager
def _visited(function: Callable[..., Any] | None) -> Iterator[None]:
    """In this thread, redirect calls of patched classes to a function of a part, its own call, and the arguments."""
    before, _here.function = getattr(_here, "function", None), function
    try:
        yield
    finally:
        _here.function = before


@contextmanager
def _patched(classes: Iterable[type]) -> Iterator[None]:
    """Redirect the calls of classes, and of the classes that they inherit it from, to the function of their thread."""
    owners = {owner for own in classes if (owner := _owner(own)) is not None}
    with _lock:
        for owner in owners:
            run, count = _own_calls.get(owner, (vars(owner)["__call__"], 0))
            if not count:
                owner.__call__ = _passing(owner, run)  # type: ignore[method-assign]
            _own_calls[owner] = run, count + 1
    try:
        yield
    finally:
        with _lock:
            for owner in owners:
                run, count = _own_calls.pop(owner)
                if count > 1:
                    _own_calls[owner] = run, count - 1
                else:
                    owner.__call__ = run  # type: ignore[method-assign]


def _owner(own: type) -> type | None:
    """The class from which a class inherits its `__call__`."""
    return next((c for c in own.__mro__ if "__call__" in vars(c)), None)


def _passing(owner: type, run: Any) -> Callable[..., Any]:
    @wraps(run)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        function, bound = getattr(_here, "function", None), run.__get__(self, type(self))
        # A class that calls its base class is one part.
        if function is None or _owner(type(self)) is not owner:
            return bound(*args, **kwargs)
        return function(self, bound, args, kwargs)

    return call
