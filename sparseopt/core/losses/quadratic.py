"""The quadratic loss `1/2 <x - c, H (x - c)>` and a safe upper bound on its curvature."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.arguments import refuses_leaves, refuses_not_finite
from sparseopt.core.base.dense import HIGHEST, product
from sparseopt.core.base.types import is_traced, pytree

# Hessians of up to this many rows are checked.
MOST_CHECKED = 256
LANCZOS_STEPS = 24
# The fraction of 1/L in the paper of mAIHT: below 1, so that every plain step descends by a multiple of its length.
STEP_FRACTION = 0.97


@pytree
class Quadratic:
    """`value(x) = 1/2 <x - center, hessian (x - center)>`, summed over the columns of x.

    Attributes:
        hessian: symmetric positive semidefinite, `[n, n]`.
        center: `[n]` or `[n, columns]`, the shape of x.

    Example:
        >>> loss = so.Quadratic(jnp.diag(jnp.array([1.0, 4.0])), jnp.array([1.0, 1.0]))
        >>> float(loss.value(jnp.zeros(2)))
        2.5
        >>> loss.gradient(jnp.zeros(2))
        Array([-1., -4.], dtype=float32)
    """

    hessian: Any
    center: Any

    def gradient(self, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """`hessian @ (x - center)`; the loss's only product with the Hessian."""
        return product(self.hessian, x - self.center)

    # The methods of `DataLoss`: the image of x is the gradient, affine in x.
    def image(self, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return self.gradient(x)

    def image_of_zero(self, zero: Array, like: Array) -> Array:
        """The image of 0, computing only what is not known; `like` is any image."""
        return self.gradient(zero)

    def value_at(self, x: Float[Array, "n ..."], gradient: Float[Array, "n ..."]) -> Float[Array, ""]:
        """The loss at x from its gradient there: no product."""
        return 0.5 * jnp.sum((x - self.center) * gradient)

    def gradient_at(self, x: Float[Array, "n ..."], gradient: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        return gradient

    def divergence(self, x: Array, gradient: Array, x_old: Array, gradient_old: Array) -> Float[Array, ""]:
        """`loss(x) - loss(x_old) - <gradient_old, x - x_old>`."""
        return 0.5 * jnp.sum((x - x_old) * (gradient - gradient_old))

    def scaled_slack(self, x: Array, gradient: Array, share: Any) -> Float[Array, ""]:
        """`loss(x) + conjugate(s) - <s, x>` for `s = share * gradient` at x: never negative."""
        return (1 - share) ** 2 * self.value_at(x, gradient)

    def start(self) -> Array:
        return jnp.zeros_like(self.center)

    def start_shape(self) -> tuple[int, ...]:
        return jnp.shape(self.center)

    def value(self, x: Float[Array, "n ..."]) -> Float[Array, ""]:
        return self.value_at(x, self.gradient(x))

    def refuses(self) -> str | None:
        """Why its hessian cannot be used; values are checked for few rows, since many would take as long as a solve."""
        if reason := refuses_leaves("loss", self):
            return reason
        center, given = jnp.shape(self.center), jnp.shape(self.hessian)
        wanted = center[:1] * 2
        if len(given) != 2 or given != wanted:
            return f"a Quadratic with a center of shape {center} needs a hessian of shape {wanted}, given {given}"
        for name in ("hessian", "center"):
            if reason := refuses_not_finite(f"{name} of a Quadratic", getattr(self, name)):
                return reason
        if is_traced(self.hessian) or len(self.hessian) > MOST_CHECKED:
            return None
        matrix = np.asarray(self.hessian)
        # What a sum over many rows in this precision rounds.
        precision = float(jnp.finfo(np.promote_types(matrix.dtype, np.float32)).eps)
        matrix = matrix.astype(np.float64)
        rounding = 10 * precision * len(matrix) * np.max(np.abs(matrix), initial=0)
        if np.max(np.abs(matrix - matrix.T), initial=0) > rounding:
            return "a Quadratic needs a symmetric hessian, given one that is not; LeastSquares accepts any matrix"
        if (least := np.min(np.linalg.eigvalsh(matrix), initial=0)) < -rounding:
            return (
                f"a Quadratic needs a positive semidefinite hessian, given one with the eigenvalue {least:.3g}: such a "
                "problem may have no minimum"
            )
        return None


@pytree
class PlainLoss:
    """A loss with only `value` and `gradient`, whose image is both of them at x."""

    loss: Any
    affine_image = False

    def image(self, x: Array) -> tuple[Array, Array]:
        return self.loss.value(x), self.loss.gradient(x)

    def image_of_zero(self, zero: Array, like: tuple[Array, Array]) -> tuple[Array, Array]:
        return self.image(zero)

    def value_at(self, x: Array, image: tuple[Array, Array]) -> Array:
        return image[0]

    def gradient_at(self, x: Array, image: tuple[Array, Array]) -> Array:
        return image[1]

    def divergence(self, x: Array, image: tuple[Array, Array], x_old: Array, image_old: tuple[Array, Array]) -> Array:
        """`loss(x) - loss(x_old) - <gradient(x_old), x - x_old>`, minus its rounding error."""
        apart = image[0] - image_old[0] - jnp.sum(image_old[1] * (x - x_old))
        return apart - 8 * jnp.finfo(x.dtype).eps * jnp.abs(image_old[0])


def with_image(loss: Any) -> Any:
    """The loss with an image from which value and gradient follow."""
    return loss if hasattr(loss, "image") else PlainLoss(loss)


def is_smooth(loss: Any) -> bool:
    """Whether the loss is differentiable; a loss that does not say so counts as differentiable."""
    return getattr(loss, "smooth", True)


def safe_step(hessian: Float[Array, "n n"], seed: int) -> Float[Array, ""]:
    """The step of proximal gradient methods; `seed` is for the random start of the eigenvalue bound."""
    return STEP_FRACTION / largest_eigenvalue_bound(hessian, jax.random.key(seed))


def largest_eigenvalue_bound(matrix: Float[Array, "n n"], key: jax.Array) -> Float[Array, ""]:
    """An upper bound, tight to a fraction of a percent on Gram matrices, on the largest eigenvalue.

    Some steps of the Lanczos recurrence with full reorthogonalisation give the largest Ritz value theta and its
    residual norm; the bound is `theta + residual`, and never more than the largest absolute row sum
    (Gershgorin), which always holds.

    `theta + residual` can fall short only if the random start is nearly orthogonal to the leading eigenvector
    (Kuczynski and Wozniakowski, 1992, bound that probability); the caller's step keeps a margin for it.

    Source: Zhou and Li, "Bounding the spectrum of large Hermitian matrices", 2011, section 2.
    """
    value, residual = _largest_ritz(matrix, key)
    return jnp.minimum(value + residual, jnp.max(jnp.sum(jnp.abs(matrix), axis=1)))


def is_indefinite(matrix: Float[Array, "n n"]) -> Array:
    """Whether some steps of the Lanczos recurrence find a direction of negative curvature, beyond rounding."""
    matrix = matrix.astype(jnp.result_type(matrix, jnp.float32))
    value, _ = _largest_ritz(-matrix, jax.random.key(0))
    return value > 10 * jnp.finfo(value.dtype).eps * matrix.shape[0] * jnp.max(jnp.abs(matrix))


def _largest_ritz(matrix: Float[Array, "n n"], key: jax.Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The largest Ritz value of a Lanczos recurrence, which is below the largest eigenvalue, and its residual norm."""
    if not jnp.issubdtype(matrix.dtype, jnp.inexact):
        matrix = matrix.astype(jnp.result_type(float))
    size = matrix.shape[0]
    steps = min(LANCZOS_STEPS, size)
    start = jax.random.normal(key, (size,), matrix.dtype)
    tiny = jnp.finfo(matrix.dtype).tiny

    def step(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        basis, vector = carry
        basis = basis.at[index].set(vector)
        image = product(matrix, vector)
        alpha = jnp.vdot(vector, image, precision=HIGHEST)
        for _ in range(2):  # once is not enough in float32 when a Ritz value converges
            image = image - product(basis.T, product(basis, image))
        beta = jnp.linalg.norm(image)
        # An invariant subspace ends the recurrence: the following vectors are zero and add zero rows.
        alive = beta > 10 * jnp.finfo(matrix.dtype).eps * jnp.abs(alpha)
        following = jnp.where(alive, image / jnp.maximum(beta, tiny), 0.0)
        return (basis, following), (alpha, jnp.where(alive, beta, 0.0))

    basis = jnp.zeros((steps, size), matrix.dtype)
    _, (alphas, betas) = jax.lax.scan(step, (basis, start / jnp.linalg.norm(start)), jnp.arange(steps))
    tridiagonal = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    ritz_values, ritz_vectors = jnp.linalg.eigh(tridiagonal)
    return ritz_values[-1], betas[-1] * jnp.abs(ritz_vectors[-1, -1])
