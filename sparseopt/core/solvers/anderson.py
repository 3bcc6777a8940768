"""Anderson acceleration of a fixed-point iteration `point <- T(point)`, with a safeguard.

With residuals `f_k = T(p_k) - p_k` and the differences `dF_j`, `dT_j` of the last residuals and images:

    gamma  = argmin ||f_k - sum_j gamma_j dF_j||²        (regularised)
    p_k+1  = T(p_k) - sum_j gamma_j dT_j

A vector that is an affine function of the point is extrapolated with the same gamma. If T is averaged, its plain steps
converge from any point. So the extrapolation is used only while the residual stays below a bound that falls with the
number of extrapolations, and the memory is dropped when a residual has grown: the worst case is the plain iteration.

Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011 (type II); Fu, Zhang, Boyd, "Anderson
accelerated Douglas-Rachford splitting", 2020, for the safeguard (algorithm 2).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.dense import HIGHEST
from sparseopt.core.base.types import FloatArray, pytree
from sparseopt.core.operators.maps import Split

# A residual that grew by this factor shows that the extrapolation failed.
GROWTH = 2.0
# The bound on the residual is BOUND times the first one, divided by (extrapolations + 1) to this power.
BOUND = 1e3
DECAY = 1.1


@pytree
class Memory:
    """What the acceleration remembers; `depth` differences, the oldest replaced first."""

    start: Any  # p_k
    image: Any  # T(p_k-1)
    carried: Any  # the affine vector there
    residual: Any  # f_k-1
    residuals: Any  # [depth, size of a point]
    images: Any  # [depth, size of a point]
    carries: Any  # [depth, size of the affine vector]
    products: Any  # [depth, depth], of the residual differences
    known: Any  # consecutive residuals; -1: not even the start is known
    taken: Any  # extrapolations since T changed
    first: Any  # ||f|| then
    last: Any  # ||f_k-1||


def empty_memory(point: FloatArray, carried: FloatArray, depth: int) -> Memory:
    """An empty memory for points and affine vectors of these shapes."""
    dtype = point.dtype
    none, number = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
    rows = jnp.zeros((depth, point.size), dtype)
    return Memory(
        start=jnp.zeros_like(point),
        image=jnp.zeros_like(point),
        carried=jnp.zeros_like(carried),
        residual=jnp.zeros_like(point),
        residuals=rows,
        images=rows,
        carries=jnp.zeros((depth, carried.size), dtype),
        products=jnp.zeros((depth, depth), dtype),
        known=number - 1,
        taken=number,
        first=none,
        last=none,
    )


def forget(memory: Memory, when: Any) -> Memory:
    """The memory, cleared if `when` holds: if T has changed."""
    return dataclasses.replace(memory, known=jnp.where(when, -1, memory.known))


def _with(rows: FloatArray, slot: Array, row: FloatArray) -> FloatArray:
    """One row replaced, in place under XLA; `.at[slot].set` is a scatter, which copies the rows on a CPU."""
    return jax.lax.dynamic_update_index_in_dim(rows, row.reshape(-1), slot, 0)


def _products(rows: FloatArray, slot: Array, row: FloatArray, x: FloatArray) -> FloatArray:
    """`<row_j, x>` for all rows, as if one were replaced."""
    x = x.reshape(-1)
    mine = jnp.vdot(row.reshape(-1), x, precision=HIGHEST)
    return jnp.matmul(rows, x, precision=HIGHEST).at[slot].set(mine)


def _combine(gamma: FloatArray, rows: FloatArray, slot: Array, row: FloatArray) -> FloatArray:
    """`sum_j gamma_j row_j`, as if one row were replaced."""
    others = jnp.matmul(gamma.at[slot].set(0), rows, precision=HIGHEST)
    return others.reshape(row.shape) + gamma[slot] * row


def extrapolate(
    memory: Memory, image: FloatArray, carried: FloatArray
) -> tuple[Memory, Float[Array, "..."], Float[Array, "..."]]:
    """The next point for T, with its affine vector; the image itself if the extrapolation is not trusted.

    `image` is `T(p_k)`, where p_k is the point that the last call returned, and `carried` the affine vector there.
    """
    depth, dtype = memory.residuals.shape[0], image.dtype
    residual = image - memory.start
    length = jnp.sqrt(jnp.vdot(residual, residual, precision=HIGHEST))
    begun = memory.known >= 1
    grown = begun & (length > GROWTH * memory.last)

    # Before anything is known, what is written lies outside the `live` columns.
    slot = jnp.maximum(memory.known - 1, 0) % depth
    changes = (residual - memory.residual, image - memory.image, carried - memory.carried)
    row = _products(memory.residuals, slot, changes[0], changes[0])
    products = memory.products.at[slot].set(row).at[:, slot].set(row)

    live = jnp.arange(depth) < memory.known
    diagonal = jnp.diagonal(products)
    scale = jnp.sqrt(jnp.where(live & (diagonal > 0), diagonal, 1))
    system = jnp.where(live[:, None] & live, products / (scale[:, None] * scale), 0)
    system = system + jnp.diag(jnp.where(live, jnp.finfo(dtype).eps ** (2 / 3), 1).astype(dtype))
    right = jnp.where(live, _products(memory.residuals, slot, changes[0], residual) / scale, 0)
    gamma = jax.scipy.linalg.solve(system, right, assume_a="pos") / scale

    first = jnp.where(begun, memory.first, length)
    taken = jnp.where(begun, memory.taken, 0)
    below = length <= BOUND * first * (taken + 1).astype(dtype) ** -DECAY
    trusted = begun & ~grown & below & jnp.all(jnp.isfinite(gamma))
    gamma = jnp.where(trusted, gamma, 0)
    point = image - _combine(gamma, memory.images, slot, changes[1])
    beside = carried - _combine(gamma, memory.carries, slot, changes[2])
    # Everything that reads the old rows comes first, so that the new ones can overwrite them.
    changes, point, beside = jax.lax.optimization_barrier((changes, point, beside))
    memory = Memory(
        start=point,
        image=image,
        carried=carried,
        residual=residual,
        residuals=_with(memory.residuals, slot, changes[0]),
        images=_with(memory.images, slot, changes[1]),
        carries=_with(memory.carries, slot, changes[2]),
        products=products,
        known=jnp.where(memory.known < 0, 0, jnp.where(grown, 1, memory.known + 1)),
        taken=taken + trusted,
        first=first,
        last=length,
    )
    return memory, point, beside


def continue_from(split: Split, state: Any) -> Any:
    """The state of an `Admm` from which the next step continues; its point is `w = (rho z + m) / S - g`.

    Any dual will do if the memory m of the iteration fits it.
    """
    rows, now, scale = state.rows, state.now, split.row_scale
    z = now.inner(rows)
    past, w, x = extrapolate(state.past, (rows.rho * z + rows.memory) / scale - rows.dual, now.x)
    z = split.inner.mv(x)
    memory = scale * (w + rows.dual) - rows.rho * z
    rows = rows._replace(inner=None if rows.inner is None else z, memory=memory)
    return dataclasses.replace(state, now=now._replace(x=x, blocks=(rows,)), past=past)
