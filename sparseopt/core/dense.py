"""Floor 1: dense symmetric positive definite matrices by matrix products alone.

A LAPACK factorisation on the host, or a triangular solve on an accelerator, runs far below the rate of a product.
Here the inverse of an n x n matrix costs about as much as two products of its size on a CPU, and calls no library.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
# Widths of panels, of the panels in a panel, and so on to single rows: products need wide ones, and what is done row by
# row needs narrow ones.
PANELS = (256, 32, 1)


def product(a: Array, b: Array) -> Array:
    """`a @ b` in full precision."""
    return jnp.matmul(a, b, precision=HIGHEST)


def spd_inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a symmetric positive definite matrix, symmetric; NaN where rounding finds it not definite.

    Panel after panel is swept, in a loop whose program is the same for every n. With P the panel's square on the
    diagonal and G its rows, -I in place of P, the sweep is

        M <- M - Gᵀ P⁻¹ G        with the panel's rows and columns of M on the right side taken as 0

    and after the last one M is minus the inverse. P⁻¹ is found in the same way, by narrower panels.
    In float32 the error is a small multiple of `eps` times the condition number: give the matrix a ridge.

    Source: Beaton, 1964, for the sweep of one row; Goodnight, "A tutorial on the SWEEP operator", 1979; Higham,
    "Accuracy and stability of numerical algorithms", 2002, section 14.4, for its stability.

    Example:
        >>> from sparseopt.core.dense import spd_inverse
        >>> spd_inverse(jnp.diag(jnp.array([1.0, 4.0])))
        Array([[1.  , 0.  ],
               [0.  , 0.25]], dtype=float32)
    """
    swept = _swept(matrix, PANELS)
    return (0 - swept - swept.T) / 2  # a plain minus would turn zeros into -0


def _swept(matrix: Float[Array, "n n"], widths: tuple[int, ...]) -> Float[Array, "n n"]:
    """Minus the inverse, by panels of `widths[0]` at most; the others are those of the panels' own inverses."""
    size = matrix.shape[0]
    if not widths:  # one row
        return -1 / jnp.where(matrix > 0, matrix, jnp.nan)
    if size <= widths[0]:
        return _swept(matrix, widths[1:])
    count = -(-size // widths[0])
    width = -(-size // count)
    # Equal panels: a row or so of the identity, of which the inverse knows nothing, fills the last.
    padding = count * width - size
    if padding:
        real = jnp.arange(size + padding) < size
        matrix = jnp.pad(matrix, (0, padding)) + jnp.diag(jnp.where(real, 0, 1).astype(matrix.dtype))
    minus_one = -jnp.eye(width, dtype=matrix.dtype)
    # In a large matrix the part below the cut and left of it is left out: it is the transpose of what is kept.
    cut = count // 2 * width if size > PANELS[0] else 0
    places = jnp.arange(count * width)

    def sweep(panel: Array, matrix: Array) -> Array:
        first = panel * width
        rows = jax.lax.dynamic_slice_in_dim(matrix, first, width)
        if cut:
            columns = jax.lax.dynamic_slice_in_dim(matrix, first, width, axis=1)
            rows = jnp.where((first >= cut) & (places < cut), columns.T, rows)
        minus_inverse = _swept(jax.lax.dynamic_slice_in_dim(rows, first, width, axis=1), widths[1:])
        rows = jax.lax.dynamic_update_slice_in_dim(rows, minus_one, first, axis=1)
        change = product(minus_inverse, rows)
        inside = places // width == panel
        for top, end in ((0, cut), (cut, None)) if cut else ((0, None),):
            others = jnp.where(inside[top:end, None] | inside[top:], 0, matrix[top:end, top:])
            matrix = matrix.at[top:end, top:].set(others + product(rows[:, top:end].T, change[:, top:]))
        return matrix

    matrix = jax.lax.fori_loop(0, count, sweep, matrix)
    return matrix.at[cut:, :cut].set(matrix[:cut, cut:].T)[:size, :size]
