"""Units of x in which a problem is well scaled, as far as lengths of columns and rows decide that."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.types import FloatArray
from sparseopt.core.operators.maps import or_identity
from sparseopt.core.operators.matrices import norm_estimate


class Units(NamedTuple):
    """Units of x in which the columns of A, and of an operator, are about equally long.

    Attributes:
        of: like x: the unit of every entry, a power of two, or 1 if columns differ by little.
        size: the length of the columns of A in these units.
    """

    of: Array
    size: Float[Array, ""]


def units_of(problem: Any, x: FloatArray) -> Units:
    """The units of a problem with a `DataLoss`; a map with unknown entries says nothing about them."""
    rows = problem.loss.rows
    seen = jnp.ones_like(rows.target) if rows.weights is None else jnp.ones_like(rows.target) * (rows.weights > 0)
    lengths = column_norms(problem.loss.maps(x), x, seen)
    size = geometric_mean(lengths)
    if problem.operator is not None:
        out = jax.eval_shape(problem.operator.mv, x)
        others = column_norms(problem.operator, x, jnp.ones(out.shape, out.dtype))
        lengths = jnp.hypot(lengths / size, others / geometric_mean(others))
    return Units(1 / levels(lengths), size)


def scales_of(problem: Any, x: FloatArray, units: FloatArray) -> tuple[FloatArray, FloatArray]:
    """One over the squared norms of A and K in the units of x; for K one per row, after rows are made equally long.

    Rows of K differ only if the penalty accepts a step for each of them.
    """
    tiny = jnp.finfo(x.dtype).tiny ** 0.25
    data, operator = problem.loss.maps(x), or_identity(problem.operator, x)
    squares, rows = square_entries(operator, x.dtype), jnp.ones((), x.dtype)
    if squares is not None and getattr(problem.penalty, "separable", False):
        rows = 1 / levels(jnp.sqrt(squares.mv(units**2)))
    norms = [
        norm_estimate(lambda z: data.mv(units * z), lambda e: units * data.rmv(e), x),
        norm_estimate(lambda z: rows * operator.mv(units * z), lambda e: units * operator.rmv(rows * e), x),
    ]
    of_data, of_operator = (1 / jnp.maximum(norm, tiny) ** 2 for norm in norms)
    return of_data.astype(x.dtype), (of_operator * rows**2).astype(x.dtype)


def square_entries(given: Any, dtype: Any) -> Any | None:
    """The map whose matrix has the squares of the entries; None if they are unknown, as for a user's own map."""
    squared = getattr(given, "squared", None)
    return squared(dtype) if callable(squared) else None


def column_norms(given: Any, like: FloatArray, rows: FloatArray) -> FloatArray:
    """The norms of the columns of a map of arrays like `like`, each row times the root of `rows`.

    The columns of a map with unknown entries are assumed to be equally long.
    """
    squares = square_entries(given, like.dtype)
    if squares is None:
        return jnp.full_like(like, norm_estimate(given.mv, given.rmv, like))
    return jnp.sqrt(jnp.broadcast_to(squares.rmv(rows), like.shape)).astype(like.dtype)


def geometric_mean(lengths: FloatArray) -> Float[Array, ""]:
    """The geometric mean of the lengths that are not 0; 1 if there are none."""
    return jnp.exp(jnp.sum(jnp.log(jnp.where(lengths > 0, lengths, 1))) / jnp.maximum(jnp.sum(lengths > 0), 1))


def levels(lengths: FloatArray) -> FloatArray:
    """Lengths over their geometric mean, rounded to powers of two, which cause no rounding; 1 for a length of 0."""
    ratio = jnp.where(lengths > 0, lengths / geometric_mean(lengths), 1)
    return jnp.ldexp(jnp.ones_like(ratio), jnp.round(jnp.log2(ratio)).astype(jnp.int32))
