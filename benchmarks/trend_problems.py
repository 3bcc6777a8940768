"""Trend-filter problems for comparing solvers: generated from seeds, or read from files with known optima.

    minimise over b    1/2 ||y - b||²  +  weight ||Δ^(order+1) b||_1

or on grids, with the isotropic total variation, `weight sum_j ||(D b)_j||_2` over the differences of every node.

NumPy and SciPy only: the objective is independent of all solvers, and a peer may need a Python without sparseopt.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import sparse, spatial
from scipy.sparse import csgraph

NOISE = 20.0
# Edges per node of the road-like graph; the Delaunay triangulation has three.
ROAD_EDGES = 1.94


@dataclasses.dataclass(frozen=True, eq=False)
class TrendProblem:
    """One problem, of a `grid` in row-major order or of any graph with edges `[m, 2]`.

    `known` are the objective and the lower bound of a stored optimum; the penalty may be the isotropic total variation.
    """

    name: str
    y: np.ndarray
    edges: np.ndarray
    shape: tuple[int, ...] | None  # of a grid
    order: int
    weight: float
    known: tuple[float, float] | None = None
    isotropic: bool = False

    @property
    def axes(self) -> int:
        """Of a grid; 0 for other graphs."""
        return len(self.shape or ())

    @functools.cached_property
    def incidence(self) -> sparse.csr_array:
        m = self.edges.shape[0]
        places = (np.repeat(np.arange(m), 2), self.edges.reshape(-1))
        return sparse.csr_array((np.tile([1.0, -1.0], m), places), shape=(m, self.y.size))

    @functools.cached_property
    def matrix(self) -> sparse.csr_array:
        """`Δ^(order+1)`, `[rows, n]`: D, then Dᵀ D, then D Dᵀ D and so on."""
        matrix = self.incidence
        for power in range(self.order):
            matrix = (self.incidence if power % 2 else self.incidence.T) @ matrix
        return matrix.tocsr()

    def objective(self, b: np.ndarray) -> float:
        """The primal objective of a fit `[n]`, in float64."""
        b = np.asarray(b, np.float64).reshape(-1)
        lengths = np.abs(self.matrix @ b)
        if self.isotropic:
            lengths = np.sqrt(np.bincount(self.edges.min(axis=1), lengths**2, b.size))
        return float(0.5 * np.sum((self.y - b) ** 2) + self.weight * lengths.sum())

    def lower_bound(self, u: np.ndarray) -> float:
        """The dual objective of `u`, `[rows]`, clipped to the weight: no fit has a lower objective."""
        pull = self.matrix.T @ np.clip(np.asarray(u, np.float64).reshape(-1), -self.weight, self.weight)
        # Δ maps constants to 0, so subtracting the mean of y changes only the rounding.
        return float((self.y - self.y.mean()) @ pull - 0.5 * pull @ pull)

    @property
    def key(self) -> str:
        """A file name that identifies this problem."""
        content = hashlib.sha256(self.y.tobytes() + np.ascontiguousarray(self.edges).tobytes())
        content.update(f"{self.shape} {self.order} {self.weight!r}{' isotropic' * self.isotropic}".encode())
        return f"{self.name}_{content.hexdigest()[:12]}"


def grid_edges(shape: tuple[int, ...]) -> np.ndarray:
    """The edges of a grid in row-major order, axis by axis, `[m, 2]`."""
    nodes = np.arange(int(np.prod(shape))).reshape(shape)
    ends = [(nodes.swapaxes(0, axis)[:-1], nodes.swapaxes(0, axis)[1:]) for axis in range(len(shape))]
    return np.concatenate([np.stack([low.reshape(-1), high.reshape(-1)], axis=1) for low, high in ends])


def grid_signal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A piecewise smooth field in 0..255 on a grid with one to three axes, with noise."""
    axes = np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij")
    return noisy(scene(*axes, *(np.full(shape, 0.5) for _ in range(3 - len(shape)))), seed).reshape(-1)


def scene(i: np.ndarray, j: np.ndarray, k: np.ndarray) -> np.ndarray:
    """A ramp after a step, a ball and a dark corner, for coordinates in 0..1."""
    ball = (i - 0.4) ** 2 + (j - 0.6) ** 2 + (k - 0.5) ** 2 < 0.06
    return 90 + 70 * j * (i > 0.4) + 90 * ball - 50 * (i + j < 0.5)


def noisy(clean: np.ndarray, seed: int) -> np.ndarray:
    return clean + NOISE * np.random.default_rng(seed).standard_normal(clean.shape)


@functools.cache
def road_like(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A connected planar graph of short edges, and a signal on it: edges `[m, 2]` and y `[n]`.

    Random points, joined by the shortest spanning tree of their Delaunay triangulation and its shortest other edges.
    """
    points = np.random.default_rng(seed).random((n, 2))
    triangles = spatial.Delaunay(points).simplices
    sides = np.sort(np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [0, 2]]]), axis=1)
    edges = np.unique(sides, axis=0).astype(np.int64)
    length = np.linalg.norm(points[edges[:, 0]] - points[edges[:, 1]], axis=1)
    tree = csgraph.minimum_spanning_tree(sparse.csr_array((length, (edges[:, 0], edges[:, 1])), shape=(n, n))).tocoo()
    in_tree = np.isin(edges[:, 0] * n + edges[:, 1], tree.row.astype(np.int64) * n + tree.col)
    first = np.lexsort((length, ~in_tree))[: int(ROAD_EDGES * n)]
    signal = noisy(scene(points[:, 0], points[:, 1], np.full(n, 0.5)), seed + 1)
    return edges[np.sort(first)], signal


def stored(path: Path, name: str, weight: float | None = None) -> TrendProblem:
    """A problem from a file with the fields y, edges, lam, k, beta_opt and u; another weight drops the optimum."""
    with np.load(path) as held:
        y, edges, own = held["y"].reshape(-1), held["edges"].astype(np.int64), float(held["lam"])
        shape = tuple(int(n) for n in held["shape"])
        plain = TrendProblem(name, y, edges, None, int(held["k"]), own if weight is None else weight)
        known = (plain.objective(held["beta_opt"]), plain.lower_bound(held["u"])) if plain.weight == own else None
        # Other graphs have a shape (n,) too: only the edges show whether it is a grid.
        ours, theirs = (np.unique(np.sort(ends, axis=1), axis=0) for ends in (grid_edges(shape), edges))
        is_grid = int(np.prod(shape)) == y.size and np.array_equal(ours, theirs)
        return dataclasses.replace(plain, shape=shape if is_grid else None, known=known)


def generated(name: str, shape: tuple[int, ...], order: int, weight: float, isotropic: bool = False) -> TrendProblem:
    """A grid of a shape, or a road-like graph, whose shape is its number of nodes."""
    if name.startswith("road"):
        edges, y = road_like(*shape)
        return TrendProblem(name, y, edges, None, order, weight)
    return TrendProblem(name, grid_signal(shape), grid_edges(shape), shape, order, weight, isotropic=isotropic)


def problems(quick: bool, truth: Path | None) -> dict[str, Callable[[], TrendProblem]]:
    """A function that makes each problem, by name; if quick, of at most a few thousand nodes.

    `truth` is a folder of problems with known optima; grid256 and road100k use its graphs and signals.
    """
    side, large, cube, road, short, long = (32, 48, 8, 1_000, 500, 2_000)
    if not quick:
        side, large, cube, road, short, long = (256, 1024, 32, 100_000, 5_000, 1_000_000)
    # The shape of each graph, and a weight for each order.
    graphs: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
        f"grid{side}": ((side, side), (20.0, 13.0, 6.0)),
        f"grid{large}": ((large, large), (20.0, 20.0, 6.0)),
        f"cube{cube}": ((cube,) * 3, (20.0, 13.0)),
        f"road{road // 1000}k": ((road,), (25.0, 40.0, 60.0)),
        f"chain{short}": ((short,), (10.0, 10.0, 10.0)),
        f"chain{long}": ((long,), (20.0, 100.0)),
    }
    made: dict[str, Callable[[], TrendProblem]] = {}
    for name, (shape, weights) in graphs.items():
        for order, weight in enumerate(weights):
            title = f"{name}_k{order}"
            made[title] = functools.partial(generated, title, shape, order, weight)
            file = truth / f"{title}_lam10.npz" if truth and not name.startswith("chain") else None
            if file is not None and file.is_file():
                made[title] = functools.partial(stored, file, title, weight)
        if len(shape) > 1:
            title = f"{name}_isotropic"
            made[title] = functools.partial(generated, title, shape, 0, 20.0, isotropic=True)
    if truth is not None and not quick:
        made |= {file.stem: functools.partial(stored, file, file.stem) for file in sorted(truth.glob("*.npz"))}
    return made
