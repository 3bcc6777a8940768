"""The x-step of the split ADMM, `(W + rho Δᵀ C Δ) x = right`.

Each class has `solve(weights, split, right, rho, guess)`. Weights of None are ones, as a class with `one_weight`
requires; rho may be traced.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import sparse

from sparseopt.core.base.dense import HIGHEST
from sparseopt.core.base.types import FloatArray, pytree, static
from sparseopt.core.operators.differences import spread
from sparseopt.core.operators.divided_differences import divided_difference
from sparseopt.core.operators.maps import Split


class _NodeSolve:
    one_weight = False


@pytree
class Diagonal(_NodeSolve):
    """Δ = I: a division."""

    def solve(self, weights: Any, split: Split, right: FloatArray, rho: Any, guess: FloatArray) -> FloatArray:
        return right / ((1 if weights is None else weights) + rho * split.column_scale)


def cosine_halves(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first half of the even rows of the orthonormal DCT-II matrix, and of the odd ones.

    The rows are the eigenvectors of the path's Laplacian. The other halves are the same, backwards, up to sign.
    """

    def rows(first: int, places: int) -> np.ndarray:
        return np.sqrt(2 / n) * np.cos(np.pi / (2 * n) * np.arange(first, n, 2)[:, None] * np.arange(1, 2 * places, 2))

    even = rows(0, n - n // 2)
    even[0] /= np.sqrt(2)
    return even, rows(1, n // 2)


@pytree
class AxisTransform:
    """W = I and C constant on a grid: `ΔᵀΔ` is diagonal under an orthonormal transform along each axis; exact.

    For the ends of the graph it is a sum of powers of L, and the transform is the DCT-II. For free ends it is a sum
    over the axes, and the transform of an axis consists of the right singular vectors of its differences.

    The transform is a product with matrices along each axis. Their rows are even or odd about the middle of an axis:
    products with half matrices of both kinds halve the work, and the spectrum has the even ones first. On a CPU that is
    faster than the FFT up to a thousand points per axis, if there are at least half as many lines as points in them;
    otherwise reading the matrix decides, and cosines use the FFT.
    """

    matrices: tuple[Any, ...]  # of each axis, even [ceil(n / 2)]² and odd [n // 2]²; None for the FFT
    eigenvalues: Any  # of L or of ΔᵀΔ, [*shape], in the order of the spectrum
    powers: tuple[int, ...] = static(default=(1,))  # the powers of the eigenvalues whose sum is ΔᵀΔ
    one_weight = True

    def _transform(self, x: FloatArray, inverse: bool) -> FloatArray:
        for axis, halves in enumerate(self.matrices):
            if halves is None:
                change = jax.scipy.fft.idct if inverse else jax.scipy.fft.dct
                x = change(x, axis=axis, norm="ortho")
            else:
                x = (_unfold if inverse else _fold)(halves, x, axis)
        return x

    def apply(self, x: FloatArray, factor: Callable[[Any], Any]) -> FloatArray:
        """`factor(L) x`, or `factor(ΔᵀΔ) x`, for a function of the eigenvalues."""
        spectrum = spread(factor(self.eigenvalues), x)
        return self._transform(spectrum * self._transform(x, inverse=False), inverse=True)

    def solve(self, weights: Any, split: Split, right: FloatArray, rho: Any, guess: FloatArray) -> FloatArray:
        scale = rho * split.column_scale
        return self.apply(right, lambda level: 1 / (1 + scale * sum(level**power for power in self.powers)))


def _product(matrix: Any, x: FloatArray, axis: int) -> FloatArray:
    return jnp.moveaxis(jnp.tensordot(matrix, x, axes=((1,), (axis,)), precision=HIGHEST), 0, axis)


def _fold(halves: tuple[Any, Any], x: FloatArray, axis: int) -> FloatArray:
    """The coefficients along an axis, the even ones first."""
    half = x.shape[axis] // 2
    first, middle = (jax.lax.slice_in_dim(x, *ends, axis=axis) for ends in ((0, half), (half, x.shape[axis] - half)))
    last = jnp.flip(jax.lax.slice_in_dim(x, x.shape[axis] - half, None, axis=axis), axis)
    even = jnp.concatenate([first + last, middle], axis)
    return jnp.concatenate([_product(halves[0], even, axis), _product(halves[1], first - last, axis)], axis)


def _unfold(halves: tuple[Any, Any], spectrum: FloatArray, axis: int) -> FloatArray:
    """The inverse, which is the transpose."""
    half = spectrum.shape[axis] // 2
    even, odd = jnp.split(spectrum, [spectrum.shape[axis] - half], axis)
    even, odd = _product(halves[0].T, even, axis), _product(halves[1].T, odd, axis)
    even, middle = jnp.split(even, [half], axis)
    return jnp.concatenate([even + odd, middle, jnp.flip(even - odd, axis)], axis)


LONGEST_MATRIX, ALWAYS_MATRIX = 1024, 128
# The singular vectors of a longer axis would take minutes.
LONGEST_FREE_AXIS = 4096


def cosine_solve(
    shape: tuple[int, ...], powers: tuple[int, ...], dtype: Any, spacing: tuple[float, ...] | None = None
) -> AxisTransform:
    """The tables for the ends of the graph, on the host in float64, then rounded once; the spacing as in `GridBase`."""
    eigenvalues, matrices, found = np.zeros(shape), [], dict[int, tuple[np.ndarray, ...]]()
    for axis, n in enumerate(shape):
        line, halves = 2 - 2 * np.cos(np.pi * np.arange(n) / n), None
        line = line if spacing is None else line / spacing[axis] ** 2
        if n <= max(ALWAYS_MATRIX, min(LONGEST_MATRIX, 2 * math.prod(shape) // n)):
            if n not in found:
                found[n] = tuple(half.astype(dtype) for half in cosine_halves(n))
            halves, line = found[n], np.concatenate([line[::2], line[1::2]])
        eigenvalues = eigenvalues + line.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        matrices.append(halves)
    return AxisTransform(tuple(matrices), eigenvalues.astype(dtype), powers)


def free_solve(
    shape: tuple[int, ...], orders: tuple[int, ...], dtype: Any, spacing: tuple[float, ...] | None = None
) -> AxisTransform:
    """The tables for a sum over the orders of `axis_differences`, of which order 0 is the identity, on the host."""

    def modes(n: int, unit: float) -> tuple[list[np.ndarray], np.ndarray]:
        taken = [m for m in orders if 0 < m < n]
        rows = [divided_difference(None, n, m, np.float64).matrix().toarray() / unit**m for m in taken]
        return _free_modes(np.concatenate([np.zeros((0, n)), *rows]), min([n, *taken]))

    axes = list(zip(shape, spacing or (1.0 for _ in shape), strict=True))
    found = {line: modes(*line) for line in set(axes)}
    eigenvalues = np.full(shape, float(orders.count(0)))
    for axis, line in enumerate(axes):
        eigenvalues += found[line][1].reshape([-1 if i == axis else 1 for i in range(len(shape))])
    matrices = tuple(tuple(half.astype(dtype) for half in found[line][0]) for line in axes)
    return AxisTransform(matrices, eigenvalues.astype(dtype))


def _free_modes(rows: np.ndarray, null: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The right singular vectors of differences of a line, as half matrices, and their squared singular values.

    The differences vanish on the polynomials of degree below `null`. A reversed line has the same ones up to sign and
    order, so the vectors are even or odd. Singular values keep digits that eigenvalues of `rowsᵀ rows` would lose.
    """
    n = rows.shape[1]
    half, root = n // 2, np.sqrt(0.5)
    first, middle, last = rows[:, :half], rows[:, half : n - half], rows[:, n - half :][:, ::-1]
    parts = np.concatenate([root * (first + last), middle], axis=1), root * (first - last)
    halves, levels = [], []
    for part, free in zip(parts, ((null + 1) // 2, null // 2), strict=True):
        size = part.shape[1]
        _, values, vectors = np.linalg.svd(np.linalg.qr(part, mode="r"), full_matrices=True)
        level = np.zeros(size)
        level[: size - free] = values[: size - free] ** 2
        halves.append(vectors * np.where(np.arange(size) < half, root, 1))
        levels.append(level)
    return halves, np.concatenate(levels)


@pytree
class ConjugateGradient(_NodeSolve):
    """Any graph and weights: CG from the last x, preconditioned by `w + rho diag(ΔᵀCΔ)`, or by a transform.

    An `AxisTransform` solves exactly for the mean weight at every node.

    It stops at `tolerance` times the residual of the guess, so that the inner error shrinks with the outer one.
    `jax.scipy`'s CG multiplies once more in every solve, and few steps are enough here.
    """

    diagonal: Any  # of Δᵀ C Δ, at the nodes; unused with a transform
    tolerance: Any = 1e-2
    transform: Any = None
    max_steps: int = static(default=200)

    def solve(self, weights: Any, split: Split, right: FloatArray, rho: Any, guess: FloatArray) -> FloatArray:
        weights = 1 if weights is None else weights

        def scaled(residual: FloatArray) -> FloatArray:
            if self.transform is None:
                return residual / (weights + rho * self.diagonal)
            mean = jnp.mean(jnp.asarray(weights, residual.dtype))
            return self.transform.solve(None, split, residual / mean, rho / mean, residual)

        def product(x: FloatArray) -> FloatArray:
            return weights * x + rho * split.inner.rmv(split.column_scale * split.inner.mv(x))

        residual = right - product(guess)
        direction = scaled(residual)
        first = jnp.sum(residual * direction)
        target = self.tolerance**2 * first

        def going(carry: tuple) -> Array:
            _, _, _, inner, step = carry
            return (inner > target) & (step < self.max_steps)

        def advance(carry: tuple) -> tuple:
            x, residual, direction, inner, step = carry
            image = product(direction)
            length = inner / jnp.sum(direction * image)
            x, residual = x + length * direction, residual - length * image
            towards = scaled(residual)
            following = jnp.sum(residual * towards)
            direction = towards + following / inner * direction
            return x, residual, direction, following, step + 1

        carry = (guess, residual, direction, first, jnp.zeros((), jnp.int32))
        return jax.lax.while_loop(going, advance, carry)[0]


@pytree
class Banded(_NodeSolve):
    """A chain, with C a number: `L D Lᵀ` of the banded matrix, in one sweep along the chain and one back.

    On a CPU a node takes 15 to 100 ns, less than in the fused lasso.
    """

    columns: Any  # of the lower triangle of ΔᵀΔ: the entry `[j, m]` is in row j + m and column j

    def solve(self, weights: Any, split: Split, right: FloatArray, rho: Any, guess: FloatArray) -> FloatArray:
        weights = 1 if weights is None else weights.reshape(-1)
        columns = (rho * split.column_scale * self.columns).at[:, 0].add(weights)
        width, shape = columns.shape[1] - 1, right.shape[1:]

        def eliminate(carry: tuple[Array, Array], row: tuple[Array, Array]) -> tuple[Any, Any]:
            # What the eliminated nodes subtract from the next rows of the matrix and of the right-hand side.
            taken, pulled = carry
            column, value = row
            column, value = column - jnp.pad(taken[:, 0], (0, 1)), value - pulled[0]
            lower = column[1:] / column[0]
            taken = _next(taken, 2) + column[0] * jnp.outer(lower, lower)
            pulled = _next(pulled, 1) + spread(lower, pulled) * value
            return (taken, pulled), (lower, value / column[0])

        def substitute(after: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
            lower, value = row
            value = value - jnp.sum(spread(lower, after) * after, axis=0)
            return jnp.concatenate([value[None], after[:-1]]), value

        nothing = jnp.zeros((width, *shape), right.dtype)
        start = jnp.zeros((width, width), columns.dtype), nothing
        _, factors = jax.lax.scan(eliminate, start, (columns, right))
        return jax.lax.scan(substitute, nothing, factors, reverse=True)[1]


def _next(x: Array, axes: int) -> Array:
    """An array shifted by one along its first axes, with zeros at the end."""
    inside = x[(slice(1, None),) * axes]
    return jnp.pad(inside, [(0, long - short) for long, short in zip(x.shape, inside.shape, strict=True)])


def banded_solve(gram: sparse.csr_array, dtype: Any) -> Banded:
    """The tables of `Banded` for ΔᵀΔ, on the host."""
    entries = sparse.coo_array(sparse.tril(gram))
    below = entries.row - entries.col
    columns = np.zeros((gram.shape[0], below.max() + 1), dtype)
    columns[entries.col, below] = entries.data
    return Banded(columns)
