"""Penalties made of other penalties: on the rows of a map, and sums over slices of rows."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.core.base.arguments import own_refusal
from sparseopt.core.base.types import FloatArray, Scalar, is_traced, pytree, static
from sparseopt.core.operators.differences import spread
from sparseopt.core.penalties.protocols import Penalty, gauge, has_conjugate, is_convex, is_norm


@pytree
class Lifted:
    """`sum_i penalty(Ψ_i x_i)` over groups of rows that share no column, each with its own copy in x.

    x is `[*columns, groups]`, with channels `[*columns, channels, groups]`.

    For one row a and any scalar penalty p, `argmin_v 1/2 ||v - x||² + step p(aᵀv)` is
    `x + a (u - s) / |a|²` with `s = aᵀx` and `u = argmin_u 1/2 (u - s)² + step |a|² p(u)`: v moves along a only.
    Rows without a common column do not interact.

    Attributes:
        penalty: any penalty that acts on every entry (or every slice of channels) separately; its prox is called with
            one step per row.
        rows: a linear map, Ψ, that accepts trailing axes.
        squares: the squared norm of each of its rows; any positive number for a row without entries.
        groups: booleans `[*rows, groups]`, with channels `[*rows, 1, groups]`: the rows of each group, of which no two
            share a column. A row in no group is left out.

    Source: Bu, Wu, Zuo, "Doge-ADMM", section 3; for orthogonal rows, Combettes and Pesquet, 2007, prop. 11.

    Example:
        >>> from sparseopt.core.operators.matrices import linear_map
        >>> from sparseopt.core.penalties.sums import Lifted
        >>> chain = so.Graph.chain(4)
        >>> groups = chain.groups(1)[:, None] == np.arange(2)  # the edges 0-1 and 2-3; the edge 1-2
        >>> lifted = Lifted(so.L1(1.0), linear_map(chain.matrix(1)), 2 * jnp.ones(3), groups)
        >>> x = jnp.array([0.0, 1.0, 5.0, 9.0])
        >>> lifted.prox(jnp.stack([x, x], axis=-1), step=1.0).T
        Array([[0.5, 0.5, 6. , 8. ],
               [0. , 2. , 4. , 9. ]], dtype=float32)
    """

    penalty: Any
    rows: Any
    squares: Any
    groups: Any

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(jax.vmap(self.penalty.value, -1)(self._of_groups(self.rows.mv(x))))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """`x_i + Ψ_iᵀ ((u - s) / |a|²)` with `s = Ψ_i x_i` and u the prox of s at `step |a|²`, row by row."""
        return self.move(x, step)[0]

    def move(self, x: FloatArray, step: Scalar) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The prox, and for every row of Ψ its value u with exact zeros and its move `(u - s) / |a|²`."""
        s = self.rows.mv(x)
        squares = spread(jnp.asarray(self.squares), s[..., 0])
        u = jax.vmap(lambda s: self.penalty.prox(s, step * squares), -1, -1)(s)
        move = self._of_groups((u - s) / squares[..., None])
        return x + self.rows.rmv(move), jnp.sum(self._of_groups(u), axis=-1), jnp.sum(move, axis=-1)

    def _of_groups(self, values: FloatArray) -> FloatArray:
        return jnp.where(jnp.asarray(self.groups), values, 0)


@pytree
class Sum:
    """Penalties on consecutive slices of rows, as one penalty on all; see `stacked`."""

    penalties: tuple[Any, ...]
    sizes: tuple[int, ...] = static()  # rows of each

    def _parts(self, *arrays: Any) -> Any:
        """Every penalty with its slices of the arrays; a number is the same for all."""
        ends = list(itertools.accumulate(self.sizes))[:-1]
        slices = [jnp.split(x, ends) if jnp.ndim(x) else [x] * len(self.sizes) for x in arrays]
        return zip(self.penalties, *slices, strict=True)

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return jnp.sum(jnp.stack([penalty.value(part) for penalty, part in self._parts(x)]))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        return jnp.concatenate([penalty.prox(part, level) for penalty, part, level in self._parts(x, step)])

    @property
    def separable(self) -> bool:
        return all(getattr(penalty, "separable", False) for penalty in self.penalties)

    @property
    def convex(self) -> bool:
        return all(map(is_convex, self.penalties))

    @property
    def entry_terms(self) -> Any:
        """As in `core.working_sets.entry_terms`; absent if a penalty has none."""
        parts = [penalty.entry_terms for penalty in self.penalties]
        arrays: Any = jnp if is_traced(self) else np

        def joined(numbers: tuple) -> Any:
            return arrays.concatenate(list(map(arrays.broadcast_to, numbers, self.sizes)))

        return lambda: tuple(map(joined, zip(*(part() for part in parts), strict=True)))

    def refuses(self) -> str | None:
        return next(filter(None, map(own_refusal, self.penalties)), None)


@pytree
class ConjugateSum(Sum):
    """A `Sum` of convex penalties with known conjugates, whose conjugate is the sum of their conjugates."""

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        terms = [penalty.slack(part, of_part) for penalty, part, of_part in self._parts(x, dual)]
        return jnp.concatenate([part.reshape(-1) for part in terms])

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        return jnp.max(jnp.stack([gauge(penalty, part) for penalty, part in self._parts(dual)]))


@pytree
class NormSum(ConjugateSum):
    """A `Sum` of norms, which is a norm; its dual norm is the largest of their dual norms."""

    def project_dual(self, dual: FloatArray) -> FloatArray:
        return jnp.concatenate([penalty.project_dual(part) for penalty, part in self._parts(dual)])


def stack(penalties: Sequence[Penalty], sizes: Sequence[int]) -> Sum:
    """The sum of penalties on consecutive slices of rows: a `Norm` if all are, and a `Conjugate` if all are.

    Example:
        >>> from sparseopt.core.penalties.sums import stack
        >>> stack([so.L1(1.0), so.L1(2.0)], [2, 1]).prox(jnp.array([3.0, 0.5, 3.0]), step=1.0)
        Array([2., 0., 1.], dtype=float32)
    """
    kind = Sum
    if all(map(is_norm, penalties)):
        kind = NormSum
    elif all(map(has_conjugate, penalties)):
        kind = ConjugateSum
    return kind(tuple(penalties), tuple(int(size) for size in sizes))
