"""Losses of data with a matrix, `sum_i w_i f((A x)_i; b_i)`: least squares, and any scalar loss.

`MatrixLoss` has what solvers need besides `value` and `gradient`. With `z = A x`, a proximal gradient step compares
the Bregman divergence, computed without cancellation,

    D(z', z) = sum_i w_i ( f(z'_i) + f*(f'(z_i)) - f'(z_i) z'_i )

with `||x' - x||² / (2 t)`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.dense import product
from sparseopt.core.base.types import FloatArray, pytree
from sparseopt.core.losses.nodes import NodeLoss
from sparseopt.core.losses.quadratic import Quadratic
from sparseopt.core.losses.scalar import SquaredLoss
from sparseopt.core.operators.maps import or_identity
from sparseopt.core.operators.matrices import Dense, SparseMatrix, linear_map, refuses_map


class MatrixLoss:
    """The methods of a loss `f(A x)`; a subclass names the fields, and the scalar loss `family`."""

    family: Any
    matrix: Any
    target: Any
    weights: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", linear_map(self.matrix))

    @property
    def smooth(self) -> bool:
        return getattr(self.family, "smooth", False)

    @property
    def rows(self) -> NodeLoss:
        """The loss as a function of `z = A x`: `sum_i w_i f(z_i; b_i)`."""
        weights, target = self.weights, jnp.asarray(self.target)
        if not jnp.issubdtype(target.dtype, jnp.inexact):
            target = target.astype(self.dtype)
        if weights is not None:
            weights = jnp.reshape(weights, jnp.shape(weights) + (1,) * (target.ndim - jnp.ndim(weights)))
        # Where a weight is 0 so is the dual, and the box [0, 0] loses nothing.
        return NodeLoss(self.family, target, weights, 0.0, 0.0)

    @property
    def dtype(self) -> Any:
        """That of the floats in matrix and target; for data of integers alone the widest float."""
        kinds = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in (*jax.tree.leaves(self.matrix), self.target)]
        floats = [kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)]
        return jnp.result_type(*floats) if floats else jnp.result_type(float)

    def maps(self, x: FloatArray) -> Any:
        return or_identity(self.matrix, x)

    def image(self, x: FloatArray) -> FloatArray:
        """`A x`, affine in x; value, gradient and divergence follow from it."""
        return self.maps(x).mv(x)

    def image_of_zero(self, zero: FloatArray, like: FloatArray) -> FloatArray:
        return jnp.zeros_like(like)

    def pull(self, e: FloatArray) -> FloatArray:
        return self.maps(e).rmv(e)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return self.rows.value(self.image(x))

    def gradient(self, x: FloatArray) -> FloatArray:
        return self.pull(self.rows.gradient(self.image(x)))

    def value_at(self, x: FloatArray, image: FloatArray) -> Float[Array, ""]:
        return self.rows.value(image)

    def gradient_at(self, x: FloatArray, image: FloatArray) -> FloatArray:
        return self.pull(self.rows.gradient(image))

    def divergence(self, x: FloatArray, image: FloatArray, x_old: FloatArray, image_old: FloatArray) -> Array:
        return self.rows.slack(image, -self.rows.gradient(image_old))

    def start(self) -> FloatArray:
        # Not by `jnp.zeros`, which is a program for every shape.
        return jax.device_put(np.zeros(self.start_shape(), jnp.result_type(jnp.float32, self.dtype)))

    def start_shape(self) -> tuple[int, ...]:
        """The shape of x, found without computing."""
        target = jnp.shape(self.target)
        if isinstance(self.matrix, Dense | SparseMatrix):
            return self.matrix.in_shape + target[1:]
        return jax.eval_shape(self.pull, jax.ShapeDtypeStruct(target, jnp.result_type(float))).shape

    def padded(self, rows: int, columns: int) -> Any:
        """The loss with so many rows and columns of zeros appended; None if its matrix is not dense.

        The new rows cost nothing: those of least squares have the target 0, those of other losses the weight 0.
        """
        weights, target = self.weights, np.asarray(self.target)
        if not isinstance(self.matrix, Dense) or np.ndim(weights) > 1 or not target.size:
            return None
        plain = weights is None and isinstance(self.family, SquaredLoss)
        if not plain:
            kind = jnp.result_type(self.matrix.matrix, jnp.float32)
            weights = np.append(np.ones(len(target), kind) if weights is None else weights, np.zeros(rows, kind))
        matrix = np.zeros((len(target) + rows, self.matrix.in_shape[0] + columns), self.matrix.matrix.dtype)
        matrix[: len(target), : self.matrix.in_shape[0]] = self.matrix.matrix
        # The last target is one that the loss accepts.
        target = np.append(target, np.repeat(0 * target[-1:] if plain else target[-1:], rows))
        found: Any = self
        return dataclasses.replace(found, matrix=Dense(matrix), target=target, weights=weights)

    def refuses(self) -> str | None:
        """Why the data cannot be used (shapes, or values outside the domain), or None; tracers are not checked."""
        name = type(self).__name__
        if isinstance(self.family, type):
            return f"{name} takes a scalar loss, given the class {self.family.__name__}: write {self.family.__name__}()"
        if reason := refuses_map(f"matrix of {name}", self.matrix):
            return reason
        given, weights = jnp.shape(self.target), self.weights
        shape = getattr(self.matrix, "out_shape", None)
        if shape is not None and given[: len(shape)] != shape:
            return (
                f"{name} needs one target for every row of its matrix, given a matrix of {shape[0]} rows and a target "
                f"of shape {given}"
            )
        if weights is not None and jnp.shape(weights) != given[: jnp.ndim(weights)]:
            return f"{name} needs one weight for every target, given {jnp.shape(weights)} for {given}"
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            return None
        if weights is not None and not np.all(np.isfinite(weights) & (np.asarray(weights) >= 0)):
            return f"the weights of {name} must be finite and not negative"
        family, target = self.family, np.asarray(self.target)
        if reason := getattr(family, "refuses", lambda: None)():
            return reason
        seen: Any = True
        if weights is not None:
            seen = np.reshape(weights, np.shape(weights) + (1,) * (target.ndim - np.ndim(weights))) > 0
        wrong = family.wrong(target) & seen
        if not wrong.any():
            return None
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        return (
            f"{type(family).__name__} takes {family.expected}, given {target[place]:g} at target "
            f"{place[0] if len(place) == 1 else place} ({int(wrong.sum())} such)"
        )


@pytree
class LeastSquares(MatrixLoss):
    """`value(x) = 1/2 sum_i w_i ((A x)_i - b_i)²`.

    Attributes:
        matrix: A: a dense or SciPy sparse matrix `[rows, columns]`, a linear map, or None for the identity. It may have
            more columns than rows.
        target: b, `[rows]`, or `[rows, channels]` for an x of `[columns, channels]`.
        weights: w, `[rows]`, not negative; None for ones.

    Example:
        >>> loss = so.LeastSquares(jnp.array([[1.0, 1.0], [0.0, 2.0]]), jnp.array([3.0, 2.0]))
        >>> loss.gradient(jnp.zeros(2))
        Array([-3., -7.], dtype=float32)
        >>> np.asarray(so.solve(so.Problem(loss, so.L1(0.5)), tol=1e-5).check().value).round(2)
        array([1.5, 1. ], dtype=float32)
    """

    matrix: Any
    target: Any
    weights: Any = None
    family = SquaredLoss()


def as_least_squares(loss: Quadratic) -> LeastSquares:
    """`1/2 <x - c, H (x - c)>` as `1/2 ||A x - A c||²` with `Aᵀ A = H`; NaN if H is not positive semidefinite."""
    values, vectors = jnp.linalg.eigh(loss.hessian)
    rounding = 10 * jnp.finfo(values.dtype).eps * values.size * jnp.max(jnp.abs(values), initial=0)
    values = jnp.where(jnp.min(values, initial=0) < -rounding, jnp.nan, values)
    matrix = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
    return LeastSquares(matrix, product(matrix, loss.center))


@pytree
class Composed(MatrixLoss):
    """`value(x) = sum_i w_i f((A x)_i; b_i)` for a scalar loss f: logistic, Poisson, Huber, quantile regression, ...

    Attributes:
        loss: f, a `ScalarLoss` such as `so.LogisticLoss()`.
        matrix: A, as in `LeastSquares`.
        target: b, in the loss's domain.
        weights: w; None for ones.

    Example:
        >>> loss = so.Composed(so.LogisticLoss(), jnp.array([[1.0], [-1.0], [2.0]]), jnp.array([1.0, 0.0, 0.0]))
        >>> loss.gradient(jnp.zeros(1))
        Array([0.], dtype=float32)
    """

    loss: Any
    matrix: Any
    target: Any
    weights: Any = None

    @property
    def family(self) -> Any:
        return self.loss
