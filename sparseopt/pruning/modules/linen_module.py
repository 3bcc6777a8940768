"""A Flax Linen module with its variables: `Dense`, `DenseGeneral`, `Einsum`, `Conv`, and modules built from them.

Calls are observed with `flax.linen.intercept_methods`. The parts of a Linen module are known only after it has run.
"""

import copy
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sparseopt.pruning.modules.flax_module import FlaxModule, Structure, Values, kind_of, layout_of
from sparseopt.pruning.modules.layouts import Layout
from sparseopt.pruning.modules.watched import Discovery, Linear, Visit, block_names, is_traced, visited

Path = tuple[str, ...]


class LinenModule(FlaxModule):
    """A Linen module; its variables are never changed in place."""

    def __init__(self, module: Any, variables: Any, batch: Any, call: Callable[[Any, Any], Any] | None = None) -> None:
        """Run the module on one batch to see its parts."""
        super().__init__()
        self.module, self._given = module, variables
        self._bare = "params" not in variables
        whole = nn.meta.unbox({"params": variables} if self._bare else dict(variables))
        self._variables = {kind: flatten_dict(tree) for kind, tree in whole.items()}
        self._call = call or (lambda module, batch: module(batch))
        self._modules: dict[str, Any] = {}
        self._calls: list[tuple[str, tuple[str, ...], bool]] = []
        around: list[str] = []

        def seen(module: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            name = ".".join(module.path)
            # Without their names, similar blocks are equal.
            self._modules.setdefault(name, module.clone(parent=None, name=None))
            self._calls.append((name, tuple(around), is_traced(args, kwargs)))
            around.append(name)
            try:
                return run(*args, **kwargs)
            finally:
                around.pop()

        self._names: dict[Path, str] = {}
        with _calls_to(seen):
            self.forward(batch, None)
        self._find_parts()

    def _find_parts(self) -> None:
        params = self._variables["params"]
        arrays: dict[int, list[Path]] = {}
        for path, value in params.items():
            arrays.setdefault(id(value), []).append(path)
        self.linears = {}
        # In the order of the parameters, the order of the first calls in `init`.
        for path, kernel in params.items():
            name, part = ".".join(path[:-1]), self._modules.get(".".join(path[:-1]))
            kind = kind_of(type(part), "flax.linen")
            if path[-1] != "kernel" or kind is None:
                continue
            layout = layout_of(part, kind, kernel.shape)
            tied = tuple(".".join(each[:-1]) for each in arrays[id(kernel)] if each != path)
            shape = layout.shape(kernel.shape) if isinstance(layout, Layout) else (0, 0)
            self.linears[name] = Linear(shape, layout, tied)
        self.left_out = {
            ".".join(path): f"a weight of {list(value.shape)} of a part that is no linear layer, or was not called"
            for path, value in params.items()
            if value.ndim > 1 and ".".join(path[:-1]) not in self.linears
        }
        children: dict[str, list[tuple[str, type]]] = {}
        for name, part in self._modules.items():
            children.setdefault(name.rpartition(".")[0], [])
            if name:
                # `blocks_0` and `blocks_1` are entries of a list that has no name of its own.
                owner, _, last = name.rpartition(".")
                stem = re.sub(r"_?\d+$", "", last)
                place = f"{owner}/{stem}" if stem != last else owner
                children.setdefault(place, []).append((name, type(part)))
        lists = [name for name in children if "/" in name]
        for name in lists:
            children[name.partition("/")[0]] += [(name, list)]
        # A part that calls modules which it does not own has no values of its own to run on.
        open_ = {each for name, around, _ in self._calls for each in around if not name.startswith(f"{each}.")}
        self.blocks = [name for name in block_names(children, lists, self.linears) if name not in open_]
        self._names = {tuple(name.split(".")): name for name in (*self.linears, *self.blocks)}

    def discover(self, batch: Any) -> Discovery:
        """What the first batch calls, on which the parts were found."""
        found = Discovery()
        for name, around, hidden in self._calls:
            if hidden:
                found.hidden.add(name)
            if name in self.blocks:
                found.blocks[name] = found.blocks.get(name, 0) + 1
            elif name in self.linears:
                found.linears.setdefault(name, []).append(tuple(each for each in around if each in self.blocks))
        return found

    def _bound(self) -> dict[str, Any]:
        return {kind: unflatten_dict(flat) for kind, flat in self._variables.items()}

    def call(self, batch: Any) -> Any:
        def on_call(module: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return self._visit(self._names.get(module.path), run, args, kwargs)

        with _calls_to(on_call):
            return self._call(self.module.bind(self._bound()), batch)

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def part(self, name: str) -> tuple[Structure, Values]:
        path = tuple(name.split(".")) if name else ()
        values = {
            kind: unflatten_dict({own[len(path) :]: value for own, value in flat.items() if own[: len(path)] == path})
            for kind, flat in self._variables.items()
        }
        params = values.pop("params")
        module = self._modules[name] if name else self.module
        return LinenPart(module, None if name else self._call), (params, values)

    def set_params(self, name: str, params: Any) -> None:
        path = tuple(name.split(".")) if name else ()
        self._variables["params"] |= {path + own: value for own, value in flatten_dict(params).items()}

    def kernel(self, name: str) -> Any:
        return self._variables["params"][(*name.split("."), "kernel")]

    def write(self, name: str, weight: np.ndarray) -> None:
        kernel, params = self.kernel(name), self._variables["params"]
        shared = [path for path, value in params.items() if value is kernel]
        params |= dict.fromkeys(shared, self._as_kernel(name, weight))

    def dense(self) -> "LinenModule":
        other = copy.copy(self)
        other._variables = {kind: dict(flat) for kind, flat in self._variables.items()}
        other._here = threading.local()
        return other

    def result(self) -> Any:
        """The variables, in the structure that was given."""
        found = self._bound()["params"] if self._bare else self._bound()
        return jax.tree.unflatten(jax.tree.structure(self._given), jax.tree.leaves(found))


def _calls_to(function: Callable[..., Any]) -> AbstractContextManager[None]:
    """Redirect calls of modules to a function, with the module, its own call, and the arguments."""
    paths: list[Path] = []

    def seen(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = context.module.path
        # A class that calls its base class is one part.
        if context.method_name != "__call__" or paths[-1:] == [path]:
            return next_fun(*args, **kwargs)
        paths.append(path)
        try:
            return function(context.module, next_fun, args, kwargs)
        finally:
            paths.pop()

    return nn.intercept_methods(seen)


@jax.tree_util.register_static
@dataclass(frozen=True)
class LinenPart:
    """The structure of a part."""

    module: Any
    call: Callable[..., Any] | None = None  # of the whole module

    def __call__(self, values: Values, args: Any, kwargs: Any, visit: Visit | None) -> Any:
        params, rest = values
        bound = {"params": params, **rest}

        def on_call(module: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return visited(visit, ".".join(module.path), run, args, kwargs)

        with _calls_to(on_call):
            if self.call is not None:
                return self.call(self.module.bind(bound), *args)
            return self.module.apply(bound, *args, **kwargs)
