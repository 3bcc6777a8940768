"""Losses of data, `sum_i w_i f((A x)_i; b_i)`: least squares, and any loss f of one observation.

`DataLoss` has what solvers need besides `value` and `gradient`. With `z = A x`, a proximal gradient step compares the
Bregman divergence, computed without cancellation,

    D(z', z) = sum_i w_i ( f(z'_i) + f*(f'(z_i)) - f'(z_i) z'_i )

with `||x' - x||² / (2 t)`. Methods that solve for z, or for x if A is the identity, use `rows`, the loss of z.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.arguments import class_or_function, fits, own_refusal, refuses_leaves, refuses_not_finite
from sparseopt.core.base.dense import product
from sparseopt.core.base.sums import total
from sparseopt.core.base.types import FloatArray, is_traced, pytree, static
from sparseopt.core.losses import scalar
from sparseopt.core.losses.quadratic import Quadratic
from sparseopt.core.operators.maps import or_identity
from sparseopt.core.operators.matrices import Dense, Matrix, SparseMatrix, WithOnes, linear_map, refuses_map


@pytree
class DataLoss:
    """`value(x) = sum_i w_i f((A x)_i; b_i)` for the loss f of one observation, such as `so.scalar.Logistic()`.

    `LeastSquares`, `LogisticLoss` and the others make one for each loss of the package.

    Attributes:
        scalar: f, a `ScalarLoss`.
        matrix: A: a dense or SciPy sparse matrix `[rows, columns]`, a linear map, or None for the identity. It may have
            more columns than rows.
        target: b, `[rows]`, or `[rows, channels]` for an x of `[columns, channels]`, in the domain of f.
        weights: w, `[rows]` or one number, not negative; None for ones. A weight of 0 marks a b that is not observed,
            and may be NaN.
        low: for a loss without a matrix, the lower end of the box in which an unobserved x lies, or is assumed to lie,
            `[channels]` or a number; None for 0.
        high: its upper end.
        intercept: whether x has one more entry, the last one, that is added to every `(A x)_i`. A `Problem` leaves it
            without a penalty.

    Example:
        >>> loss = so.DataLoss(so.scalar.Logistic(), jnp.array([[1.0], [-1.0], [2.0]]), jnp.array([1.0, 0.0, 0.0]))
        >>> loss.gradient(jnp.zeros(1))
        Array([0.], dtype=float32)
    """

    scalar: Any
    matrix: Any
    target: Any
    weights: Any = None
    low: Any = None
    high: Any = None
    intercept: bool = static(default=False)

    def __post_init__(self) -> None:
        matrix = linear_map(self.matrix)
        if self.intercept and isinstance(matrix, Dense | SparseMatrix):
            matrix = WithOnes(matrix)
        object.__setattr__(self, "matrix", matrix)
        for name in ("target", "weights"):
            if isinstance(getattr(self, name), list | tuple):
                object.__setattr__(self, name, np.asarray(getattr(self, name)))

    @property
    def smooth(self) -> bool:
        return getattr(self.scalar, "smooth", False)

    @property
    def is_square(self) -> bool:
        return getattr(self.scalar, "is_square", False)

    @property
    def rows(self) -> "DataLoss":
        """The loss as a function of `z = A x`: `sum_i w_i f(z_i; b_i)`."""
        weights, target = self.weights, jnp.asarray(self.target)
        if not jnp.issubdtype(target.dtype, jnp.inexact):
            target = target.astype(self.dtype)
        if weights is not None:
            weights = jnp.reshape(weights, jnp.shape(weights) + (1,) * (target.ndim - jnp.ndim(weights)))
            # Missing: any number that is finite, since a weight of 0 times NaN is NaN.
            target = jnp.where((weights > 0) | jnp.isfinite(target), target, 0)
        return dataclasses.replace(self, matrix=None, target=target, weights=weights, intercept=False)

    @property
    def dtype(self) -> Any:
        """The dtype of the floats in matrix and target; for data of integers alone the widest float."""
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
        return self.value_at(x, self.image(x))

    def gradient(self, x: FloatArray) -> FloatArray:
        return self.gradient_at(x, self.image(x))

    def value_at(self, x: FloatArray, image: FloatArray) -> Float[Array, ""]:
        rows = self.rows
        return total(rows.weigh(rows.scalar.value(image, rows.target)))

    def gradient_at(self, x: FloatArray, image: FloatArray) -> FloatArray:
        rows = self.rows
        return self.pull(rows.weigh(rows.scalar.derivative(image, rows.target)))

    def divergence(self, x: FloatArray, image: FloatArray, x_old: FloatArray, image_old: FloatArray) -> Array:
        rows = self.rows
        return rows.slack(image, -rows.gradient(image_old))

    # Of `rows` alone, in which A is the identity.
    def weigh(self, x: FloatArray) -> FloatArray:
        return x if self.weights is None else self.weights * x

    def mask_missing(self, x: FloatArray) -> FloatArray:
        """`x` where it is observed, 0 elsewhere."""
        return x if self.weights is None else jnp.where(self.weights > 0, x, 0)

    def prox(self, x: FloatArray, step: Any) -> FloatArray:
        """`argmin_u 1/2 ||u - x||² + step value(u)`; step is one number, or one per entry."""
        return self.scalar.prox(x, self.target, self.weigh(jnp.broadcast_to(step, x.shape)))

    def slope(self, q: FloatArray) -> FloatArray:
        """`-q / w`, 0 where nothing is observed."""
        if self.weights is None:
            return -q
        seen = self.weights > 0
        return jnp.where(seen, -q / jnp.where(seen, self.weights, 1), 0)

    def feasible_share(self, q: FloatArray, anchor: FloatArray) -> Float[Array, ""]:
        """The largest fraction s in [0, 1] with `anchor + s (q - anchor)` in the domain of the conjugate of -q.

        The domain is convex, so it contains every smaller fraction too. `anchor` must lie in it. Entries without an
        observation do not limit the fraction: their conjugate is the box's.
        """
        slope, safe = self.slope(q), self.slope(anchor)
        low, high = self.scalar.dual_range(self.target)
        outside = (slope < low) | (slope > high)
        end = jnp.where(slope > high, high, low)
        apart = jnp.where(outside, slope - safe, 1)
        share = jnp.clip(jnp.where(outside, (end - safe) / apart, 1), 0, 1)
        least = jnp.min(share)
        # A fraction on the boundary is pulled inside by its rounding error.
        return jnp.where(least < 1, least * (1 - 4 * jnp.finfo(q.dtype).eps), 1)

    def slack(self, x: FloatArray, q: FloatArray) -> Float[Array, ""]:
        """`value(x) + conjugate(-q) + <q, x>` for q in the domain, from terms that are not negative.

        Where nothing is observed the conjugate is the box's, and the term `q x - min(q low, q high)`. Where x
        lies outside the box, the box reaches to it: no term may be negative and cancel others.
        """
        slack = self.weigh(self.scalar.slack(x, self.slope(q), self.target))
        if self.weights is None:
            return total(slack)
        low, high = (0.0 if end is None else end for end in (self.low, self.high))
        low, high = jnp.minimum(low, x), jnp.maximum(high, x)
        return total(jnp.where(self.weights > 0, slack, q * x - jnp.minimum(q * low, q * high)))

    def start(self) -> FloatArray:
        # Not `jnp.zeros`, which is a program for every shape.
        return jax.device_put(np.zeros(self.start_shape(), jnp.result_type(jnp.float32, self.dtype)))

    def start_shape(self) -> tuple[int, ...]:
        """The shape of x, found without computing."""
        target = jnp.shape(self.target)
        if isinstance(self.matrix, Matrix):
            return self.matrix.in_shape + target[1:]
        return jax.eval_shape(self.pull, jax.ShapeDtypeStruct(target, jnp.result_type(float))).shape

    def pad(self, rows: int, columns: int) -> Any:
        """The loss with this many rows and columns of zeros appended; None if its matrix is not dense.

        The new rows cost nothing: they have the target 0 in least squares, and the weight 0 in other losses.
        """
        weights, target = self.weights, np.asarray(self.target)
        if not isinstance(self.matrix, Dense) or np.ndim(weights) > 1 or not target.size:
            return None
        plain = weights is None and self.is_square
        if not plain:
            kind = jnp.result_type(self.matrix.matrix, jnp.float32)
            weights = np.broadcast_to(np.ones((), kind) if weights is None else weights, target.shape)
            weights = np.append(weights, np.zeros(rows, kind))
        matrix = np.pad(np.asarray(self.matrix.matrix), ((0, rows), (0, columns)))
        # The last target is one that the loss accepts.
        target = np.append(target, np.repeat(0 * target[-1:] if plain else target[-1:], rows))
        return dataclasses.replace(self, matrix=Dense(matrix), target=target, weights=weights)

    def refuses(self) -> str | None:
        """Why the data cannot be used (shapes, or values outside the domain), or None; tracers are not checked."""
        if not fits(self.scalar, scalar.ScalarLoss):
            kind = class_or_function(self.scalar)
            made = f": write {self.scalar.__name__}()" if isinstance(self.scalar, type) else ""
            said = f"{self.scalar!r:.100}" if kind is None else f"{kind}{made}"
            return f"a loss of data needs the loss of one observation, such as so.scalar.Logistic(), given {said}"
        name = self.name
        for what, leaf in (("target", self.target), ("weights", self.weights)):
            if reason := refuses_leaves(f"{what} of {name}", leaf):
                return reason
        if reason := refuses_map(f"matrix of {name}", self.matrix):
            return reason
        if self.intercept and not isinstance(self.matrix, WithOnes):
            return f"an intercept needs a dense or SciPy sparse matrix in {name}, given {type(self.matrix).__name__}"
        given, weights = np.shape(self.target), self.weights
        if not given:
            return f"the target of {name} is an array [rows] or [rows, channels], given {self.target!r}"
        shape: tuple[int, ...] = getattr(self.matrix, "out_shape", ())
        if given[: len(shape)] != shape:
            return (
                f"{name} needs one target for every row of its matrix, given a matrix of {shape[0]} rows and a target "
                f"of shape {given}"
            )
        if np.shape(weights) != given[: np.ndim(weights)]:
            return f"{name} needs one weight for every target, given {np.shape(weights)} for {given}"
        if is_traced(self):
            return None
        if weights is not None and not np.all(np.isfinite(weights) & (np.asarray(weights) >= 0)):
            return f"the weights of {name} must be finite and not negative"
        if reason := own_refusal(self.scalar):
            return reason
        target = np.asarray(self.target)
        seen: Any = True
        if weights is not None:
            seen = np.reshape(weights, np.shape(weights) + (1,) * (target.ndim - np.ndim(weights))) > 0
        wrong = self.scalar.wrong(target) & seen
        if not wrong.any():
            return None
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        return (
            f"{name} needs {self.scalar.expected}, given {target[place]:g} at target "
            f"{place[0] if len(place) == 1 else place} ({int(wrong.sum())} such)"
        )

    def refuses_matrix(self) -> str | None:
        """Why the entries of the matrix cannot be used; apart from `refuses`, since it reads all of them."""
        return refuses_not_finite(f"matrix of {self.name}", self.matrix)

    @property
    def name(self) -> str:
        """For error texts."""
        return "least squares" if self.is_square else f"the loss {type(self.scalar).__name__}"


def LeastSquares(matrix: Any, target: Any, weights: Any = None, *, intercept: bool = False) -> DataLoss:
    """`value(x) = 1/2 sum_i w_i ((A x)_i - b_i)²`; the arguments are described in `DataLoss`.

    Example:
        >>> loss = so.LeastSquares(jnp.array([[1.0, 1.0], [0.0, 2.0]]), jnp.array([3.0, 2.0]))
        >>> loss.gradient(jnp.zeros(2))
        Array([-3., -7.], dtype=float32)
        >>> np.asarray(so.solve(so.Problem(loss, so.L1(0.5)), tol=1e-5).check().value).round(2)
        array([1.5, 1. ], dtype=float32)
    """
    return DataLoss(scalar.Squared(), matrix, target, weights, intercept=intercept)


def LogisticLoss(matrix: Any, target: Any, weights: Any = None, *, intercept: bool = False) -> DataLoss:
    """Logistic regression on labels 0 and 1, or proportions of ones: `so.scalar.Logistic` of the log-odds `A x`.

    Example:
        >>> loss = so.LogisticLoss(np.array([[1.0], [-1.0], [2.0]]), np.array([1.0, 0.0, 1.0]))
        >>> so.solve(so.Problem(loss, so.L1(1.0))).check().value.round(2)
        array([0.76])
    """
    return DataLoss(scalar.Logistic(), matrix, target, weights, intercept=intercept)


def PoissonLoss(matrix: Any, target: Any, weights: Any = None, *, intercept: bool = False) -> DataLoss:
    """Poisson regression of counts: `so.scalar.Poisson` of the log-rates `A x`."""
    return DataLoss(scalar.Poisson(), matrix, target, weights, intercept=intercept)


def SquaredHingeLoss(matrix: Any, target: Any, weights: Any = None, *, intercept: bool = False) -> DataLoss:
    """Support vector machine on labels -1 and 1: `so.scalar.SquaredHinge` of the scores `A x`."""
    return DataLoss(scalar.SquaredHinge(), matrix, target, weights, intercept=intercept)


def HuberLoss(matrix: Any, target: Any, delta: Any = 1.0, weights: Any = None, *, intercept: bool = False) -> DataLoss:
    """Regression with outliers: `so.scalar.Huber(delta)` of the residuals `A x - b`."""
    return DataLoss(scalar.Huber(delta), matrix, target, weights, intercept=intercept)


def AbsoluteLoss(matrix: Any, target: Any, weights: Any = None, *, intercept: bool = False) -> DataLoss:
    """Median regression: the sum of the absolute residuals `|A x - b|`, `so.scalar.Absolute`."""
    return DataLoss(scalar.Absolute(), matrix, target, weights, intercept=intercept)


def QuantileLoss(matrix: Any, target: Any, level: Any, weights: Any = None, *, intercept: bool = False) -> DataLoss:
    """Quantile regression at a level between 0 and 1: `so.scalar.Quantile(level)` of the residuals `A x - b`."""
    return DataLoss(scalar.Quantile(level), matrix, target, weights, intercept=intercept)


def as_least_squares(loss: Quadratic) -> DataLoss:
    """`1/2 <x - c, H (x - c)>` as `1/2 ||A x - A c||²` with `Aᵀ A = H`; NaN if H is not positive semidefinite."""
    # In units in which the columns are about equally long: powers of two, which round nothing.
    squares = jnp.diag(loss.hessian)
    half = jnp.round(jnp.log2(jnp.where(squares > 0, squares, 1)) / 2).astype(jnp.int32)
    sizes = jnp.ldexp(jnp.ones_like(squares), half)
    values, vectors = jnp.linalg.eigh(loss.hessian / sizes / sizes[:, None])
    rounding = 10 * jnp.finfo(values.dtype).eps * values.size * jnp.max(jnp.abs(values), initial=0)
    values = jnp.where(jnp.min(values, initial=0) < -rounding, jnp.nan, values)
    matrix = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T * jnp.where(squares > 0, sizes, 0)
    return LeastSquares(matrix, product(matrix, loss.center))
