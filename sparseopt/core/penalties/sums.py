"""Penalties made of other penalties: on the rows of a map, and sums over slices of rows."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseopt.core.base.types import FloatArray, Scalar, pytree, static
from sparseopt.core.operators.differences import spread
from sparseopt.core.operators.row_tables import RowTable
from sparseopt.core.penalties.protocols import Conjugate, Norm, Penalty, gauge


@pytree
class Lifted:
    """`penalty(Ψ_i x)` for a group of rows that share no column; see `lift`."""

    penalty: Any
    rows: Any
    row_squares: Any

    def value(self, x: FloatArray) -> Float[Array, ""]:
        return self.penalty.value(self.rows.mv(x))

    def prox(self, x: FloatArray, step: Scalar) -> FloatArray:
        """`x + Ψ_iᵀ ((u - s) / |a|²)` with `s = Ψ_i x` and u the prox of s at `step |a|²`, row by row."""
        return self.moved(x, step)[0]

    def moved(self, x: FloatArray, step: Scalar) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The prox, the values u of its rows with their exact zeros, and the move `(u - s) / |a|²` along every row."""
        s = self.rows.mv(x)
        squares = spread(self.row_squares, s)
        u = self.penalty.prox(s, step * squares)
        move = (u - s) / squares
        return x + self.rows.rmv(move), u, move


def lift(penalty: Penalty, group: Any) -> Lifted:
    """The penalty on the values of a group's rows, as a penalty on the array that they act on.

    For one row a and any scalar penalty p, `argmin_v 1/2 ||v - x||² + step p(aᵀv)` is
    `x + a (u - s) / |a|²` with `s = aᵀx` and `u = argmin_u 1/2 (u - s)² + step |a|² p(u)`: v moves along a only.
    Rows without a common column do not interact.

    Args:
        penalty: any penalty that acts on every entry (or every slice of channels) separately; its prox is called with
            one step per row. One with a weight per row needs `by_group` first.
        group: one group of a `RowTable`, or any linear map with `row_squares()` whose rows share no column.

    Source: Bu, Wu, Zuo, "Doge-ADMM", section 3; for orthogonal rows, Combettes and Pesquet, 2007, prop. 11.

    Example:
        >>> from sparseopt.core.operators.row_tables import row_table
        >>> from sparseopt.core.penalties.sums import lift
        >>> chain = so.Graph.chain(4)
        >>> table = row_table(chain.matrix(1), chain.groups(1), jnp.float32)  # the edges 0-1 and 2-3; the edge 1-2
        >>> jax.vmap(lambda group: lift(so.L1(1.0), group).prox(jnp.array([0.0, 1.0, 5.0, 9.0]), step=1.0))(table)
        Array([[0.5, 0.5, 6. , 8. ],
               [0. , 2. , 4. , 9. ]], dtype=float32)
    """
    return Lifted(penalty, group, jnp.asarray(group.row_squares()))


def by_group(penalty: Any, table: RowTable, shape: tuple[int, ...], channels: int = 0) -> Any:
    """A penalty on all rows with a leading axis of groups on every leaf, for `jax.vmap` along with the table.

    A leaf with one number per row is gathered in the order of the table; any other leaf is the same for all rows. The
    penalty acts on arrays `[*shape]`, which `table.row_numbers` index flattened, with a number of trailing `channels`.

    Example:
        >>> from sparseopt.core.penalties.sums import by_group
        >>> from sparseopt.core.operators.row_tables import row_table
        >>> chain = so.Graph.chain(4)
        >>> table = row_table(chain.matrix(1), chain.groups(1), jnp.float32)
        >>> by_group(so.L1(jnp.array([1.0, 2.0, 3.0])), table, (3,)).weight  # a padded row has the last weight
        Array([[1., 3.],
               [2., 3.]], dtype=float32)
    """

    def spread_out(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        if leaf.ndim <= channels:
            return jnp.broadcast_to(leaf, (table.row_numbers.shape[0], *leaf.shape))
        trailing = leaf.shape[leaf.ndim - channels :]
        return table.gathered(jnp.broadcast_to(leaf, (*shape, *trailing)).reshape(-1, *trailing))

    return jax.tree.map(spread_out, penalty)


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


@pytree
class ConjugateSum(Sum):
    """A `Sum` of convex penalties with known conjugates, whose conjugate is the sum of theirs."""

    def slack(self, x: FloatArray, dual: FloatArray) -> FloatArray:
        terms = [penalty.slack(part, of_part) for penalty, part, of_part in self._parts(x, dual)]
        return jnp.concatenate([part.reshape(-1) for part in terms])

    def dual_norm(self, dual: FloatArray) -> Float[Array, ""]:
        return jnp.max(jnp.stack([gauge(penalty, part) for penalty, part in self._parts(dual)]))


@pytree
class NormSum(ConjugateSum):
    """A `Sum` of norms, which is a norm; its dual norm is the largest of theirs."""

    def project_dual(self, dual: FloatArray) -> FloatArray:
        return jnp.concatenate([penalty.project_dual(part) for penalty, part in self._parts(dual)])


def stacked(penalties: Sequence[Penalty], sizes: Sequence[int]) -> Sum:
    """The sum of penalties on consecutive slices of rows: a `Norm` if all are, and a `Conjugate` if all are.

    Example:
        >>> from sparseopt.core.penalties.sums import stacked
        >>> stacked([so.L1(1.0), so.L1(2.0)], [2, 1]).prox(jnp.array([3.0, 0.5, 3.0]), step=1.0)
        Array([2., 0., 1.], dtype=float32)
    """
    kind = Sum
    if all(isinstance(penalty, Norm) for penalty in penalties):
        kind = NormSum
    elif all(isinstance(penalty, Conjugate | Norm) for penalty in penalties):
        kind = ConjugateSum
    return kind(tuple(penalties), tuple(int(size) for size in sizes))
