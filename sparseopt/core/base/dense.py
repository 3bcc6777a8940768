"""The precision of products, and inverses of dense positive definite matrices from matrix products alone.

A LAPACK factorisation on the host, or a triangular solve on an accelerator, runs far below the rate of a product.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
# Widths of panels, of the panels within a panel, and so on to single rows: products need wide panels, and work row by
# row needs narrow ones.
PANELS = (128, 16, 1)
# Above this size the matrix is halved once, which saves a quarter of the operations and most of the memory traffic.
WHOLE = 4 * PANELS[0]

Precision = Literal["highest", "high", "default", "bfloat16"]
# Both operands of a product in bfloat16, whatever they are stored as, and its sums in float32.
BY_BFLOAT16 = "BF16_BF16_F32"
# "high" on an NVIDIA GPU with TF32, where JAX's own HIGH is its DEFAULT, one such product: three, which have 21 bits.
HIGH_BY_TF32 = "TF32_TF32_F32_X3"
# The first generation of GPUs, Ampere, that has TF32.
LEAST_CAPABILITY = 8


def activation_precision() -> str:
    """The precision of products of activations: JAX's `jax_default_matmul_precision` if it is set, else "highest".

    All other products of this package are in the highest precision whatever JAX's setting is. All sums are in float32.
    """
    return cast(Any, jax.config).jax_default_matmul_precision or "highest"


def activations_in(precision: Precision) -> AbstractContextManager[Any]:
    """A context in which products of activations have this precision; see `activation_precision`."""
    # Programs traced under another setting are traced again, so it is changed only if it differs.
    if precision == activation_precision():
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision_on(jax.devices()[0], precision))


def precision_on(device: Any, precision: Precision) -> str:
    """JAX's name of a precision on a device."""
    if precision == "bfloat16":
        return BY_BFLOAT16
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]  # of NVIDIA's, a number
    has_tf32 = generation.isdigit() and int(generation) >= LEAST_CAPABILITY
    return HIGH_BY_TF32 if precision == "high" and has_tf32 else precision


def activation_einsum(spec: str, a: Array, b: Array) -> Array:
    """`einsum(spec, a, b)` of activations in their precision; an index is in two of the three terms at least."""
    precision = activation_precision()
    return _in_bfloat16(spec, a, b) if precision == BY_BFLOAT16 else jnp.einsum(spec, a, b, precision=precision)


def activation_matmul(a: Float[Array, "... m k"], b: Float[Array, "... k n"]) -> Float[Array, "... m n"]:
    """`a @ b` of activations in their precision."""
    precision = activation_precision()
    if precision == BY_BFLOAT16:
        return _in_bfloat16("...mk,...kn->...mn", a, b)
    return jnp.matmul(a, b, precision=precision)


# The products of a gradient are of its kind too: by JAX's own rule they would have one operand in float32.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_bfloat16(spec: str, a: Array, b: Array) -> Array:
    # By casts: a CPU ignores JAX's own setting.
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _save(spec: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _in_bfloat16(spec, a, b), (a, b)


def _pull_back(spec: str, operands: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    terms, result = spec.split("->")
    (first, second), (a, b) = terms.split(","), operands
    return (
        _in_bfloat16(f"{result},{second}->{first}", change, b),
        _in_bfloat16(f"{first},{result}->{second}", a, change),
    )


_in_bfloat16.defvjp(_save, _pull_back)


def product(a: Array, b: Array) -> Array:
    """`a @ b` in full precision."""
    return jnp.matmul(a, b, precision=HIGHEST)


def spd_inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a symmetric positive definite matrix, symmetric; NaN if rounding finds it not definite.

    A large matrix is cut into halves, `[[A, B], [Bᵀ, D]]`. With `T = A⁻¹ B` and the Schur complement `S = D - Bᵀ T` its
    inverse is `[[A⁻¹ + T S⁻¹ Tᵀ, -T S⁻¹], [-S⁻¹ Tᵀ, S⁻¹]]`, and A and S are inverted in a loop over panels.
    In float32 the error is a small multiple of `eps` times the condition number: give the matrix a ridge.

    Source: Banachiewicz, 1937, for the halves; for the panels see `_invert_panel`; Higham, "Accuracy and stability of
    numerical algorithms", 2002, chapter 14.
    """
    if matrix.shape[0] <= WHOLE:
        return _inverse_by_panels(matrix)
    upper, side, lower = _halves(matrix)
    upper_inverse = _inverse_by_panels(upper)
    carried = product(upper_inverse, side)
    schur_inverse = _inverse_by_panels(lower - product(side.T, carried))
    across = product(carried, schur_inverse)
    corner = upper_inverse + product(across, carried.T)
    return jnp.block([[(corner + corner.T) / 2, -across], [-across.T, schur_inverse]])


def spd_inverse_factor(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The upper triangular U with `Uᵀ U = H⁻¹` of a symmetric positive definite H; NaN if it is not definite.

    H⁻¹ itself, whose error grows with the condition number of H, is never formed: `(Uᵀ U)⁻¹` differs from H by a small
    multiple of eps. U is the inverse of the upper R with `R Rᵀ = H`. In halves, with F for the factor and
    `R₁₂ = B F(D)ᵀ`,

        F([[A, B], [Bᵀ, D]]) = [[U₁₁, -U₁₁ R₁₂ F(D)], [0, F(D)]],   U₁₁ = F(A - R₁₂ R₁₂ᵀ)

    Source: Higham, "Accuracy and stability of numerical algorithms", 2002, chapters 10 and 14.
    """
    if matrix.shape[0] <= WHOLE:
        return _swept(matrix, PANELS, _FACTOR)
    upper, side, lower = _halves(matrix)
    lower_factor = _swept(lower, PANELS, _FACTOR)
    carried = product(side, lower_factor.T)
    upper_factor = _swept(upper - product(carried, carried.T), PANELS, _FACTOR)
    across = product(product(upper_factor, carried), lower_factor)
    return jnp.block([[upper_factor, -across], [jnp.zeros_like(side.T), lower_factor]])


def _halves(matrix: Float[Array, "n n"]) -> tuple[Array, Array, Array]:
    # A multiple of the panels, so that most sizes need no padding.
    half = PANELS[0] * -(-matrix.shape[0] // (2 * PANELS[0]))
    return matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]


def _inverse_by_panels(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    swept = _swept(matrix, PANELS, _INVERSE)
    return (0 - swept - swept.T) / 2  # a plain minus would turn zeros into -0


class _Sweep(NamedTuple):
    """What a loop over panels makes of one row, and of a panel.

    `panel` gets the panel's rows, the result for its square on the diagonal, the matrix with 0 in the panel's rows
    and columns, and the number of its first row; it returns the next matrix.
    """

    row: Callable[[Array], Array]
    panel: Callable[[Array, Array, Array, Array], Array]


def _invert_panel(rows: Array, minus_inverse: Array, others: Array, first: Array) -> Array:
    """With P the panel's square and G its rows, -I in place of P: `M <- M - Gᵀ P⁻¹ G`. M ends as minus the inverse.

    Source: Beaton, 1964, for single rows; Goodnight, "A tutorial on the SWEEP operator", 1979.
    """
    rows = _with_square(rows, -jnp.eye(len(rows), dtype=rows.dtype), first)
    return others + product(rows.T, product(minus_inverse, rows))


def _factor_panel(rows: Array, factor: Array, others: Array, first: Array) -> Array:
    """With `G = F(P) [rows, I in place of P]`, cut before the panel into `[L, U]`: `M <- M - Lᵀ G`, its rows `[0, U]`.

    M holds the Schur complement of the rows done, which are the last ones, and of these the rows and columns of U.
    """
    rows = product(factor, _with_square(rows, jnp.eye(len(rows), dtype=rows.dtype), first))
    before = jnp.arange(rows.shape[1]) < first
    others = others - product(jnp.where(before, rows, 0).T, rows)
    return jax.lax.dynamic_update_slice_in_dim(others, jnp.where(before, 0, rows), first, axis=0)


def _with_square(rows: Array, square: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, square, first, axis=1)


_INVERSE = _Sweep(lambda matrix: -1 / jnp.where(matrix > 0, matrix, jnp.nan), _invert_panel)
_FACTOR = _Sweep(lambda matrix: 1 / jnp.sqrt(jnp.where(matrix > 0, matrix, jnp.nan)), _factor_panel)


def _swept(matrix: Float[Array, "n n"], widths: tuple[int, ...], sweep: _Sweep) -> Float[Array, "n n"]:
    """A sweep over panels of at most `widths[0]` rows, from the last; their squares by panels of the next width."""
    size = matrix.shape[0]
    if not widths:
        return sweep.row(matrix)
    if size <= widths[0]:
        return _swept(matrix, widths[1:], sweep)
    count = -(-size // widths[0])
    width = -(-size // count)
    # Equal panels: rows of the identity, which change nothing, fill the last one.
    padding = count * width - size
    places = jnp.arange(size + padding)
    if padding:
        matrix = jnp.pad(matrix, (0, padding)) + jnp.diag((places >= size).astype(matrix.dtype))

    def step(index: Array, matrix: Array) -> Array:
        first = (count - 1 - index) * width
        rows = jax.lax.dynamic_slice_in_dim(matrix, first, width)
        square = _swept(jax.lax.dynamic_slice_in_dim(rows, first, width, axis=1), widths[1:], sweep)
        inside = (places >= first) & (places < first + width)
        return sweep.panel(rows, square, jnp.where(inside[:, None] | inside, 0, matrix), first)

    return jax.lax.fori_loop(0, count, step, matrix)[:size, :size]
