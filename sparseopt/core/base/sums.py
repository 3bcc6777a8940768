"""Sums that are accurate in float32, and lengths from them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.mesh import parts_at_work
from sparseopt.core.base.types import FloatArray

BLOCK = 256


def total(x: FloatArray) -> Float[Array, ""]:
    """The sum of all entries: of float64 at once, of shorter floats by blocks of 256 in two or more levels.

    The relative error on entries of one sign is about `256 eps` in the worst case and a few eps in practice; a running
    sum over a million float32 entries loses three digits. Summing float32 entries in float64 would also work, but XLA
    for CPUs (jaxlib 0.10.2) gets such sums wrong when it fuses them with stencils of three axes.
    """
    if x.dtype == jnp.float64:
        return jnp.sum(x)
    if (parts := parts_at_work()) > 1:
        return _total_apart(x, parts)
    flat = x.reshape(-1)
    while flat.size > BLOCK:
        flat = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK).sum(axis=1)
    return jnp.sum(flat)


def _total_apart(x: FloatArray, parts: int) -> Float[Array, ""]:
    """`total` of an array of which one axis is cut into equal parts: axis by axis, the cut one within its parts.

    Which axis is cut is not known here. Every axis that `parts` divides is treated as cut, which does no harm.
    """
    for axis in reversed(range(x.ndim)):
        pieces = parts if x.shape[axis] % parts == 0 else 1
        x = x.reshape(*x.shape[:axis], pieces, -1, *x.shape[axis + 1 :])
        while x.shape[axis + 1] > 1:
            size = min(BLOCK, x.shape[axis + 1])
            x = jnp.pad(x, [(0, -n % size if i == axis + 1 else 0) for i, n in enumerate(x.shape)])
            x = x.reshape(*x.shape[: axis + 1], -1, size, *x.shape[axis + 2 :]).sum(axis=axis + 2)
        x = x.reshape(*x.shape[: axis + 1], *x.shape[axis + 2 :])
    return jnp.sum(x)


def rms(scale: Any, values: FloatArray) -> Float[Array, ""]:
    """The root of the mean square, weighted by `scale`; at least the root of the smallest normal number."""
    tiny = jnp.finfo(values.dtype).tiny
    scale = jnp.broadcast_to(scale, values.shape)
    return jnp.sqrt(jnp.maximum(total(scale * values * values) / jnp.maximum(total(scale), tiny), tiny))


def relative(a: FloatArray, *others: FloatArray) -> Float[Array, ""]:
    """The length of a over the largest length of the others."""
    scale = jnp.max(jnp.stack([total(b * b) for b in others]))
    return jnp.sqrt(total(a * a) / jnp.maximum(scale, jnp.finfo(a.dtype).tiny))
