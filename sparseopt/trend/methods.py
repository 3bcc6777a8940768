"""Floor 5: from a graph, an order and a method to the split, the x-step and the row norms that a solver needs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.operators import Difference, Split
from sparseopt.core.penalties import L1
from sparseopt.core.solvers.admm import standard_split
from sparseopt.core.solvers.doge import doge_split
from sparseopt.core.solvers.fast_admm import ChainTotalVariation
from sparseopt.core.solvers.node_solve import ConjugateGradient, Diagonal, cosine_solve
from sparseopt.core.types import pytree
from sparseopt.trend.graph import Graph

# How many differences Anderson acceleration of the standard ADMM remembers; fifteen were hardly better.
ACCELERATION = 10


@pytree
class Prepared:
    """What depends on the graph and the method alone.

    Attributes:
        split: the operator with its metrics.
        node_solve: the x-step.
        row_norms: `||row||_2` of `Δ^(order+1)`.
    """

    split: Split
    node_solve: Any
    row_norms: Any


def chain_penalty(penalty: Any, graph: Graph, order: int) -> ChainTotalVariation:
    """The penalty of `fast_admm`: L1 with the last difference of a chain drawn into it.

    Raises:
        ValueError: for another graph or penalty.
    """
    if graph.shape is None or len(graph.shape) != 1:
        raise ValueError(
            'method="fast_admm" needs a chain, where its inner fused lasso is exact; on other graphs use "doge" or '
            '"admm"'
        )
    if not isinstance(penalty, L1):
        raise ValueError(f'method="fast_admm" solves the L1 penalty, given {penalty}; use "doge" or "admm"')
    if np.ndim(penalty.weight) != 0:
        raise ValueError('method="fast_admm" takes one weight for all differences; use "doge" or "admm"')
    return ChainTotalVariation(penalty.weight, order % 2 == 1)


def starts_exact(method: str, order: int, weighted: bool) -> bool:
    """Whether one prox is the fit, so that the first check ends the solve: chains at order 0."""
    return method == "fast_admm" and order == 0 and not weighted


def prepare(graph: Graph, order: int, method: str, block: int, weighted: bool, dtype: Any, channels: bool) -> Prepared:
    """Build, or take from the graph's cache, the split and the x-step of a method."""
    cosines = graph.shape is not None and not weighted
    key = (method, order, block, cosines, np.dtype(dtype).name, channels)
    return graph.cached(key, lambda: _prepare(graph, order, method, block, cosines, dtype, channels))


def _prepare(graph: Graph, order: int, method: str, block: int, cosines: bool, dtype: Any, channels: bool) -> Prepared:
    base = graph.base(dtype)
    full = order + 1
    row_norms = np.sqrt(graph.sums(full).row_squares)
    row_norms = np.where(row_norms > 0, row_norms, 1).astype(dtype)
    on_edges = (full - block) % 2 == 1
    inner = Difference(base, full - block)
    node_solve: Any
    if method in ("admm", "fast_admm"):
        inner = Difference(base, full if method == "admm" else order)
        split = standard_split(inner, Difference(base, 0, inner.order % 2 == 1), dtype)
        node_solve = _node_solve(graph, inner.order, np.ones(()), cosines, dtype)
    else:
        outer = Difference(base, block, on_edges)
        split = doge_split(outer, inner, graph.sums(block, on_edges), "coefficients", dtype)
        node_solve = Diagonal()
        if inner.order:
            if graph.shape is not None:  # one C for all columns keeps the x-step diagonal under cosines
                split = dataclasses.replace(split, column_scale=split.column_scale.max())
            node_solve = _node_solve(graph, inner.order, split.column_scale, cosines, dtype)

    def place(leaf: Any, order: int) -> Any:
        widen = channels and np.ndim(leaf) > 0
        return graph.place(np.asarray(leaf)[..., None] if widen else leaf, order)

    scales = place(split.row_scale, full), place(split.column_scale, full - block)
    split = dataclasses.replace(split, row_scale=scales[0], column_scale=scales[1])
    if isinstance(node_solve, ConjugateGradient):
        node_solve = dataclasses.replace(node_solve, diagonal=place(node_solve.diagonal, 0))
    return Prepared(jax.tree.map(jnp.asarray, split), jax.tree.map(jnp.asarray, node_solve), place(row_norms, full))


def _node_solve(graph: Graph, order: int, columns: np.ndarray, cosines: bool, dtype: Any) -> Any:
    """The x-step for an inner difference of this order."""
    if cosines:
        assert graph.shape is not None
        return cosine_solve(graph.shape, (order,), dtype)
    if columns.ndim == 0:
        diagonal = columns * graph.sums(order).column_squares
    else:
        matrix = graph.matrix(order)
        diagonal = np.asarray(matrix.multiply(matrix).T @ columns)
    shape = graph.shape or (graph.num_nodes,)
    return ConjugateGradient(diagonal.reshape(shape).astype(dtype), jnp.asarray(1e-2, dtype))
