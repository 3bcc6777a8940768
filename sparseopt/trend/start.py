"""Floor 5: the start for weights so large that the answer is the component means, or close to it."""

import numpy as np
from scipy import fft, sparse
from scipy.sparse import linalg

from sparseopt.trend.graph import Graph

CG_STEPS = 1000


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
