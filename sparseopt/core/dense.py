"""Floor 1: the precision of products, and dense symmetric positive definite matrices by matrix products alone.

A LAPACK factorisation on the host, or a triangular solve on an accelerator, runs far below the rate of a product.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
# Widths of panels, of the panels within a panel, and so on to single rows: products need wide panels, and work row by
# row needs narrow ones.
PANELS = (128, 16, 1)
# Above this size the matrix is halved once, which saves a quarter of the operations and most of the memory traffic.
WHOLE = 4 * PANELS[0]


Precision = Literal["highest", "high", "default"]


def activation_precision() -> str:
    """The precision of products of activations: JAX's `jax_default_matmul_precision` where it is set, else "highest".

    All other products of this package are in the highest precision whatever JAX's setting is.
    """
    return cast(Any, jax.config).jax_default_matmul_precision or "highest"


def activations_in(precision: Precision) -> AbstractContextManager[Any]:
    """A context in which products of activations have this precision; see `activation_precision`."""
    # Programs traced under another setting are traced again, so it is changed only where it differs.
    same = precision == activation_precision()
    return contextlib.nullcontext() if same else jax.default_matmul_precision(precision)


def product(a: Array, b: Array) -> Array:
    """`a @ b` in full precision."""
    return jnp.matmul(a, b, precision=HIGHEST)


def spd_inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a symmetric positive definite matrix, symmetric; NaN where rounding finds it not definite.

    A large matrix is cut into halves, `[[A, B], [Bᵀ, D]]`. With `T = A⁻¹ B` and the Schur complement `S = D - Bᵀ T` its
    inverse is `[[A⁻¹ + T S⁻¹ Tᵀ, -T S⁻¹], [-S⁻¹ Tᵀ, S⁻¹]]`, and A and S are inverted in a loop over panels.
    In float32 the error is a small multiple of `eps` times the condition number: give the matrix a ridge.

    Source: Banachiewicz, 1937, for the halves; for the panels see `_swept`; Higham, "Accuracy and stability of
    numerical algorithms", 2002, chapter 14.
    """
    size = matrix.shape[0]
    if size <= WHOLE:
        return _by_panels(matrix)
    # A multiple of the panels, so that most sizes need no padding.
    half = PANELS[0] * -(-size // (2 * PANELS[0]))
    upper, side, lower = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    upper_inverse = _by_panels(upper)
    carried = product(upper_inverse, side)
    schur_inverse = _by_panels(lower - product(side.T, carried))
    across = product(carried, schur_inverse)
    corner = upper_inverse + product(across, carried.T)
    return jnp.block([[(corner + corner.T) / 2, -across], [-across.T, schur_inverse]])


def _by_panels(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    swept = _swept(matrix, PANELS)
    return (0 - swept - swept.T) / 2  # a plain minus would turn zeros into -0


def _swept(matrix: Float[Array, "n n"], widths: tuple[int, ...]) -> Float[Array, "n n"]:
    """Minus the inverse, by panels of at most `widths[0]` rows; the other widths are for the inverses of the panels.

    With P a panel's square on the diagonal and G its rows, -I in place of P, the panel is swept by

        M <- M - Gᵀ P⁻¹ G        with the panel's rows and columns of M on the right side taken as 0

    After the last panel M is minus the inverse. P⁻¹ is computed in the same way, by narrower panels.

    Source: Beaton, 1964, for single rows; Goodnight, "A tutorial on the SWEEP operator", 1979.
    """
    size = matrix.shape[0]
    if not widths:  # one row
        return -1 / jnp.where(matrix > 0, matrix, jnp.nan)
    if size <= widths[0]:
        return _swept(matrix, widths[1:])
    count = -(-size // widths[0])
    width = -(-size // count)
    # Equal panels: rows of the identity, which leave the inverse unchanged, fill the last one.
    padding = count * width - size
    places = jnp.arange(size + padding)
    if padding:
        matrix = jnp.pad(matrix, (0, padding)) + jnp.diag((places >= size).astype(matrix.dtype))
    minus_one = -jnp.eye(width, dtype=matrix.dtype)

    def sweep(panel: Array, matrix: Array) -> Array:
        first = panel * width
        rows = jax.lax.dynamic_slice_in_dim(matrix, first, width)
        minus_inverse = _swept(jax.lax.dynamic_slice_in_dim(rows, first, width, axis=1), widths[1:])
        rows = jax.lax.dynamic_update_slice_in_dim(rows, minus_one, first, axis=1)
        inside = (places >= first) & (places < first + width)
        others = jnp.where(inside[:, None] | inside, 0, matrix)
        return others + product(rows.T, product(minus_inverse, rows))

    return jax.lax.fori_loop(0, count, sweep, matrix)[:size, :size]
