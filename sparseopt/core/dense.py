"""Floor 1: dense symmetric positive definite matrices by matrix products alone.

A LAPACK factorisation on the host, or a triangular solve on an accelerator, runs far below the rate of a product.
Here the inverse of an n x n matrix costs about as much as three products of its size, wherever it runs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
# Below this size LU on the device is as good, and the recursion ends.
LEAF = 128


def product(a: Array, b: Array) -> Array:
    """`a @ b` in full precision."""
    return jnp.matmul(a, b, precision=HIGHEST)


def spd_inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a symmetric positive definite matrix, symmetric.

    Halves: with `[[A, B], [Bᵀ, D]]`, `T = A⁻¹ B` and the Schur complement `S = D - Bᵀ T`, the inverse is
    `[[A⁻¹ + T S⁻¹ Tᵀ, -T S⁻¹], [-S⁻¹ Tᵀ, S⁻¹]]`; both inverses are of half the size, and positive definite again.
    In float32 the error is a small multiple of `eps` times the condition number: give the matrix a ridge.

    Source: Banachiewicz, 1937; Higham, "Accuracy and stability of numerical algorithms", 2002, chapter 14.

    Example:
        >>> from sparseopt.core.dense import spd_inverse
        >>> spd_inverse(jnp.diag(jnp.array([1.0, 4.0])))
        Array([[1.  , 0.  ],
               [0.  , 0.25]], dtype=float32)
    """
    size = matrix.shape[0]
    if size <= LEAF:
        inverse = jnp.linalg.inv(matrix)
        return (inverse + inverse.T) / 2
    # Cuts at multiples of the leaf make few distinct shapes, which the compiler then shares.
    half = LEAF * ((size // LEAF + 1) // 2)
    half = half if half < size else size // 2
    upper, side, lower = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    upper_inverse = spd_inverse(upper)
    carried = product(upper_inverse, side)
    schur_inverse = spd_inverse(lower - product(side.T, carried))
    across = product(carried, schur_inverse)
    corner = upper_inverse + product(across, carried.T)
    return jnp.block([[(corner + corner.T) / 2, -across], [-across.T, schur_inverse]])
