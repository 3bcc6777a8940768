"""How a layer's kernel becomes a matrix `[out, in]`, and its input a table of rows, one for each token.

| layer | kernel | inputs of a row |
|---|---|---|
| dense | `[in, out]`, in torch `[out, in]` | the last axis |
| general, attention's projections | `[in ..., out ...]` | the axes that are summed |
| einsum | as its text says | the letters that are summed |
| convolution | `[window ..., in, out]`, in torch `[out, in, window ...]` | a patch: channel by channel, its window |
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sparseopt.core.base.dense import activation_matmul
from sparseopt.pruning.base.grams import Grams

# Rows of patches in memory at once: an unfolded image is larger by the size of the window.
PATCH_ROWS = 16384


@jax.tree_util.register_static
@dataclass(frozen=True)
class Window:
    """How a convolution reads an input `[images, ..., channels]`, or `[images, channels, ...]`.

    Attributes:
        size: of the window, by axis.
        strides: between windows.
        padding: as in `jax.lax.conv_general_dilated`.
        input_dilation: of the input.
        kernel_dilation: of the window.
        pads: what the layer adds at both ends of each axis before it convolves; None for nothing.
        mode: how it pads, as in `jnp.pad`.
        channels_last: whether the channels are the last axis.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Any
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] | None = None
    mode: str = "constant"
    channels_last: bool = True

    def patches(self, images: Float[Array, "B ..."]) -> Float[Array, "rows in"]:
        """Every patch that the convolution reads."""
        letters = "DHW"[-len(self.size) :]
        layout = f"N{letters}C" if self.channels_last else f"NC{letters}"
        found = jax.lax.conv_general_dilated_patches(
            images, self.size, self.strides, self.padding, self.input_dilation, self.kernel_dilation,
            dimension_numbers=(layout, f"OI{letters}", f"N{letters}C"), precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        return found.reshape(-1, found.shape[-1])

    def images(self, x: Array) -> Array:
        """The padded input, with one axis of images."""
        x = x.reshape(-1, *x.shape[x.ndim - len(self.size) - 1 :])
        if self.pads is None:
            return x
        pads = (*self.pads, (0, 0)) if self.channels_last else ((0, 0), *self.pads)
        return jnp.pad(x, ((0, 0), *pads), mode=self.mode)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """The layout of one linear layer.

    Attributes:
        order: the axes of the kernel, output axes first.
        outputs: how many of them are outputs.
        axes: the input axes that are summed, in the order of the kernel's axes; none for a convolution.
        window: the window of a convolution.
        results: the axes of its output that belong to the kernel's outputs, in order.
    """

    order: tuple[int, ...]
    outputs: int = 1
    axes: tuple[int, ...] = (-1,)
    window: Window | None = None
    results: tuple[int, ...] = (-1,)

    def shape(self, kernel: tuple[int, ...]) -> tuple[int, int]:
        """`(out, in)` of a kernel of this shape."""
        sizes = [kernel[axis] for axis in self.order]
        return math.prod(sizes[: self.outputs]), math.prod(sizes[self.outputs :])

    def matrix(self, kernel: Any) -> np.ndarray:
        """The kernel as `[out, in]`, in its own dtype."""
        kernel = np.asarray(kernel)
        return np.ascontiguousarray(kernel.transpose(self.order).reshape(self.shape(kernel.shape)))

    def kernel(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The matrix `[out, in]` as a kernel of this shape."""
        sizes = [shape[axis] for axis in self.order]
        return np.ascontiguousarray(matrix.reshape(sizes).transpose(np.argsort(self.order)))

    def by_output(self, y: Array) -> Float[Array, "out"]:
        """Sums over the tokens of values shaped like its output."""
        last = tuple(range(-len(self.results), 0))
        moved = jnp.moveaxis(y, self.results, last)
        return jnp.sum(moved.reshape(-1, math.prod(moved.shape[-len(last) :])), axis=0)

    def grams(self, x: Array, dense_x: Array | None = None) -> Grams:
        """The sums over the tokens of an input; with the dense module's input, also the drift from it."""
        mesh = jax.typeof(x).sharding.mesh
        if not mesh.explicit_axes:
            return self._grams(x, dense_x)
        # Sums over axes that are cut explicitly: XLA says how the devices add up.
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.sharding.auto_axes(self._grams, axes=mesh.explicit_axes, out_sharding=whole)(x, dense_x)

    def _grams(self, x: Array, dense_x: Array | None) -> Grams:
        x = x.astype(jnp.float32)
        dense_x = None if dense_x is None else dense_x.astype(jnp.float32)
        if self.window is None:
            return _grams(self._rows(x), None if dense_x is None else self._rows(dense_x))
        window = self.window
        images = [window.images(each) for each in (x, dense_x) if each is not None]
        count = len(images[0])
        if not count:
            return _grams(*map(window.patches, images))
        rows = jax.eval_shape(window.patches, images[0][:1]).shape[0]
        part = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * rows <= PATCH_ROWS))
        parts = [each.reshape(count // part, part, *each.shape[1:]) for each in images]

        def add(total: Grams, several: list[Array]) -> tuple[Grams, None]:
            found = _grams(*map(window.patches, several))
            return jax.tree.map(jnp.add, total, found), None

        if part == count:
            return _grams(*(window.patches(each[0]) for each in parts))
        first = _grams(*(window.patches(each[0]) for each in parts))
        return jax.lax.scan(add, first, [each[1:] for each in parts])[0]

    def _rows(self, x: Array) -> Float[Array, "rows in"]:
        last = tuple(range(-len(self.axes), 0))
        width = math.prod(x.shape[axis] for axis in self.axes)
        return jnp.moveaxis(x, self.axes, last).reshape(-1, width)


def _grams(rows: Float[Array, "rows in"], dense: Float[Array, "rows in"] | None = None) -> Grams:
    def product(other: Array) -> Array:
        return activation_matmul(rows.T, other)

    count = rows.shape[0]
    drift = None if dense is None else product(rows - dense)
    return Grams(product(rows), jnp.float32(count), jnp.int32(count), jnp.sum(rows, axis=0), drift)


def einsum_layout(text: str) -> Layout | str:
    """The layout of an einsum of an input and a kernel, or why there is none."""
    operands, result = text.replace(" ", "").split("->")
    given, kernel = operands.split(",")
    if "..." in kernel:
        return "its kernel has an ellipsis"
    summed = [letter for letter in kernel if letter in given and letter not in result]
    if any(letter in given and letter in result for letter in kernel):
        return "it has a kernel for each index of its input"
    if any(letter not in given and letter not in result for letter in kernel) or len(set(kernel)) < len(kernel):
        return "it sums its kernel alone"
    before, dots, after = given.partition("...")
    free = [letter for letter in before + after if letter not in kernel]
    if any(letter not in result for letter in free) or len(set(before + after)) < len(before + after):
        return "it sums its input alone"
    if not summed:
        return "it sums nothing"
    # Counted from the front before an ellipsis, and from the back after it.
    places = {letter: index for index, letter in enumerate(before)}
    places |= {letter: index - len(after) for index, letter in enumerate(after)} if dots else {}
    outputs = [axis for axis, letter in enumerate(kernel) if letter not in summed]
    order = (*outputs, *(kernel.index(letter) for letter in summed))
    axes = tuple(places[letter] for letter in summed)
    first, _, rest = result.partition("...")
    ends = {letter: index for index, letter in enumerate(first)}
    ends |= {letter: index - len(rest) for index, letter in enumerate(rest)}
    return Layout(order, len(outputs), axes, results=tuple(ends[kernel[axis]] for axis in outputs))
