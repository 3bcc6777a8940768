"""A module whose linear layers can be watched while it runs, in any framework.

A part is a linear layer, or an entry of a list of blocks; its name is its path, such as
`encoder.layers.0.attention.query`. A `Visit` replaces calls of parts. See `nnx_module`, `linen_module`, `torch_module`.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.types import pytree, static
from sparseopt.pruning.base.grams import Grams
from sparseopt.pruning.modules.lanes import PartCall
from sparseopt.pruning.modules.layouts import Layout

# Called in place of a part; returns its output.
Visit = Callable[[PartCall], Any]
# What layers read in each of their calls.
Inputs = Mapping[str, Sequence[Any]]


class Linear(NamedTuple):
    """A linear layer of a module.

    Attributes:
        shape: `(out, in)` of its weight.
        layout: how its kernel becomes a matrix, or why it cannot be pruned.
        tied: the names of others that have the very same weight: layers, and parameters of other parts.
    """

    shape: tuple[int, int]
    layout: Layout | str
    tied: tuple[str, ...] = ()


@dataclass
class Discovery:
    """The calls of a module for one batch, in the order of execution.

    Attributes:
        linears: for each call of a layer, the blocks in which it was called, the outermost first.
        blocks: how often each block was called.
        hidden: parts that were called inside a program that the module compiles itself.
    """

    linears: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)


@pytree
class Sums:
    """Grams of the distinct inputs of some layers.

    Attributes:
        found: the Grams of each input, by the first layer that reads it.
        readers: for each layer, the layer under whose name its Gram is stored.
    """

    found: dict[str, Grams]
    readers: tuple[tuple[str, str], ...] = static(default=())

    def __getitem__(self, name: str) -> Grams:
        return self.found[dict(self.readers)[name]]

    def __contains__(self, name: str) -> bool:
        return name in dict(self.readers)


_added = jax.jit(lambda one, two: jax.tree.map(jnp.add, one, two), donate_argnums=(0,))


def added(one: Sums | None, two: Sums) -> Sums:
    """Add both; if other layers share inputs or have a drift in the two, each layer has its own Grams."""
    if one is None:
        return two
    if len({jax.tree.structure(each) for each in (one, two)}) == 1:
        return _added(one, two)
    names = dict.fromkeys(name for name, _ in (*one.readers, *two.readers))
    found = {name: reduce(sum_of, [sums[name] for sums in (one, two) if name in sums]) for name in names}
    return Sums(found, tuple((name, name) for name in names))


class _Seen(NamedTuple):
    """One distinct input of layers."""

    value: Any  # kept, since identities are unique only among living objects
    version: int  # torch counts the writes to a tensor
    reading: tuple[Any, ...]  # how the layout reads it
    found: Any  # its Grams, or what is kept of it


class Observer:
    """A `Visit` that sums the Grams of layers' inputs before these may be written to.

    Layers that read the very same input share one Gram.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        gram: Callable[[Layout, Any, Any], Grams] | None,
        dense: Inputs | None = None,
        kept: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        """Set up for some layers.

        Args:
            layouts: layouts of the layers, by name.
            gram: returns the Grams of an input, with the drift from a dense input unless it is None; None for `inputs`.
            dense: inputs of the layers in the dense module.
            kept: what is kept of an input for `inputs`.
        """
        self._layouts, self._gram, self._dense, self._kept = layouts, gram, dense or {}, kept
        self._seen: list[_Seen] = []
        self._read: dict[str, list[int]] = {}

    def __call__(self, call: PartCall) -> Any:
        if call.name in self._layouts:
            self.read(call.name, input_of(call))
        return call.run()

    def read(self, name: str, value: Any) -> None:
        """Note the input of a layer."""
        layout, version = self._layouts[name], getattr(value, "_version", 0)
        reading, places = (layout.axes, layout.window), self._read.setdefault(name, [])
        for index, seen in enumerate(self._seen):
            if seen.value is value and (seen.version, seen.reading) == (version, reading):
                places.append(index)
                return
        found = None
        if self._gram is None:
            found = self._kept(value)
        else:
            others = self._dense.get(name, ())
            dense = others[len(places)] if len(places) < len(others) else None
            # Routed tokens may be others in the dense module.
            found = self._gram(layout, value, dense if dense is not None and dense.shape == value.shape else None)
        places.append(len(self._seen))
        self._seen.append(_Seen(value, version, reading, found))

    def _owners(self) -> dict[str, str]:
        """The layers, each with the first layer that reads the same inputs."""
        first: dict[tuple[int, ...], str] = {}
        return {name: first.setdefault(tuple(places), name) for name, places in self._read.items()}

    def inputs(self) -> Inputs:
        """What layers have read, by the first layer that reads it."""
        owners = set(self._owners().values())
        return {name: [self._seen[i].found for i in places] for name, places in self._read.items() if name in owners}

    def sums(self) -> Sums:
        found = {name: reduce(sum_of, grams) for name, grams in self.inputs().items()}
        return Sums(found, tuple(self._owners().items()))


def sum_of(one: Grams, two: Grams) -> Grams:
    """Add Grams of the same layer; without a drift if one has none."""
    return Grams._make(None if a is None or b is None else a + b for a, b in zip(one, two, strict=True))


def input_of(call: PartCall) -> Any:
    """The input of a layer."""
    return call.args[0] if call.args else next(iter(call.kwargs.values()))


def visited(
    visit: Visit | None, name: str | None, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The output of a call, from the visit if there is one and the part has a name."""
    return visit(PartCall(name, args, kwargs, run)) if visit is not None and name else run(*args, **kwargs)


class Watched(ABC):
    """A module and its parts by name.

    Attributes:
        linears: its linear layers, in the module's own order.
        blocks: the names of the entries of lists of blocks.
        left_out: other parts with weights of two axes or more, and why they are never pruned.
        gram: gives the Grams of a layer's input, with the drift from the dense module's input if there is one.
    """

    linears: dict[str, Linear]
    blocks: Sequence[str] = ()
    left_out: Mapping[str, str] = {}
    gram: Callable[[Layout, Any, Any], Grams]

    def __init__(self) -> None:
        self._here = threading.local()

    @abstractmethod
    def call(self, batch: Any) -> Any:
        """The module's output for a batch."""

    @abstractmethod
    def observed(self, call: PartCall, layouts: Mapping[str, Layout], dense: Inputs | None = None) -> Sums:
        """Sums of the layers' inputs in a called part as it is now; with `dense`, also drifts from these inputs."""

    @abstractmethod
    def inputs(self, call: PartCall, layouts: Mapping[str, Layout]) -> Inputs:
        """What layers read in a called part; for layers that read the same input, the first one."""

    @abstractmethod
    def output(self, call: PartCall) -> Any:
        """The output of a called part as it is now."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The weight of a layer, `[out, in]`."""

    @abstractmethod
    def write(self, name: str, weight: np.ndarray) -> None:
        """Set the weight of a layer."""

    @abstractmethod
    def dense(self) -> "Watched":
        """A copy of the module as it is now, unaffected by later writes."""

    @abstractmethod
    def result(self) -> Any:
        """The module as returned to the caller."""

    @abstractmethod
    def watching(self) -> AbstractContextManager[Any]:
        """The context in which calls of parts are visited, and the module computes as it does after training."""

    def forward(self, batch: Any, visit: Visit | None) -> Any:
        """The module's output for a batch; calls of its parts, in this thread, go to a visit."""
        try:
            with self._visited_by(visit):
                return self.call(batch)
        except Exception as error:
            error.add_note(
                f"the batch is a {type(batch).__name__}: `call` says how to feed it, by default module(batch)"
            )
            raise

    def read_by(self, batch: Any, layouts: Mapping[str, Layout]) -> Sums:
        """The sums of what layers read in all their calls."""
        observer = Observer(layouts, self.gram)

        def visit(call: PartCall) -> Any:
            if call.name in layouts:
                check_outside(call)
            return observer(call)

        self.forward(batch, visit)
        return observer.sums()

    def discover(self, batch: Any) -> Discovery:
        """Run the module on one batch."""
        found, inside = Discovery(), list[str]()

        def visit(call: PartCall) -> Any:
            if is_traced(call.args, call.kwargs):
                found.hidden.add(call.name)
            if call.name not in self.blocks:
                found.linears.setdefault(call.name, []).append(tuple(inside))
                return call.run()
            found.blocks[call.name] = found.blocks.get(call.name, 0) + 1
            inside.append(call.name)
            try:
                return call.run()
            finally:
                inside.pop()

        self.forward(batch, visit)
        return found

    @contextmanager
    def _visited_by(self, visit: Visit | None) -> Iterator[None]:
        before, self._here.visit = getattr(self._here, "visit", None), visit
        try:
            yield
        finally:
            self._here.visit = before

    def _visit(self, name: str | None, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Like `visited`, with the visit of this thread."""
        return visited(getattr(self._here, "visit", None), name, run, args, kwargs)

    def _layout(self, name: str) -> Layout:
        layout = self.linears[name].layout
        assert isinstance(layout, Layout)
        return layout


def is_traced(*values: Any) -> bool:
    """Whether values belong to a program that is being compiled."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def refuse_hidden(name: str) -> None:
    """Reject a part that runs inside a program compiled by the module, where it cannot stop."""
    raise ValueError(
        f"{name} is called in a program that the module compiles (jit, remat, scan, vmap), where its input cannot be "
        "seen: call the function without it, as through `call`, or leave its layers out with the recipe's ignore"
    )


def check_outside(call: PartCall) -> None:
    """Like `refuse_hidden`, for a part when it is called."""
    if is_traced(call.args, call.kwargs):
        refuse_hidden(call.name)


def block_names(
    children: Mapping[str, Sequence[tuple[str, type]]], lists: Iterable[str], linears: Iterable[str]
) -> list[str]:
    """The entries of the lists of blocks in a tree of modules.

    A list of blocks has at least two entries of one class, with several linear layers in each. If all layers of an
    entry lie in further such lists, as in the stages of a residual network, these lists have the blocks.

    Args:
        children: names and classes of the parts directly in each part; the root is "".
        lists: the parts that are lists.
        linears: names of all linear layers.
    """
    linears = list(linears)

    def held(name: str) -> list[str]:
        return [each for each in linears if each.startswith(f"{name}.")]

    entries = {
        each: [name for name, _ in children[each]]
        for each in lists
        if len(children[each]) > 1 and len({kind for _, kind in children[each]}) == 1
    }
    blocks = {name for names in entries.values() for name in names if len(held(name)) > 1}

    def is_covered(name: str) -> bool:
        """Whether all layers of a block lie in blocks within it."""
        inner = [each for each in blocks if each.startswith(f"{name}.")]
        return all(any(linear.startswith(f"{each}.") for each in inner) for linear in held(name))

    chosen: list[str] = []
    for name in sorted(blocks, key=lambda each: each.count(".")):
        if not is_covered(name) and not any(name.startswith(f"{each}.") for each in chosen):
            chosen.append(name)
    order = {name: place for place, name in enumerate(_walk(children))}
    return sorted(chosen, key=lambda name: order[name])


def _walk(children: Mapping[str, Sequence[tuple[str, type]]], name: str = "") -> Iterator[str]:
    for child, _ in children.get(name, ()):
        yield child
        yield from _walk(children, child)
