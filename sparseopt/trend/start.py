"""Floor 5: where a solve starts: the signal, an earlier fit, or the component means if they are the fit or close."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import fft, sparse
from scipy.sparse import linalg

from sparseopt.core.operators import Split
from sparseopt.core.penalties import Norm
from sparseopt.core.problem import Solution
from sparseopt.core.solvers.admm import Start
from sparseopt.trend.graph import Graph
from sparseopt.trend.inputs import Signal
from sparseopt.trend.methods import Prepared
from sparseopt.trend.preparation import SetUp

CG_STEPS = 1000
# Steps of smoothing, one after the other, after which a signal is tried as a proof that the means are not the fit.
SMOOTHINGS = (16, 48)


def laplacian_inverse(graph: Graph, right: np.ndarray, times: int) -> np.ndarray | None:
    """`(L^+)^times right` for `[n, channels]` columns whose sums over every component are 0.

    By cosines on grids; by conjugate gradients elsewhere, None if these do not get to rounding in 1,000 steps.
    """
    if graph.shape is not None:
        axes = tuple(range(len(graph.shape)))
        lines = [2 - 2 * np.cos(np.pi * np.arange(n) / n) for n in graph.shape]
        eigenvalues = np.sum(np.meshgrid(*lines, indexing="ij"), axis=0)
        eigenvalues.flat[0] = np.inf
        spectrum = fft.dctn(right.reshape(*graph.shape, -1), axes=axes, norm="ortho")
        spectrum = spectrum / eigenvalues[..., None] ** times
        return fft.idctn(spectrum, axes=axes, norm="ortho").reshape(right.shape)
    matrix = graph.matrix(2)
    diagonal = matrix.diagonal()
    scale = sparse.diags_array(1 / np.where(diagonal > 0, diagonal, 1))
    sizes = np.bincount(graph.components)
    columns = []
    for column in right.T:
        for _ in range(times):
            column, failed = linalg.cg(matrix, column, rtol=1e-12, maxiter=CG_STEPS, M=scale)
            if failed:
                return None
            # The next solve needs sums of 0 again, to rounding.
            column = column - (np.bincount(graph.components, column) / sizes)[graph.components]
        columns.append(column)
    return np.stack(columns, axis=1)


def null_space_dual(graph: Graph, pull: np.ndarray, order: int) -> tuple[np.ndarray, bool] | None:
    """The shortest u with `Δ^(order+1)ᵀ u = pull`, as z with u = z (order odd) or u = D z (order even).

    If u lies in the dual ball, the component means are the fit. With 2m factors in Δ, `u = (L^+)^m pull`, with
    2m + 1 factors `u = D (L^+)^(m+1) pull`.

    Returns:
        z `[n, channels]` and whether D is still to be applied, or None without a solution to rounding.
    """
    halves, odd = divmod(order + 1, 2)
    found = laplacian_inverse(graph, pull, halves + odd)
    return None if found is None else (found, bool(odd))


def cold_start(signal: Signal, graph: Graph, penalty: Any, order: int, base: SetUp, ready: Prepared) -> Start:
    """The centred signal with a dual of 0; or, where the weight may be that large, the means and their dual.

    The means are the fit only if `penalty(Δ z) >= <pull, z>` for all z. So one z decides for most signals: the pull
    itself where smoothing is weak, else the pull smoothed.

    Args:
        signal: checked.
        graph: with an edge.
        penalty: as the solver takes it.
        order: k.
        base: of the signal.
        ready: of the method.
    """
    centre, means = base.centred.center, base.means
    nothing = np.broadcast_to(np.zeros((), centre.dtype), ready.split.row_shape(centre))
    plain = Start(centre, graph.place(nothing, order + 1))
    if not isinstance(penalty, Norm) or plain.dual.shape != base.full.split.row_shape(centre):
        return plain
    weights = 1.0 if signal.weights is None else signal.weights.reshape((-1,) + (1,) * (means.ndim - 1))
    pull = np.asarray(weights * (signal.values - means), np.float64)
    # Of size 1, so that no square overflows: both sides of the comparison are norms.
    size = np.abs(pull).max() or 1.0
    pull = pull / size
    of_pull = base.laid_out(pull)

    def rules_out(z: jax.Array) -> bool:
        return bool(_rules_out(penalty, base.full.split, of_pull, z, size))

    if rules_out(of_pull):
        return plain
    at_nodes = graph.sums(1).column_squares.astype(centre.dtype)
    at_nodes = np.where(at_nodes > 0, at_nodes, 1)
    degrees = graph.place(at_nodes.reshape(*at_nodes.shape, *(1 for _ in means.shape[1:])))
    z = of_pull
    for steps in SMOOTHINGS:
        z = _smoothed(base.full.split, degrees, z, steps)
        if rules_out(z):
            return plain
    found = null_space_dual(graph, pull.reshape(graph.num_nodes, -1), order)
    if found is None:
        return plain
    z = base.laid_out(size * found[0].reshape(means.shape))
    dual = base.full.split.outer.base.difference(z) if found[1] else z
    return Start(base.laid_out(means - base.shift), penalty.project_dual(dual))


@jax.jit
def _rules_out(penalty: Any, split: Split, pull: jax.Array, z: jax.Array, size: Any) -> jax.Array:
    """Whether z shows that the means are not the fit."""
    return penalty.value(split.mv(z)) < size * jnp.sum(pull * z)


@partial(jax.jit, static_argnames="steps")
def _smoothed(split: Split, degrees: jax.Array, z: jax.Array, steps: int) -> jax.Array:
    """What so many steps of a lazy random walk leave of z."""
    laplacian = split.outer.base.laplacian
    return jax.lax.fori_loop(0, steps, lambda _, last: last - laplacian(last) / (2 * degrees), z)


@jax.jit
def exact_start(penalty: Any, centre: jax.Array) -> Start:
    """The fit itself and its dual, where the penalty's prox is all there is to solve: order 0 of `fast_admm`."""
    answer = penalty.prox(centre, 1.0)
    return Start(answer, centre - answer)


def start_point(solution: Solution, signal: Signal) -> np.ndarray:
    """The value of an earlier solution in the shape of the signal's values.

    Raises:
        ValueError: if it has another size.
    """
    value = np.asarray(solution.value)
    if value.size != signal.values.size:
        raise ValueError(
            f"warm_start needs a solution for a signal of the shape {signal.shape}, given one for {value.shape}"
        )
    return value.reshape(signal.values.shape)


def warm_start_of(x: jax.Array, solution: Solution, ready: Prepared, rho: float | None) -> Start:
    """The start that continues an earlier solution at the point x.

    Raises:
        ValueError: if its dual does not fit.
    """
    state = solution.state
    wanted = ready.split.row_shape(x)
    given = getattr(getattr(state, "candidate", None), "shape", None)
    if given != wanted:
        raise ValueError(
            f"warm_start needs a solution of the same graph and order whose dual has the shape {wanted}, given {given}"
        )
    return Start(x, jnp.asarray(state.candidate, x.dtype), state.rho if rho is None else None)
