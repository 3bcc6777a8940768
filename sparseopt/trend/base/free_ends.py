"""The geometries of chains, at any times, and of grids with free ends, whose differences vanish on polynomials."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparseopt.core.base.arguments import require_memory
from sparseopt.core.base.types import precision
from sparseopt.core.losses.residuals import has_two_slopes
from sparseopt.core.operators.divided_differences import axis_differences, divided_difference, polynomial_basis
from sparseopt.core.operators.maps import Identity
from sparseopt.core.operators.normal_solves import LONGEST_FREE_AXIS, ConjugateGradient, banded_solve, free_solve
from sparseopt.core.operators.row_tables import Sums, matrix_sums
from sparseopt.trend.base.geometry import CG_TOLERANCE, Geometry
from sparseopt.trend.base.graph_ends import Chain, Grid
from sparseopt.trend.base.ground import NULL_EPS, ChainGround, FreeGridGround, Ground

# The rank of a dense matrix of this many columns takes about a second.
MOST_RANKED = 1024


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FreeGrid(Grid):
    """A grid with free ends."""

    kind = "free grid"
    wide, fills_rows = True, False
    null_name = "a polynomial of this degree"
    along, each = " along an axis", " in each axis"  # what messages add

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, ends='free')"

    @functools.cached_property
    def step(self) -> float:
        """The typical step."""
        return min(self.spacing or (1.0,))

    @functools.cached_property
    def plain(self) -> Geometry:
        """The geometry at order 0, which has fast methods."""
        return Grid(self.shape, self.spacing)

    def at(self, order: int) -> Geometry:
        if order == 0:
            return self.plain
        longest = max(self.shape)
        if longest < order + 2:
            raise ValueError(
                f"order {order} with free ends needs at least {order + 2} nodes{self.along}, given {longest}: with "
                "fewer, every signal is a polynomial of that degree, and the fit is the signal itself; lower the "
                'order, or use ends="graph"'
            )
        self._require_short(order, longest)
        return self

    def _require_short(self, order: int, longest: int) -> None:
        if longest > LONGEST_FREE_AXIS:
            raise ValueError(
                f"order {order} with free ends needs a grid of at most {LONGEST_FREE_AXIS:,} nodes along an axis, "
                f'given {longest:,}: divide the grid, or use ends="graph"'
            )

    def require_determined(self, order: int, seen: np.ndarray) -> None:
        count, determined = self._determined(order, seen)
        if determined < count:
            raise ValueError(
                f"order {order} with free ends needs at least {count} observed nodes, given "
                f"{np.count_nonzero(seen)}, and they must determine a polynomial of that degree{self.each}: lower the "
                'order, or use ends="graph"'
            )

    def _determined(self, order: int, seen: np.ndarray) -> tuple[int, int]:
        """The number of polynomials, and how many of them the observed nodes determine."""
        basis = self.polynomials(order)
        return basis.shape[1], int(np.linalg.matrix_rank(basis[seen]))

    def refuses_loss(self, loss: Any, order: int) -> str | None:
        if getattr(loss, "smooth", False) or self._takes(loss):
            return None
        return (
            f"free ends at order {order} need smooth losses, or on a chain Absolute or Quantile, "
            f'given {type(loss).__name__}: use Huber, or ends="graph"'
        )

    def _takes(self, loss: Any) -> bool:
        return False

    def difference(self, order: int, dtype: Any) -> Any:
        return axis_differences(self.shape, order, self.spacing) if order else Identity(self.shape)

    def unit(self, order: int) -> float:
        return self.step**-order

    def matrix(self, order: int, from_edges: bool = False) -> sparse.csr_array:
        if order == 0:
            return super().matrix(order, from_edges)
        if order >= max(self.shape):
            return sparse.csr_array((0, self.num_nodes))  # no axis has order + 1 nodes
        return self.difference(order, np.float64).matrix()

    def _sums(self, order: int, from_edges: bool) -> Sums:
        return matrix_sums(self.matrix(order, from_edges), self.shape)

    def _groups(self, block: int, from_edges: bool) -> np.ndarray | None:
        return super()._groups(block, from_edges) if block == 1 else None

    def factors(self, order: int) -> list[sparse.csr_array]:
        # The rows of a node along all axes couple many rows: D Dᵀ has more fill than the last factor, the identity.
        rows = sparse.csr_array(self.matrix(order + 1) / self.unit(order + 1))
        return [rows, sparse.csr_array(sparse.eye_array(self.num_nodes))]

    def count(self, order: int) -> int:
        return math.prod(self.difference(order, np.float64).out_shape)

    def rows(self, values: Any, order: int) -> Any:
        return values if order else super().rows(values, order)

    def list_rows(self, values: Any, order: int) -> Any:
        return values if order else super().list_rows(values, order)

    def polynomials(self, order: int) -> np.ndarray:
        """Orthonormal columns `[n, count]` that span the signals that a trend filter does not penalise."""

        def build() -> np.ndarray:
            counts = [min(n, order + 1) for n in self.shape]
            count = math.prod(counts)
            what = f"the {count:,} products of polynomials that order {order} with free ends does not penalise"
            require_memory(8 * count * self.num_nodes, what, 'lower the order, or use ends="graph"')
            return functools.reduce(np.kron, map(self._polynomials_of, self.shape, counts))

        return self.cache(("polynomials", order), build)

    def _polynomials_of(self, n: int, count: int) -> np.ndarray:
        return polynomial_basis(None, n, count)

    def null_fit(self, values: np.ndarray, mass: np.ndarray, order: int) -> np.ndarray:
        """The polynomial of least squares."""
        root, basis = np.sqrt(mass)[:, None], self.polynomials(order)
        fit = basis @ np.linalg.lstsq(root * basis, root * values)[0]
        return fit + basis @ np.linalg.lstsq(root * basis, root * (values - fit))[0]

    def as_null_fit(self, asked: Any) -> np.ndarray | None:
        values, mass = asked.columns, asked.mass
        fit = self.null_fit(values, mass, asked.order)
        found = np.where((mass > 0)[:, None], values, fit)
        rounding = NULL_EPS * np.finfo(asked.dtype).eps * np.abs(values).max()
        return found.reshape(asked.values.shape) if np.abs(found - fit).max() <= rounding else None

    def subtract_null(self, values: np.ndarray, order: int) -> np.ndarray:
        basis = self.polynomials(order)
        return values - basis @ (basis.T @ values)

    def inverses(self, order: int) -> int:
        return 0

    def only_dual(self, z: np.ndarray, order: int) -> np.ndarray | None:
        return None

    def flow_order(self, order: int) -> tuple[int, int]:
        return order, self.polynomials(order).shape[1]

    def cut_ratio(self, b: np.ndarray, demand: np.ndarray, order: int) -> float:
        """`<demand, b> / ||Δ b||_1`."""
        size = np.abs(self.matrix(order + 1) @ b).sum()
        return float(demand @ b / size) if size > 0 else 0.0

    def _basis(self, orders: tuple[int, ...], dtype: Any) -> np.ndarray:
        return self.polynomials(max(0, min(orders))).astype(dtype)

    def _free_transform(self, orders: tuple[int, ...], dtype: Any) -> Any:
        """The transform that makes the sum of `ΔᵀΔ` of these orders diagonal."""
        build = functools.partial(free_solve, self.shape, orders, dtype, self.spacing)
        return self.cache(("transform", orders, np.dtype(dtype).name), build)

    def _ground(self, common: dict[str, Any], orders: tuple[int, ...], dtype: Any, channels: bool) -> Ground:
        transform = self._free_transform((max(orders) + 1,), dtype)
        return FreeGridGround(**common, basis=self._basis(orders, dtype), transform=transform)

    def exact_step(self, weighted: bool) -> bool:
        return True

    def x_step(self, orders: tuple[int, ...], columns: np.ndarray, weighted: bool, channels: bool, dtype: Any) -> Any:
        transform = self._free_transform(orders, dtype)
        return ConjugateGradient(None, jnp.asarray(CG_TOLERANCE, dtype), transform) if weighted else transform

    def refuses_count(self) -> str | None:
        if self.num_nodes <= MOST_RANKED:
            return None
        return (
            f"degrees of freedom are counted, as the rank of a matrix, on grids with free ends of at most "
            f"{MOST_RANKED:,} nodes, given {self.num_nodes:,}"
        )

    def freedom(self, nonzero: np.ndarray, order: int, observed: np.ndarray | None) -> int:
        return self.num_nodes - int(np.linalg.matrix_rank(self.matrix(order + 1).toarray()[~nonzero]))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FreeChain(FreeGrid):
    """A chain with free ends, at the times 0, 1, 2, ... or others; it has no spacing."""

    times: np.ndarray | None = None
    kind = "free chain"
    line, transforms = True, False
    along = each = ""

    def __repr__(self) -> str:
        return f"Graph.chain({self.num_nodes}{'' if self.times is None else ', times'})"

    @functools.cached_property
    def step(self) -> float:
        return 1.0 if self.times is None else float(np.median(np.diff(self.times)))

    @functools.cached_property
    def plain(self) -> Geometry:
        return Chain(self.shape)

    def _require_short(self, order: int, longest: int) -> None:
        """It may have any length."""

    def _determined(self, order: int, seen: np.ndarray) -> tuple[int, int]:
        return order + 1, int(np.count_nonzero(seen))

    def _takes(self, loss: Any) -> bool:
        return has_two_slopes(loss)

    def difference(self, order: int, dtype: Any) -> Any:
        return divided_difference(self.times, self.num_nodes, order, dtype) if order else Identity(self.shape)

    def unit(self, order: int) -> float:
        return self.step ** (1 - order)

    def factors(self, order: int) -> list[sparse.csr_array]:
        times = None if self.times is None else self.times / self.step
        steps = divided_difference(times, self.num_nodes, order + 1, np.float64).steps()
        pairs = [sparse.csr_array(second @ first) for first, second in zip(steps[::2], steps[1::2], strict=False)]
        return steps[2 * len(pairs) :] + pairs[::-1]

    def _polynomials_of(self, n: int, count: int) -> np.ndarray:
        return polynomial_basis(self.times, n, count)

    def only_dual(self, z: np.ndarray, order: int) -> np.ndarray:
        with precision(np.dtype(np.float64)):
            return np.asarray(_potential(self.difference(order + 1, np.float64), z))

    def _ground(self, common: dict[str, Any], orders: tuple[int, ...], dtype: Any, channels: bool) -> Ground:
        return ChainGround(**common, basis=self._basis(orders, dtype))

    def one_metric(self, channels: bool) -> bool:
        return channels

    def x_step(self, orders: tuple[int, ...], columns: np.ndarray, weighted: bool, channels: bool, dtype: Any) -> Any:
        if dtype == np.float32:  # rounding may leave the matrix indefinite
            return Geometry.x_step(self, orders, columns, weighted, channels, dtype)
        matrices = [self.matrix(order) for order in orders]
        return banded_solve(sum(matrix.T @ matrix for matrix in matrices), dtype)

    def refuses_count(self) -> str | None:
        return None

    def freedom(self, nonzero: np.ndarray, order: int, observed: np.ndarray | None) -> int:
        return order + 1 + int(nonzero.sum())

    def knots(self, changed: np.ndarray, order: int) -> np.ndarray:
        return np.flatnonzero(changed) + (order + 1) // 2 + (order + 1) % 2


_potential = jax.jit(lambda difference, pull: difference.potential(pull))
