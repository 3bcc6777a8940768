"""The tables of a graph at some orders that do not depend on the method, and a signal prepared for them.

The signal's mean is subtracted before a solve and added after it, so that differences keep their digits. The means of
the components are the fit for large weights; with free ends it is the polynomial of least squares.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.mesh import on_device
from sparseopt.core.base.sums import total
from sparseopt.core.base.types import namespace, pytree, static
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.quadratic import HIGHEST
from sparseopt.core.losses.scalar import Squared
from sparseopt.core.operators.maps import Stack
from sparseopt.core.penalties.sums import stack
from sparseopt.trend.base.layout import Layout

Terms = dict[int, Any]
# At orders >= 1 the fit may leave the range of the data where nothing is observed. The certificate then holds among
# fits within this many ranges of it; at order 0 the range itself is an exact bound.
BOX_RANGES = 10.0
# The mean of |x| for a standard normal x, inverted.
OF_MEAN_SIZE = 1.2533
CG_STEPS = 1000
CG_TOLERANCE = 1e-12
REFINEMENTS, DUAL_ROUNDING = 2, 1e-4


@pytree
class Ground:
    """The tables of a graph, in the layout of its arrays."""

    operator: Any  # what the penalty acts on: `Δ^(k+1)`, or a stack of several
    highest: Any  # `Δ^(k+1)` of the highest order
    row_norms: Any  # `||row||_2` of `highest`
    degrees: Any  # the diagonal of the Laplacian, 1 where it is 0
    labels: Any  # the component of every node, `[*nodes]`; None for one component
    present: Any  # False in padded places; None without padding
    basis: Any  # orthonormal `[n, ...]`, of the polynomials that no penalty sees with free ends; None else
    # The transform that makes a grid's Laplacian diagonal, with free ends `ΔᵀΔ` of `highest`; None for other graphs.
    transform: Any
    components: int = static()  # the number of components
    # The entries of arrays on the nodes and on the rows, over those without padding.
    padding: tuple[float, float] = static()
    # Whether the values themselves are penalised, so that 0 is a special value: no mean is subtracted, 0 replaces
    # the component means, and the box holds 0.
    anchored: bool = static()

    @property
    def order(self) -> int:
        return self.highest.order - 1


def ground_of(layout: Layout, orders: tuple[int, ...], dtype: np.dtype, channels: bool) -> Ground:
    """The tables, made once per graph; the dtype must be enabled."""
    graph, order = layout.graph, max(0, *orders)

    def put(values: np.ndarray, order: int) -> jax.Array:
        return layout.put(values[..., None] if channels else values, order)

    def build() -> Ground:
        maps = tuple(layout.difference(k + 1, dtype) for k in orders)
        norms = np.sqrt(layout.sums(order + 1).row_squares)
        degrees = layout.sums(1).column_squares
        labels = layout.rows(graph.components.astype(np.int32), 0) if graph.num_components > 1 else None
        basis = None
        if graph.free and min(orders) > 0:  # a lower order leaves only the mean
            basis = graph.polynomials(min(orders)).astype(dtype)
        present = layout.rows(np.ones(graph.num_nodes, bool), 0) if layout.padding(0) > 1 else None
        ground = Ground(
            operator=maps[0] if orders == (order,) else Stack(maps),
            highest=layout.difference(order + 1, dtype),
            row_norms=put(np.where(norms > 0, norms, 1).astype(dtype), order + 1),
            degrees=put(np.where(degrees > 0, degrees, 1).astype(dtype), 0),
            labels=None if labels is None else layout.put(labels, 0),
            present=None if present is None else put(present, 0),
            basis=basis,
            transform=layout.transform(order + 1, dtype),
            components=graph.num_components,
            padding=(layout.padding(0), layout.padding(order + 1)),
            anchored=-1 in orders,
        )
        return on_device(ground)

    return layout.cache(("ground", orders, np.dtype(dtype).name, channels), build)


def leaves_as(tree: Any, kind: Any) -> Any:
    """A penalty or a loss with its numbers in the dtype `kind`."""

    def as_kind(leaf: Any) -> Any:
        real = np.ndim(leaf) == 0 or np.asarray(leaf).dtype.kind == "f"
        return namespace(leaf).asarray(leaf, kind if real else None)

    return jax.tree.map(as_kind, tree)


def on_rows(terms: Terms, layout: Layout, kind: Any, channels: bool) -> Any:
    """The penalties, whose weights may be one per row, as one penalty on the rows of `Ground.operator`."""
    several = len(terms) > 1 or -1 in terms
    parts, sizes = [], []
    for k, term in terms.items():
        weight = getattr(term, "weight", 0.0)
        if np.ndim(weight):
            rows = layout.rows(namespace(weight).asarray(weight, kind), k + 1)
            rows = (rows.reshape(-1) if several else rows).astype(kind)
            term = leaves_as(dataclasses.replace(term, weight=0.0), kind)
            rows = rows[..., None] if channels else rows
            term = dataclasses.replace(term, weight=rows if isinstance(rows, jax.Array) else layout.put(rows, k + 1))
        else:
            term = leaves_as(term, kind)
        parts.append(term)
        sizes.append(int(np.prod(layout.difference(k + 1, kind).out_shape)) if several else 0)
    return stack(parts, sizes) if several else parts[0]


def couples_axes(penalty: Any) -> bool:
    """Whether a penalty couples the differences of a node along the axes of a grid: isotropic total variation."""
    return 0 in getattr(penalty, "group_axes", ())


def mean_weight(penalty: Any, padding: float) -> Array:
    """The penalty's (mean) weight, the largest for several penalties; 1 if it has none or it is 0."""
    found = []
    for part in getattr(penalty, "penalties", (penalty,)):
        weight = jnp.asarray(getattr(part, "weight", 1.0))
        mean = jnp.mean(weight) * (padding if weight.ndim else 1)
        found.append(jnp.where(mean == 0, 1, mean))
    return jnp.max(jnp.stack(found))


@pytree
class Data:
    """A signal prepared for a solve."""

    loss: DataLoss  # on the nodes, `[*nodes]` or `[*nodes, channels]`
    centred: DataLoss  # the loss of the signal less its overall mean
    shift: Any  # that mean, `[channels]`
    means: Any  # the mean of every node's component, or the polynomial of the basis, in the shape of the signal
    # The deviation of white noise whose differences have the mean size of the signal's; if that is 0, the deviation
    # of the signal itself, or 1.
    noise: Any

    def strength(self, ground: Ground, penalty: Any) -> Array:
        return mean_weight(penalty, ground.padding[1]) / self.noise


def data_of(ground: Ground, y: Any, weights: Any) -> Data:
    """A signal `[*nodes]` or `[*nodes, channels]`, prepared for a solve.

    The weights have a last axis of length 1 if there are channels, and are 0 where values are missing.
    """
    nodes = len(ground.highest.in_shape)
    present = ground.present
    counted = weights if present is None or weights is not None else present.astype(y.dtype)
    if weights is not None:
        y = jnp.where(weights > 0, y, 0)

    def add_up(x: Array) -> Array:
        """Over the nodes, `[channels]`."""
        return jax.vmap(total, in_axes=-1)(x) if x.ndim > nodes else total(x)

    def mean(x: Array) -> Array:
        if counted is None:
            return add_up(x) / math.prod(x.shape[:nodes])
        return add_up(counted * x) / total(jnp.asarray(counted, y.dtype))

    seen = None if counted is None else counted > 0
    high = jnp.max(y if seen is None else jnp.where(seen, y, -jnp.inf), axis=tuple(range(nodes)))
    low = jnp.min(y if seen is None else jnp.where(seen, y, jnp.inf), axis=tuple(range(nodes)))
    if ground.anchored:
        shift = jnp.zeros_like(low)
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        means = jnp.zeros_like(y)
    else:
        # Clipping keeps a rounded mean within the values: a constant is its own mean.
        shift = jnp.clip(mean(y), low, high)
        means = jnp.broadcast_to(shift, y.shape)
        if ground.basis is not None:
            # In two passes, as below.
            means = means + _polynomial(ground.basis, y - means, counted)
            means = means + _polynomial(ground.basis, y - means, counted)
        if ground.labels is not None:
            means = _component_means(ground, y, shift, counted)
    if present is not None:
        y, means = jnp.where(present, y, shift), jnp.where(present, means, shift)
    wider = BOX_RANGES * (high - low) if ground.order else jnp.zeros_like(low)
    box: Any = (None, None) if weights is None else (low - wider, high + wider)
    loss = DataLoss(Squared(), None, y, weights, *box)
    box = (None, None) if weights is None else (box[0] - shift, box[1] - shift)
    centred = DataLoss(Squared(), None, loss.mask_missing(y - shift), weights, *box)
    rows = jnp.abs(ground.highest.mv(centred.target)) / ground.row_norms
    noise = OF_MEAN_SIZE * jnp.mean(rows) * ground.padding[1]
    spread = jnp.sqrt(jnp.mean(centred.target**2) * ground.padding[0])
    noise = jnp.where(noise > 0, noise, jnp.where(spread > 0, spread, 1))
    return Data(loss, centred, shift, means, noise)


def _polynomial(basis: Array, y: Array, weights: Any) -> Array:
    """The weighted least-squares fit with the columns of the basis."""
    pulled = jnp.matmul(basis.T, (y if weights is None else weights * y).reshape(len(basis), -1), precision=HIGHEST)
    if weights is not None:
        gram = jnp.matmul(basis.T, weights.reshape(-1, 1) * basis, precision=HIGHEST)
        pulled = jnp.linalg.solve(gram, pulled)
    return jnp.matmul(basis, pulled, precision=HIGHEST).reshape(y.shape)


def _component_means(ground: Ground, y: Array, shift: Array, counted: Any) -> Array:
    """The mean of every node's component, in two passes, so that sums over many nodes keep their digits."""
    like, labels = (ground.components, *y.shape[ground.labels.ndim :]), ground.labels
    weights = jnp.broadcast_to(jnp.ones((), y.dtype) if counted is None else counted, y.shape).astype(y.dtype)
    mass = jnp.zeros(like, y.dtype).at[labels].add(weights)

    def mean(x: Array) -> Array:
        return (jnp.zeros(like, y.dtype).at[labels].add(weights * x) / jnp.where(mass > 0, mass, 1))[labels]

    found = mean(y - shift)
    found = shift + found + mean(y - shift - found)
    low = jnp.full(like, jnp.inf, y.dtype).at[labels].min(jnp.where(weights > 0, y, jnp.inf))
    high = jnp.full(like, -jnp.inf, y.dtype).at[labels].max(jnp.where(weights > 0, y, -jnp.inf))
    return jnp.clip(found, low[labels], high[labels])


def inverse_laplacian(ground: Ground, right: Array, times: int) -> tuple[Array, Array]:
    """`(L^+)^times right` for a right-hand side whose sums over every component are 0, and whether it is accurate.

    With a transform on grids, with free ends for `ΔᵀΔ` in place of L and a right-hand side without polynomials; with
    conjugate gradients elsewhere, which may not converge in 1,000 steps.
    """
    nothing = jnp.zeros((), bool)
    if ground.transform is not None:
        return ground.transform.apply(right, lambda level: jnp.where(level > 0, level, jnp.inf) ** -times), ~nothing
    base = ground.highest.base
    limit = max(CG_TOLERANCE, 2 * float(jnp.finfo(right.dtype).eps))

    def balance(x: Array) -> Array:
        """Restore sums of 0, to rounding, for the next solve."""
        if ground.labels is None:
            return x - jnp.mean(x, axis=0)
        nothing = jnp.zeros((ground.components, *x.shape[1:]), x.dtype)
        sums, sizes = nothing.at[ground.labels].add(x), nothing.at[ground.labels].add(1)
        return x - (sums / sizes)[ground.labels]

    def solve(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, failed = carry
        found, _ = jax.scipy.sparse.linalg.cg(
            base.laplacian, x, tol=limit, maxiter=CG_STEPS, M=lambda residual: residual / ground.degrees
        )
        left = jnp.linalg.norm(base.laplacian(found) - x)
        return balance(found), failed | ~(left <= 100 * limit * jnp.linalg.norm(x))

    found, failed = jax.lax.fori_loop(0, times, solve, (right, nothing))
    return found, ~failed


def null_space_dual(ground: Ground, pull: Array) -> tuple[Array, Array]:
    """The shortest u with `Δ^(k+1)ᵀ u = pull`, and whether it is accurate.

    If u lies in the dual ball, the component means are the fit. With 2m factors in Δ, `u = (L^+)^m pull`, with
    2m + 1 factors `u = D (L^+)^(m+1) pull`. On a chain with free ends there is only one u, on a grid with free ends
    `u = Δ (ΔᵀΔ)^+ pull`, refined since the condition number of `ΔᵀΔ` is the square of Δ's.
    """
    if ground.basis is not None and ground.transform is None:
        return ground.highest.potential(pull), jnp.ones((), bool)
    if ground.basis is not None:

        def shortest(pull: Array) -> Array:
            return ground.highest.mv(inverse_laplacian(ground, pull, 1)[0])

        def refine(_: Any, dual: Array) -> Array:
            return dual + shortest(pull - ground.highest.rmv(dual))

        dual = jax.lax.fori_loop(0, REFINEMENTS, refine, shortest(pull))
        left = jnp.linalg.norm(pull - ground.highest.rmv(dual))
        return dual, left <= DUAL_ROUNDING * jnp.linalg.norm(pull)
    halves, odd = divmod(ground.highest.order, 2)
    z, solved = inverse_laplacian(ground, pull, halves + odd)
    return (ground.highest.base.difference(z) if odd else z), solved


prepare = Jitted(data_of)


@Jitted
def strength(ground: Ground, y: Any, weights: Any, penalty: Any) -> Array:
    """The penalty's weight over the noise of the signal, as one program."""
    return data_of(ground, y, weights).strength(ground, penalty)
