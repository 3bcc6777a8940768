"""Matrices as linear maps, and checks of any linear map.

`linear_map` makes a `LinearMap` from a dense array or a SciPy sparse matrix. Sparse matrices are held as coordinates:
on a CPU a product takes about twice as long as SciPy's own, but it runs under jit, vmap and grad.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import sparse

from sparseopt.core.base.arguments import fits, real_array
from sparseopt.core.base.dense import product
from sparseopt.core.base.types import FloatArray, is_traced, pytree, static
from sparseopt.core.operators.differences import Difference, spread
from sparseopt.core.operators.maps import Identity, LinearMap, Split, Stack

# The rmv of these is the transpose of their mv by construction and tests.
PROVEN: tuple[type, ...] = (Difference, Identity, Split, Stack)


class Matrix:
    """A map with a matrix `[rows, columns]`, on vectors `[columns]` or on `[columns, channels]`."""

    shape: Any

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.shape[:1]


@pytree
class Dense(Matrix):
    """A dense matrix."""

    matrix: Any

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def mv(self, x: FloatArray) -> FloatArray:
        return product(self.matrix, x)

    def rmv(self, e: FloatArray) -> FloatArray:
        # A row vector times the matrix reads it in memory order, which is three times as fast.
        return product(e, self.matrix) if e.ndim == 1 else product(self.matrix.T, e)

    def squared(self, dtype: Any) -> "Dense":
        return Dense(jnp.asarray(self.matrix, dtype) ** 2)

    def take(self, places: Any) -> Any:
        """Some columns, as rows `[k, rows]`."""
        return jnp.take(self.matrix, places, axis=1).T


@pytree
class SparseMatrix(Matrix):
    """A sparse matrix given by the coordinates of its entries, in the order of its columns until `interleaved`."""

    values: Any  # `[entries]`
    rows: Any  # int32 `[entries]`
    columns: Any  # int32 `[entries]`
    shape: tuple[int, int] = static()
    starts: Any = None  # `[columns + 1]`: where every column begins; None if the entries are interleaved

    def _scatter(self, x: FloatArray, taken: Any, given: Any, size: int) -> FloatArray:
        values = jnp.asarray(self.values)
        # Without the barrier XLA would compute x again for every entry of the matrix.
        x = jax.lax.optimization_barrier(jnp.asarray(x))
        images = x.at[taken].get(mode="promise_in_bounds")
        images = spread(values, images) * images
        return jnp.zeros((size, *x.shape[1:]), images.dtype).at[given].add(images, mode="promise_in_bounds")

    def mv(self, x: FloatArray) -> FloatArray:
        return self._scatter(x, self.columns, self.rows, self.shape[0])

    def rmv(self, e: FloatArray) -> FloatArray:
        return self._scatter(e, self.rows, self.columns, self.shape[1])

    def squared(self, dtype: Any) -> "SparseMatrix":
        return dataclasses.replace(self, values=jnp.asarray(self.values, dtype) ** 2)

    def take(self, places: Any) -> Any:
        """Some columns, as dense rows `[k, rows]`."""
        count = places.shape[0]
        place = jnp.full(self.shape[1], count).at[places].set(jnp.arange(count))
        values = jnp.asarray(self.values)
        return jnp.zeros((count + 1, self.shape[0]), values.dtype).at[place[self.columns], self.rows].add(values)[:-1]

    def on_host(self) -> sparse.csc_array:
        """The matrix of SciPy, without a copy as long as its entries are in order."""
        if self.starts is None:
            return sparse.csc_array((self.values, (self.rows, self.columns)), shape=self.shape)
        return sparse.csc_array((self.values, self.rows, self.starts), shape=self.shape)

    def interleaved(self) -> "SparseMatrix":
        """The first entries of all columns, then the second ones, and so on.

        Consecutive sums into one place wait for each other, so products in the order of the matrix are half as fast.
        """
        if self.starts is None or is_traced(self):
            return self
        columns = np.asarray(self.columns)
        rank = np.arange(columns.size) - np.repeat(self.starts[:-1], np.diff(self.starts))
        order = np.argsort(rank, kind="stable")
        values, rows, columns = (np.asarray(part)[order] for part in (self.values, self.rows, columns))
        return SparseMatrix(values, rows, columns, self.shape)


@pytree
class WithOnes(Matrix):
    """A matrix with a column of ones behind its last one, which an intercept multiplies."""

    matrix: Any  # a Dense or a SparseMatrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1] + 1

    def mv(self, x: FloatArray) -> FloatArray:
        return self.matrix.mv(x[:-1]) + x[-1]

    def rmv(self, e: FloatArray) -> FloatArray:
        return jnp.concatenate([self.matrix.rmv(e), jnp.sum(e, axis=0)[None]])

    def squared(self, dtype: Any) -> "WithOnes":
        return WithOnes(self.matrix.squared(dtype))

    def take(self, places: Any) -> Any:
        last = self.matrix.shape[1]
        rows = self.matrix.take(jnp.minimum(places, last - 1))
        return jnp.where((places == last)[:, None], 1, rows)


def linear_map(given: Any) -> Any:
    """The linear map of a dense or SciPy sparse matrix, or of a list of rows; anything else, as None, unchanged."""
    if sparse.issparse(given):
        matrix = sparse.csc_array(given)
        if not matrix.has_canonical_format:
            matrix = matrix.copy()  # not in the caller's arrays
            matrix.sum_duplicates()
        columns = np.repeat(np.arange(matrix.shape[1], dtype=np.int32), np.diff(matrix.indptr))
        rows = matrix.indices.astype(np.int32, copy=False)
        return SparseMatrix(matrix.data, rows, columns, matrix.shape, matrix.indptr)
    if isinstance(given, list | tuple):
        given = real_array("a matrix", given)
    if isinstance(given, np.ndarray | jax.Array) and given.ndim == 2:
        return Dense(given)
    return given


def known_matrix(given: Any) -> Any | None:
    """The dense or SciPy sparse matrix of a map on the host; None if it is not known."""
    if is_traced(given):
        return None
    if isinstance(given, Dense):
        return np.asarray(given.matrix)
    if isinstance(given, SparseMatrix):
        return sparse.csr_array(given.on_host())
    return given.matrix() if isinstance(given, PROVEN) and hasattr(given, "matrix") else None


def refuses_map(name: str, given: Any) -> str | None:
    """Why an object cannot serve as a linear map; None if it can, or is None, the identity."""
    if given is None or fits(given, LinearMap):
        return None
    what, advice = type(given).__name__, ""
    if isinstance(given, np.ndarray | jax.Array):
        what = f"an array of shape {given.shape}"
    elif hasattr(given, "rmatvec"):  # a LinearOperator of SciPy
        advice = "; JAX cannot trace the NumPy code of its matvec: write mv and rmv in jax.numpy, or give the matrix"
    elif hasattr(given, "todense"):
        advice = (
            "; convert it to a SciPy sparse matrix, such as scipy.sparse.coo_array((values, (rows, columns)), shape)"
        )
    return (
        f"the {name} must be None, a dense matrix [rows, columns], a SciPy sparse matrix, or an object with mv(x) and "
        f"rmv(e), given {what}{advice}"
    )


def refuses_transpose(name: str, given: Any, x: Any) -> str | None:
    """Why a map does not accept arrays like `x`, or why its `rmv` is not the transpose of its `mv`; None if it does.

    Shapes are found without computing. The transpose of a user's own map is tested on one pair of random arrays, if its
    values are known.
    """
    like = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    if isinstance(given, Matrix) and like.shape[:1] == given.in_shape:
        return None
    try:
        image = jax.eval_shape(given.mv, like)
        back = jax.eval_shape(given.rmv, image)
    except (TypeError, ValueError, IndexError) as error:
        return f"the {name} does not accept an x of shape {like.shape}: {str(error).splitlines()[0]}"
    if back.shape != like.shape:
        return (
            f"the {name} maps shape {like.shape} to {image.shape} and its rmv maps that to {back.shape}: rmv must be "
            "the transpose of mv"
        )
    if isinstance(given, PROVEN) or is_traced((given, x)):
        return None
    rng = np.random.default_rng(0)
    u, v = (jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in (like, image))
    of_u = given.mv(u)
    forth, across = jnp.vdot(of_u, v), jnp.vdot(u, given.rmv(v))
    size = jnp.linalg.norm(of_u) * jnp.linalg.norm(v)
    if jnp.abs(forth - across) <= 100 * jnp.sqrt(u.size) * jnp.finfo(like.dtype).eps * size:
        return None
    return (
        f"the rmv of the {name} is not the transpose of its mv: <A u, v> = {forth:.6g} and <u, Aᵀ v> = {across:.6g} "
        "for random u and v"
    )


def norm_estimate(mv: Any, rmv: Any, like: FloatArray, steps: int = 20) -> Float[Array, ""]:
    """The spectral norm of a linear map by the power method: from below, within a few percent after 20 steps.

    `like` has the shape and dtype that `mv` accepts.
    """
    tiny = jnp.finfo(like.dtype).tiny

    def step(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, _ = carry
        x = rmv(mv(x))
        size = jnp.linalg.norm(x.reshape(-1))
        return x / jnp.maximum(size, tiny), size

    x = jax.random.normal(jax.random.key(0), like.shape, like.dtype)
    x = x / jnp.linalg.norm(x.reshape(-1))
    return jnp.sqrt(jax.lax.fori_loop(0, steps, step, (x, jnp.zeros((), like.dtype)))[1])
