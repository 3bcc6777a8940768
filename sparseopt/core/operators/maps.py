"""Linear maps that know `mv` and `rmv`: the protocol, the identity, stacks, and the split map of an ADMM.

All arrays may carry trailing channel axes; the shapes that maps name, such as `in_shape`, leave them out.
"""

import itertools
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparseopt.core.base.types import FloatArray, pytree, static


@runtime_checkable
class LinearMap(Protocol):
    """A linear map between arrays of two shapes, and its transpose.

    A method `squared(dtype)`, the map with the squares of the matrix's entries, is optional: with it problems are
    solved in units in which columns and rows are equally long.
    """

    def mv(self, x: FloatArray) -> FloatArray:
        """The image of x."""

    def rmv(self, e: FloatArray) -> FloatArray:
        """The image of e under the transpose: `<e, A x> = <Aᵀ e, x>`."""


@pytree
class Stack:
    """Maps of one array, stacked: `[rows]`, the rows of each flattened.

    Example:
        >>> from sparseopt.core.operators.differences import Difference, GridBase
        >>> from sparseopt.core.operators.maps import Identity, Stack
        >>> both = Stack((Identity((3,)), Difference(GridBase((3,)), 2)))
        >>> both.mv(jnp.array([0.0, 1.0, 4.0]))  # the signal, then its Laplacian
        Array([ 0.,  1.,  4., -1., -2.,  3.], dtype=float32)
    """

    maps: tuple[Any, ...]
    order: int | None = static(default=None)  # the order of the differences, if all maps are differences of one signal

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(part.out_shape) for part in self.maps)

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.maps[0].in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (sum(self.sizes),)

    def mv(self, x: FloatArray) -> FloatArray:
        channels = x.shape[len(self.in_shape) :]
        return jnp.concatenate([part.mv(x).reshape(-1, *channels) for part in self.maps])

    def rmv(self, e: FloatArray) -> FloatArray:
        places = list(itertools.accumulate(self.sizes))[:-1]
        parts = zip(self.maps, jnp.split(e, places), strict=True)
        images = [part.rmv(rows.reshape(*part.out_shape, *e.shape[1:])) for part, rows in parts]
        return sum(images[1:], images[0])

    def matrix(self) -> sparse.csr_array:
        """The map on the host, in float64, if every map has a matrix."""
        return sparse.csr_array(sparse.vstack([part.matrix() for part in self.maps]))


class Pair(NamedTuple):
    """Two maps of one array, whose images keep their shapes."""

    first: Any
    second: Any

    def mv(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        return self.first.mv(x), self.second.mv(x)

    def rmv(self, e: tuple[FloatArray, FloatArray]) -> FloatArray:
        return self.first.rmv(e[0]) + self.second.rmv(e[1])


@pytree
class Identity:
    """The identity on arrays of a shape, which a problem may write as None; the only map of order 0."""

    shape: tuple[int, ...] = static()
    order = 0

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.shape

    def mv(self, x: FloatArray) -> FloatArray:
        return x

    def rmv(self, e: FloatArray) -> FloatArray:
        return e

    def squared(self, dtype: Any) -> "Identity":
        return self


def or_identity(given: Any, x: FloatArray) -> Any:
    """The linear map of arrays like x that was given; None means the identity."""
    return Identity(x.shape) if given is None else given


@pytree
class Split:
    """The map `outer inner` of a split penalty, with the diagonal metrics that make its dual step safe."""

    outer: Any  # Ψ, acting on `z = inner x`
    inner: Any  # Δ
    row_scale: Any  # `S_r`, one per row of Ψ, or a scalar for all
    column_scale: Any  # `C_j`, one per column of Ψ, or a scalar for all, with `Ψᵀ S^-1 Ψ <= C`

    def mv(self, x: FloatArray) -> FloatArray:
        return self.outer.mv(self.inner.mv(x))

    def rmv(self, e: FloatArray) -> FloatArray:
        return self.inner.rmv(self.outer.rmv(e))

    def row_shape(self, x: FloatArray) -> tuple[int, ...]:
        """The shape of `mv(x)`, channels included."""
        return (*self.outer.out_shape, *x.shape[len(self.inner.in_shape) :])


def standard_split(inner: Any, dtype: Any, unit: float = 1.0) -> Split:
    """The split of the standard ADMM: `outer` the identity, metrics that make rho the same in every unit of Δ."""
    scale = np.asarray(unit, dtype)
    return Split(Identity(inner.out_shape), inner, scale, 1 / scale)
