"""A penalty on entries that is not convex, on working sets: minimisation over one entry at a time, and Newton steps.

    minimise over w    1/2 <w - start, G (w - start)> + <q, w - start> + sum_j g_j(w_j)

The prox of g_j is its exact minimiser over one entry, so a limit of these steps is one that no change of an entry
improves. Newton steps on the smooth pieces of the support end what they begin.

Source: Breheny and Huang, "Coordinate descent algorithms for nonconvex penalized regression", Ann. Appl. Stat. 5,
2011; Bertrand, Klopfenstein, Bannier, Gidel and Massias, "Beyond L1: faster and better sparse models with skglm", 2022.
"""

import copy
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.types import is_traced
from sparseopt.core.penalties.protocols import is_convex
from sparseopt.core.penalties.sums import Sum
from sparseopt.core.working_sets.columns import Product, in_size, round_up
from sparseopt.core.working_sets.entry_terms import Terms, without_intercept
from sparseopt.core.working_sets.restricted import MOST_PAIRS, SHARES, TINY, Enough, effort, newton_direction

# Those on the ways to a penalty; the tolerance and the rounds of each.
CONCAVITIES, LEVEL_TOL, LEVEL_ROUNDS = ((1 / 30, 1 / 10, 1 / 3), (30.0, 10.0, 3.0)), 1e-2, 5


def of_entries(penalty: Any, size: int) -> bool:
    """Whether it is known, not convex, and on entries, maybe with an intercept behind them, which `Problem` adds."""
    if is_traced(penalty) or not size:
        return False
    if (part := without_intercept(penalty, size)) is None:
        return False
    penalty, size = part
    says = all(getattr(penalty, name, False) for name in ("separable", "keeps_zeros", "even"))
    fit = all(np.shape(leaf) in ((), (1,), (size,)) for leaf in jax.tree.leaves(penalty))
    return says and fit and hasattr(penalty, "weight") and not is_convex(penalty)


class EntryPenalty(Terms):
    """The penalty of a vector of entries.

    Attributes:
        free: the entries whose weight is 0, as that of an intercept.
        squares: the second derivative of the loss by every entry.
        scale: the length of the gradient at 0, in units in which these are 1.
    """

    convex = by_entry = False

    def __init__(self, penalty: Any, size: int, squares: np.ndarray, scale: float) -> None:
        ones = 0
        if isinstance(penalty, Sum):
            penalty, ones = penalty.penalties[0], 1
            weight = np.append(np.broadcast_to(penalty.weight, size - 1), 0.0)
            penalty = dataclasses.replace(penalty, weight=weight)
        leaves, self.kind = jax.tree.flatten(penalty)
        self.numbers = np.empty((len(leaves), size))
        for row, leaf in zip(self.numbers, leaves, strict=True):
            row[:] = np.append(leaf, leaf[-1:]) if ones and np.shape(leaf) == (size - 1,) else leaf
        self.squares, self.scale = np.maximum(squares, TINY), scale
        self._find_free()

    def _find_free(self) -> None:
        self.free = np.flatnonzero(jax.tree.unflatten(self.kind, list(self.numbers)).weight == 0)
        self.sided = np.zeros(0, np.int64)
        self.weight = self.ridge = np.zeros(self.squares.size)  # of the free ones

    def take(self, places: np.ndarray) -> "EntryPenalty":
        part = copy.copy(self)
        part.numbers, part.squares = self.numbers[:, places], self.squares[places]
        part._find_free()
        return part

    def value(self, x: np.ndarray) -> float:
        seen = x.nonzero()[0]
        return float(self.local(seen, x[seen])[0].sum())

    def local(self, places: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The terms `[3, k]` of some entries that are not 0, their derivatives and second derivatives."""
        if not x.size:
            return np.zeros((3, 0))
        numbers = _filled(self.numbers[:, places])
        return np.asarray(_local(self.kind, numbers, _filled(x[None])[0]))[:, : x.size]

    def moves(self, x: np.ndarray, gradient: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """How far the minimiser over each entry is, the others fixed."""
        rows = _filled(np.stack([x, gradient, squares]))
        return np.asarray(_moves(self.kind, _filled(self.numbers), rows))[: x.size]

    def scores(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        """How far every entry would move, in units in which the loss has the curvature 1; infinite away from 0."""
        score = np.sqrt(self.squares) * np.abs(self.moves(x, -u, self.squares))
        score[self.held(x)] = np.inf
        return score

    def residual(self, x: np.ndarray, gradient: np.ndarray) -> float:
        """The length of all moves in these units, over that at 0 without a penalty."""
        move = self.moves(x, gradient, self.squares)
        return float(np.sqrt(self.squares @ (move * move))) / max(self.scale, TINY)

    def paths(self) -> "list[list[EntryPenalty]]":
        """Sequences that begin with another concavity and end here: to a better answer than a start at 0 leads to."""
        penalty = jax.tree.unflatten(self.kind, list(self.numbers))
        if not hasattr(penalty, "with_concavity"):
            return [[self]]
        return [[*(self._like(penalty.with_concavity(factor)) for factor in path), self] for path in CONCAVITIES]

    def _like(self, penalty: Any) -> "EntryPenalty":
        level = copy.copy(self)
        level.numbers = np.stack(jax.tree.leaves(penalty))
        return level


def _filled(rows: np.ndarray) -> np.ndarray:
    """Filled up to a common size with the first numbers."""
    filled = np.empty((len(rows), round_up(rows.shape[1])))
    filled[:, : rows.shape[1]] = rows
    filled[:, rows.shape[1] :] = rows[:, :1]
    return filled


def _of(kind: Any, numbers: Array) -> Any:
    return jax.tree.unflatten(kind, list(numbers))


@partial(jax.jit, static_argnums=0)
def _moves(kind: Any, numbers: Array, rows: Float[Array, "3 k"]) -> Float[Array, " k"]:
    x, gradient, square = rows
    return jax.vmap(lambda part, *of: part.prox(*of))(_of(kind, numbers), x - gradient / square, 1 / square) - x


@partial(jax.jit, static_argnums=0)
def _local(kind: Any, numbers: Array, x: Float[Array, " k"]) -> Float[Array, "3 k"]:
    def of(part: Any, x: Array) -> tuple[Array, Array, Array]:
        slope, curve = jax.jvp(jax.grad(part.value), (x,), (jnp.ones_like(x),))
        return part.value(x), slope, curve

    return jnp.stack(jax.vmap(of)(_of(kind, numbers), x))


@partial(jax.jit, static_argnums=0)
def prox_steps(
    kind: Any, numbers: Array, gram: Float[Array, "k k"], both: Float[Array, "2 k"], steps: Any, count: Any
) -> Float[Array, "2 k"]:
    """W and the gradient q after `steps` exact minimisations over one entry, in turn over the first `count`."""
    divisor = jnp.maximum(jnp.diagonal(gram), TINY)

    def step(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, q, j = carry
        new = _of(kind, numbers[:, j]).prox(w[j] - q[j] / divisor[j], 1 / divisor[j])
        return w.at[j].set(new), q + (new - w[j]) * gram[j], jnp.where(j + 1 == count, 0, j + 1)

    w, q, _ = jax.lax.fori_loop(0, steps, step, (*both, 0))
    return jnp.stack([w, q])


def minimise_concave(
    gram: np.ndarray, q: np.ndarray, w: np.ndarray, terms: EntryPenalty, enough: Enough, _: Product | None = None
) -> np.ndarray:
    """The w at which the squares of the moves of all entries, in units of the loss, sum up to at most `enough`.

    The Gram matrix is as in `minimise`.
    """
    count, padded = q.size, in_size(gram, q.size)
    gram, numbers = padded[:count, :count], _filled(terms.numbers)
    square = np.maximum(gram.diagonal(), TINY)
    passes, most = effort(count)
    for _pair in range(MOST_PAIRS):
        before, given = w, _filled(np.stack([w, q]))
        w, q = np.array(prox_steps(terms.kind, numbers, padded, given, passes * count, count))[:, :count]
        w, q = _newton(gram, q, w, terms, most)
        move = terms.moves(w, q, square)
        if square @ (move * move) <= enough.gain or (before == w).all():
            break
    return w


def _newton(
    gram: np.ndarray, q: np.ndarray, w: np.ndarray, terms: EntryPenalty, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Newton steps on the entries that are not 0; an entry that would change its sign becomes 0."""
    free = np.zeros(w.size, bool)
    free[terms.free] = True
    for _ in range(most):
        support = w.nonzero()[0]
        if not support.size:
            break
        at, keeps_sign, rows = w[support], ~free[support], gram[support]
        value, slope, curve = terms.local(support, at)
        way = newton_direction(rows[:, support], q[support] + slope, curve)
        if way is None:
            break
        for share in SHARES:
            target = at + share * way
            target[(target * at < 0) & keeps_sign] = 0
            q_new, inside = q + (target - at) @ rows, target.nonzero()[0]
            change = 0.5 * float((q + q_new)[support] @ (target - at)) - value.sum()
            change += terms.local(support[inside], target[inside])[0].sum()
            if change < 0:
                break
        else:
            break
        w = w.copy()
        w[support], q = target, q_new
        if np.abs(target - at).max() <= 1e-10 * np.abs(at).max():
            break
    return w, q
