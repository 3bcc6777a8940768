"""What programs see of a geometry at some orders, and a signal prepared for them.

The signal's mean is subtracted before a solve and added after it, so that differences keep their digits. The means of
the components are the fit for large weights; with free ends it is the polynomial of least squares.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.base.compile import Jitted
from sparseopt.core.base.sums import total
from sparseopt.core.base.types import pytree, static
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.quadratic import HIGHEST
from sparseopt.core.losses.scalar import Squared
from sparseopt.core.penalties.sets import Ended, Nonnegative, Nonpositive

# At orders >= 1 the fit may leave the range of the data where nothing is observed. The certificate then holds among
# fits within this many ranges of it; at order 0 the range itself is an exact bound.
BOX_RANGES = 10.0
# The mean of |x| for a standard normal x, inverted.
OF_MEAN_SIZE = 1.2533
CG_STEPS = 1000
CG_TOLERANCE = 1e-12
REFINEMENTS, DUAL_ROUNDING = 2, 1e-4
# Rounds of smoothing, and steps per round. Each round tests a smoother z: any with penalty(Δ z) < <pull, z> rules the
# means out.
ROUNDS, SMOOTHINGS = 4, 16
# A dual in the ball up to this fraction of itself proves that the polynomial is the fit; the gap accounts for the rest.
ROUNDING = 1e-6
# A signal counts as a polynomial if it differs from its fit by at most this many eps of its largest value.
NULL_EPS = 16


@pytree
class Ground:
    """The tables of a geometry, in the layout of its arrays, and the null space of its differences."""

    operator: Any  # what the penalty acts on: `Δ^(k+1)`, or a stack of several
    highest: Any  # `Δ^(k+1)` of the highest order
    row_norms: Any  # `||row||_2` of `highest`
    present: Any  # False in padded places; None without padding
    # The entries of arrays on the nodes and on the rows, over those without padding.
    padding: tuple[float, float] = static()
    # Whether the values themselves are penalised, so that 0 is a special value: no mean is subtracted, 0 replaces
    # the component means, and the box holds 0.
    anchored: bool = static()

    # A signal that differs from its null fit by this many eps of its largest value is that fit.
    null_eps = 0
    # Whether the dual of a null fit is exact if it exists: for large weights an iteration could only spoil it.
    proves_null = False

    @property
    def order(self) -> int:
        return self.highest.order - 1

    def means(self, y: Array, shift: Array, counted: Any) -> Array:
        """The best fit of least squares that no penalty sees; `shift` is the overall mean."""
        raise NotImplementedError

    def inverse(self, right: Array, times: int) -> tuple[Array, Array]:
        """`(L^+)^times right` for a right-hand side whose sums over every component are 0, and whether it is accurate.

        With free ends `ΔᵀΔ` replaces L, and the right-hand side is orthogonal to the polynomials.
        """
        raise NotImplementedError

    def shortest(self, pull: Array) -> tuple[Array, Array]:
        """The shortest u with `Δ^(k+1)ᵀ u = pull`, and whether it is accurate.

        If u lies in the dual ball, the null fit is the fit.
        """
        raise NotImplementedError

    def proof(self, penalty: Any, pull: Array) -> tuple[Array, Array]:
        """A dual point for the null fit, and whether it may prove that this is the fit for a norm."""
        raise NotImplementedError

    def within(self, penalty: Any, x: Array) -> Array:
        """`x`, near the sets that a penalty allows, moved into those that bound b or let it only rise or fall.

        A gap needs a point inside; the iterate of a splitting method is slightly outside.
        """
        several = hasattr(penalty, "penalties")
        maps = self.operator.maps if several else (self.operator,)
        for term, of in zip(penalty.penalties if several else (penalty,), maps, strict=True):
            if of.order == 0 and isinstance(term, Ended):
                x = jnp.clip(x, jnp.asarray(term.low, x.dtype), jnp.asarray(term.high, x.dtype))
            if of.order == 1 and isinstance(term, Nonnegative | Nonpositive):
                # The differences are tail less head.
                x = self.rising(x) if isinstance(term, Nonpositive) else -self.rising(-x)
        return x

    def rising(self, x: Array) -> Array:
        """The smallest signal above x that does not fall along an edge, from its tail to its head."""
        for axis in range(len(self.highest.in_shape)):
            x = jax.lax.cummax(x, axis)
        return x


@pytree
class GraphGround(Ground):
    """With the ends of the graph: the null space holds the constants of the components."""

    degrees: Any  # the diagonal of the Laplacian, 1 where it is 0

    def shortest(self, pull: Array) -> tuple[Array, Array]:
        """With 2m factors in Δ, `u = (L^+)^m pull`, with 2m + 1 factors `u = D (L^+)^(m+1) pull`."""
        halves, odd = divmod(self.highest.order, 2)
        z, solved = self.inverse(pull, halves + odd)
        return (self.highest.base.difference(z) if odd else z), solved

    def proof(self, penalty: Any, pull: Array) -> tuple[Array, Array]:
        """The means are the fit only if `penalty(Δ z) >= <pull, z>` for all z.

        One z usually disproves that: the pull itself if smoothing is weak, else the smoothed pull.
        """
        # Scaled to size 1, so that no square overflows: both sides of the comparison are homogeneous.
        size = jnp.max(jnp.abs(pull))
        size = jnp.where(size > 0, size, 1)
        pull = pull / size

        def rules_out(z: Array) -> Array:
            return penalty.value(self.highest.mv(z)) < size * jnp.sum(pull * z)

        def smooth(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            """`z` after some steps of a lazy random walk."""
            laplacian = self.highest.base.laplacian
            z, rounds, _ = carry
            # The pull itself first: tested in the loop alone, the test is compiled once.
            steps = jnp.where(rounds > 0, SMOOTHINGS, 0)
            z = jax.lax.fori_loop(0, steps, lambda _, last: last - laplacian(last) / (2 * self.degrees), z)
            return z, rounds + 1, rules_out(z)

        first = (pull, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
        *_, ruled_out = jax.lax.while_loop(lambda carry: ~carry[2] & (carry[1] <= ROUNDS), smooth, first)

        def solve() -> tuple[Array, Array]:
            # A batch runs this branch for every lane: if the means are ruled out there is nothing to solve.
            dual, solved = self.shortest(jnp.where(ruled_out, 0, pull))
            return penalty.project_dual(size * dual), solved & ~ruled_out

        rows = jax.eval_shape(self.highest.mv, pull)
        nothing = jnp.zeros(rows.shape, rows.dtype), jnp.zeros((), bool)
        return jax.lax.cond(ruled_out, lambda: nothing, solve)


@pytree
class GridGround(GraphGround):
    """A grid, whose nodes are one component."""

    transform: Any  # makes the Laplacian diagonal

    def means(self, y: Array, shift: Array, counted: Any) -> Array:
        return jnp.broadcast_to(shift, y.shape)

    def inverse(self, right: Array, times: int) -> tuple[Array, Array]:
        return _inverse_by(self.transform, right, times)


@pytree
class EdgeGround(GraphGround):
    """Any graph."""

    labels: Any  # the component of every node, `[*nodes]`; None for one component
    components: int = static()  # the number of components

    def means(self, y: Array, shift: Array, counted: Any) -> Array:
        """The mean of every node's component, in two passes, so that sums over many nodes keep their digits."""
        if self.labels is None:
            return jnp.broadcast_to(shift, y.shape)
        like, labels = (self.components, *y.shape[self.labels.ndim :]), self.labels
        weights = jnp.broadcast_to(jnp.ones((), y.dtype) if counted is None else counted, y.shape).astype(y.dtype)
        mass = jnp.zeros(like, y.dtype).at[labels].add(weights)

        def mean(x: Array) -> Array:
            return (jnp.zeros(like, y.dtype).at[labels].add(weights * x) / jnp.where(mass > 0, mass, 1))[labels]

        found = mean(y - shift)
        found = shift + found + mean(y - shift - found)
        low = jnp.full(like, jnp.inf, y.dtype).at[labels].min(jnp.where(weights > 0, y, jnp.inf))
        high = jnp.full(like, -jnp.inf, y.dtype).at[labels].max(jnp.where(weights > 0, y, -jnp.inf))
        return jnp.clip(found, low[labels], high[labels])

    def rising(self, x: Array) -> Array:
        tails, heads = self.highest.base.ends()

        def pushed(x: Array) -> Array:
            return x.at[heads].max(x[tails], mode="promise_in_bounds")

        def changed(pair: tuple[Array, Array]) -> Array:
            return jnp.any(pair[0] != pair[1])

        return jax.lax.while_loop(changed, lambda pair: (pair[1], pushed(pair[1])), (x, pushed(x)))[1]

    def inverse(self, right: Array, times: int) -> tuple[Array, Array]:
        """With conjugate gradients, which may not converge in 1,000 steps."""
        base = self.highest.base
        limit = max(CG_TOLERANCE, 2 * float(jnp.finfo(right.dtype).eps))

        def balance(x: Array) -> Array:
            """Restore sums of 0, to rounding, for the next solve."""
            if self.labels is None:
                return x - jnp.mean(x, axis=tuple(range(len(self.highest.in_shape))))
            nothing = jnp.zeros((self.components, *x.shape[1:]), x.dtype)
            sums, sizes = nothing.at[self.labels].add(x), nothing.at[self.labels].add(1)
            return x - (sums / sizes)[self.labels]

        def solve(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x, failed = carry
            found, _ = jax.scipy.sparse.linalg.cg(
                base.laplacian, x, tol=limit, maxiter=CG_STEPS, M=lambda residual: residual / self.degrees
            )
            left = jnp.linalg.norm(base.laplacian(found) - x)
            return balance(found), failed | ~(left <= 100 * limit * jnp.linalg.norm(x))

        found, failed = jax.lax.fori_loop(0, times, solve, (right, jnp.zeros((), bool)))
        return found, ~failed


@pytree
class ChainGround(Ground):
    """A chain with free ends: the null space holds the polynomials."""

    basis: Any  # orthonormal `[n, ...]`, of the polynomials that no penalty sees

    null_eps = NULL_EPS
    proves_null = True

    def means(self, y: Array, shift: Array, counted: Any) -> Array:
        found = jnp.broadcast_to(shift, y.shape)
        for _ in range(2):  # so that sums over many nodes keep their digits
            found = found + _polynomial(self.basis, y - found, counted)
        return found

    def shortest(self, pull: Array) -> tuple[Array, Array]:
        """The only u."""
        return self.highest.potential(pull), jnp.ones((), bool)

    def proof(self, penalty: Any, pull: Array) -> tuple[Array, Array]:
        size = jnp.max(jnp.abs(pull))
        size = jnp.where(size > 0, size, 1)
        dual = size * self.shortest(pull / size)[0]
        inside = penalty.project_dual(dual)
        return inside, jnp.all(jnp.abs(inside - dual) <= ROUNDING * jnp.abs(dual))


@pytree
class FreeGridGround(ChainGround):
    """A grid with free ends."""

    transform: Any  # makes `ΔᵀΔ` of `highest` diagonal

    def inverse(self, right: Array, times: int) -> tuple[Array, Array]:
        return _inverse_by(self.transform, right, times)

    def shortest(self, pull: Array) -> tuple[Array, Array]:
        """`u = Δ (ΔᵀΔ)^+ pull`, refined since the condition number of `ΔᵀΔ` is the square of Δ's."""

        def solve(pull: Array) -> Array:
            return self.highest.mv(self.inverse(pull, 1)[0])

        def refine(_: Any, dual: Array) -> Array:
            return dual + solve(pull - self.highest.rmv(dual))

        dual = jax.lax.fori_loop(0, REFINEMENTS, refine, solve(pull))
        left = jnp.linalg.norm(pull - self.highest.rmv(dual))
        return dual, left <= DUAL_ROUNDING * jnp.linalg.norm(pull)


def _inverse_by(transform: Any, right: Array, times: int) -> tuple[Array, Array]:
    found = transform.apply(right, lambda level: jnp.where(level > 0, level, jnp.inf) ** -times)
    return found, jnp.ones((), bool)


def _polynomial(basis: Array, y: Array, weights: Any) -> Array:
    """The weighted least-squares fit with the columns of the basis."""
    pulled = jnp.matmul(basis.T, (y if weights is None else weights * y).reshape(len(basis), -1), precision=HIGHEST)
    if weights is not None:
        gram = jnp.matmul(basis.T, weights.reshape(-1, 1) * basis, precision=HIGHEST)
        pulled = jnp.linalg.solve(gram, pulled)
    return jnp.matmul(basis, pulled, precision=HIGHEST).reshape(y.shape)


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
    means: Any  # the null fit: the mean of every node's component, or the polynomial, in the shape of the signal
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
        means = ground.means(y, shift, counted)
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


def with_known(ground: Ground, data: Data, penalty: Any) -> tuple[Data, Array]:
    """The data with the signal itself as the null fit if it costs no penalty, and whether it does.

    A signal that differs from its null fit by rounding costs none; at missing nodes it has the values of that fit.
    """
    known, kind = data.loss.target, data.means.dtype
    free = penalty.value(ground.operator.mv(known)) == 0
    if ground.null_eps:
        apart = data.loss.mask_missing(known - data.means)
        free = free | (jnp.max(jnp.abs(apart)) <= ground.null_eps * jnp.finfo(kind).eps * jnp.max(jnp.abs(known)))
        known = data.means + apart
    return dataclasses.replace(data, means=jnp.where(free, known, data.means)), free


prepare = Jitted(data_of)
