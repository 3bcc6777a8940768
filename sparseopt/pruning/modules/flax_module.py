"""What NNX and Linen have in common: the layouts of Flax's linear layers, and the programs that parts run in.

Each part runs in its own program, compiled once for all parts with the same structure and shapes.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from flax.linen.linear import canonicalize_padding

from sparseopt.pruning.base.grams import Grams
from sparseopt.pruning.modules.lanes import PartCall
from sparseopt.pruning.modules.layouts import Layout, Window, einsum_layout
from sparseopt.pruning.modules.watched import Inputs, Observer, Sums, Visit, Watched, input_of

# Classes that have a layout, or are named among the parts left out; for NNX, for Linen.
DENSE, GENERAL = ("Linear", "Dense"), ("LinearGeneral", "DenseGeneral")
KINDS = (*DENSE, *GENERAL, "Einsum", "Conv", "ConvTranspose", "ConvLocal")


def kind_of(cls: type, package: str) -> str | None:
    """The name of the Flax class that a class is or extends; None if it is no linear layer."""
    return next((c.__name__ for c in cls.__mro__ if c.__name__ in KINDS and c.__module__.startswith(package)), None)


def layout_of(module: Any, kind: str, kernel: tuple[int, ...]) -> Layout | str:
    """The layout of a linear layer with a kernel of this shape, or a text that says why it has none."""
    if kind in DENSE:
        layout: Layout | str = Layout((1, 0))
    elif kind in GENERAL:
        layout = _of_general(module)
    elif kind == "Einsum":
        text = module.einsum_str
        layout = "its text is known only when it is called" if text is None else einsum_layout(text)
    elif kind == "Conv":
        layout = _of_convolution(module)
    else:
        layout = "a transposed convolution" if kind == "ConvTranspose" else "a convolution without shared weights"
    # For modules that are stacked, as for a scan.
    stacked = isinstance(layout, Layout) and len(layout.order) != len(kernel)
    return f"a kernel of {len(kernel)} axes" if stacked else layout


def _of_general(module: Any) -> Layout | str:
    if getattr(module, "batch_axis", None) or getattr(module, "batch_dims", None):
        return "it has a kernel for each index of a batch axis"
    axes, features = (
        (each,) if isinstance(each, int) else tuple(each)
        for each in (module.axis, module.features if hasattr(module, "features") else module.out_features)
    )
    if min(axes) < 0 <= max(axes):
        return "its axes are counted from both ends"
    inputs, outputs = len(axes), len(features)
    # Flax uses the axes in the order of the input, however they are given.
    order = (*range(inputs, inputs + outputs), *range(inputs))
    return Layout(order, outputs, tuple(sorted(axes)), results=tuple(range(-outputs, 0)))


def _of_convolution(module: Any) -> Layout | str:
    size = (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)
    if module.feature_group_count > 1:
        return f"a convolution in {module.feature_group_count} groups"
    if module.mask is not None:
        return "a convolution with a mask of its own"

    def each(value: Any) -> tuple[int, ...]:
        return (value or 1,) * len(size) if value is None or isinstance(value, int) else tuple(value)

    padding: Any = canonicalize_padding(module.padding, len(size))
    dilation, pads, mode = each(module.kernel_dilation), None, "constant"
    spans = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        pads = tuple(((span - 1) // 2, span // 2) for span in spans)
        padding, mode = "VALID", {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
    elif padding == "CAUSAL":
        pads, padding = ((spans[0] - 1, 0),), "VALID"
    padding = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    window = Window(size, each(module.strides), padding, each(module.input_dilation), dilation, pads, mode)
    count = len(size)
    return Layout((count + 1, count, *range(count)), 1, (), window)


def grams_inside(layout: Layout, value: Any, dense: Any) -> Grams:
    """The Grams of an input, inside a larger program; `grams_of` is a program of its own."""
    return layout.grams(value, dense)


def cut(arguments: Any, structure: Any = None) -> tuple[list[Any], Any] | None:
    """Split arguments into arrays and the rest, for which a program is compiled; None if that is not possible."""
    try:
        hash(structure)
    except TypeError:
        return None
    leaves, tree = jax.tree.flatten(arguments)
    places = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    rest = tuple(None if place else leaf for leaf, place in zip(leaves, places, strict=True))
    if not all(isinstance(leaf, bool | int | float | str | None) for leaf in rest):
        return None
    arrays = [leaf for leaf, place in zip(leaves, places, strict=True) if place]
    return arrays, (tree, tuple(places), rest)


def joined(arrays: list[Any], rest: Any) -> Any:
    """Undo `cut`: return the arguments."""
    tree, places, others = rest
    given = iter(arrays)
    return jax.tree.unflatten(tree, [next(given) if place else own for place, own in zip(places, others, strict=True)])


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wanted:
    """What to compute for a part: its "output", the "sums" of its layers' inputs, or these "inputs" themselves.

    `layouts` has the layouts of its linear layers, by their names in the part.
    """

    what: str
    layouts: tuple[tuple[str, Layout], ...]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Rest:
    """What `cut` left of the arguments of a part, or of its output."""

    value: Any


def _renamed(found: Any, prefix: str) -> Any:
    """Sums or inputs by name in the module, of a part that knows its layers without the prefix."""
    if isinstance(found, Sums):
        grams = {prefix + name: each for name, each in found.found.items()}
        return Sums(grams, tuple((prefix + name, prefix + owner) for name, owner in found.readers))
    return {prefix + name: values for name, values in found.items()}


def placed_as(value: Any, like: Any) -> Any:
    """Put an array on the device of another; like that one, it may be moved to the devices of a batch."""
    if not isinstance(like, jax.Array):
        return np.asarray(value)
    return jax.device_put(value, like.sharding) if like.committed else jax.device_put(np.asarray(value))


# The parameters of a part, and its other variables.
Values = tuple[Any, Any]


class Structure(Protocol):
    """A part without its values; static, and hashable if it is to be compiled."""

    def __call__(self, values: Values, args: Any, kwargs: Any, visit: Visit | None) -> Any:
        """Compute its output; calls of the parts inside it, by their names in it, go to a visit."""


def _run(
    structure: Structure, values: Values, arguments: Any, wanted: Wanted, dense: Inputs | None, gram: Any = grams_inside
) -> Any:
    args, kwargs = arguments
    if wanted.what == "output":
        return structure(values, args, kwargs, None)
    observer = Observer(dict(wanted.layouts), gram if wanted.what == "sums" else None, dense)
    structure(values, args, kwargs, observer)
    return observer.sums() if wanted.what == "sums" else observer.inputs()


@jax.jit
def _compiled(
    structure: Structure, values: Values, arrays: list[Any], rest: Rest, wanted: Wanted, dense: Inputs | None
) -> Any:
    result = _run(structure, values, joined(arrays, rest.value), wanted, dense)
    if wanted.what != "output":
        return result
    found = cut(result)
    if found is None:
        raise _NoProgramError
    return found[0], Rest(found[1])


class _NoProgramError(Exception):
    """The output of a part cannot leave a program, for example an object unknown to JAX."""


# A part's Python code reads values, as in `if jnp.any(x > 0)`.
_READS_VALUES = jax.errors.JAXTypeError, jax.errors.JAXIndexError


@contextmanager
def compiled_for(what: str, advice: str) -> Iterator[None]:
    """Raise a ValueError if Python code reads values where only programs serve."""
    try:
        yield
    except _READS_VALUES as error:
        raise ValueError(
            f"{what} compiles the module, whose Python code reads values of arrays, as in `if jnp.any(x > 0)`: {advice}"
        ) from error


def _variables(arguments: Any) -> list[Any]:
    """The leaves of arguments, with variables of NNX as leaves."""
    return jax.tree.leaves(arguments, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


grams_of = jax.jit(lambda layout, value, dense: layout.grams(value, dense))


class FlaxModule(Watched):
    """A Flax module, whose parts are functions of their values."""

    gram = staticmethod(grams_of)

    @abstractmethod
    def part(self, name: str) -> tuple[Structure, Values]:
        """A part and its current values; "" is the module, whose only argument is a batch."""

    @abstractmethod
    def set_params(self, name: str, params: Any) -> None:
        """Set the parameters of a part."""

    @abstractmethod
    def kernel(self, name: str) -> Any:
        """The current kernel of a linear layer."""

    def observed(self, call: PartCall, layouts: Mapping[str, Layout], dense: Inputs | None = None) -> Sums:
        if call.name in self.linears:
            observer = Observer(layouts, grams_of, dense)
            observer.read(call.name, input_of(call))
            return observer.sums()
        return self._run(call, "sums", layouts, dense)

    def inputs(self, call: PartCall, layouts: Mapping[str, Layout]) -> Inputs:
        if call.name in self.linears:
            return {call.name: [input_of(call)]}
        return self._run(call, "inputs", layouts)

    def output(self, call: PartCall) -> Any:
        return self._run(call, "output", {})

    def _run(self, call: PartCall, what: str, layouts: Mapping[str, Layout], dense: Inputs | None = None) -> Any:
        """Run a part as it is now; return its output, or the inputs of its layers."""
        structure, values = self.part(call.name)
        # Names inside the part, so that similar blocks share their programs.
        prefix = f"{call.name}."
        wanted = Wanted(what, tuple((name.removeprefix(prefix), layout) for name, layout in layouts.items()))
        dense = None if dense is None else {name.removeprefix(prefix): each for name, each in dense.items()}
        arguments = (call.args, call.kwargs)
        if what != "output":
            arguments = jax.tree.map(lambda leaf: leaf, arguments)  # so that nothing of NNX is written to twice
        # Writes of a part, such as to a cache that it is given, would be lost inside a program.
        writes = what == "output" and any(isinstance(leaf, nnx.Variable) for leaf in _variables(arguments))
        found = None if writes else cut(arguments, structure)
        with self._visited_by(None):
            if found is not None:
                with suppress(_NoProgramError, *_READS_VALUES):
                    result = _compiled(structure, values, found[0], Rest(found[1]), wanted, dense)
                    return joined(result[0], result[1].value) if what == "output" else _renamed(result, prefix)
            result = _run(structure, values, arguments, wanted, dense, grams_of)
        return result if what == "output" else _renamed(result, prefix)

    def read(self, name: str) -> np.ndarray:
        return self._layout(name).matrix(self.kernel(name))

    def _as_kernel(self, name: str, weight: np.ndarray) -> Any:
        """A weight `[out, in]` as the kernel of a linear layer, on the kernel's device."""
        kernel = self.kernel(name)
        return placed_as(self._layout(name).kernel(weight, kernel.shape), kernel)
