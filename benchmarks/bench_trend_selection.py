"""Choice of the weight: the error at the level that a rule chooses over that of the best level. JSON lines.

    python benchmarks/bench_trend_selection.py [--only grid-spiky,road-spiky] [--repeats 50]

Four kinds of signal (piecewise constant, piecewise linear, smooth, spiky) on a grid and on a planar graph like a road
network, each with `--repeats` draws of white noise. For every draw one path is solved, every rule chooses its level,
and the oracle chooses the one with the smallest mean squared error. A line contains the errors of all draws.
Cross-validation solves one more path per fold, with missing nodes; it runs at order 0 only, where this is fast.

Counts and labels are drawn from the piecewise constant signal as log-rate or log-odds. Their error is the mean deviance
of the fitted mean from the true one, twice the Kullback-Leibler divergence.

At order 0 a second line compares L1 with MCP by `reweighted`, each at its best weight: the error, and the
slope of the fit over the truth, which is below 1 if the fit is shrunk.

Source: Wang, Sharpnack, Smola, Tibshirani, "Trend filtering on graphs", JMLR 17 (2016), for the kinds of signal and for
errors at the best level as the measure; Toussaint, "The relative neighbourhood graph of a finite planar set", Pattern
Recognition 12 (1980), for the roads.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import emit, environment, options, selection
from scipy import sparse, special
from scipy.sparse import csgraph
from scipy.spatial import Delaunay

import sparseopt as so
from sparseopt.trend.methods.losses import node_deviances
from sparseopt.trend.paths.path import TrendPath, trend_path

SIDE, CROSSINGS = 32, 1000
# Signals have a standard deviation of 1.
NOISE = 0.5
FOLDS = 5
TARGET = 1.1
# Values of gamma for MCP, and the number of weights.
GAMMAS = (1.5, 3.0)
LEVELS = 12
PEAKS = np.array([[0.2, 0.2], [0.7, 0.15], [0.45, 0.5], [0.85, 0.55], [0.2, 0.75], [0.65, 0.85]])
HEIGHTS = np.array([1.0, -0.8, 1.2, 0.9, -1.1, 0.7])
WIDTH = 0.04


def grid() -> tuple[so.Graph, np.ndarray]:
    line = (np.arange(SIDE) + 0.5) / SIDE
    return so.Graph.grid((SIDE, SIDE)), np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)


def road() -> tuple[so.Graph, np.ndarray]:
    """Random places; two are joined if no third one is closer to both than they are to each other."""
    places = np.random.default_rng(2016).random((CROSSINGS, 2))
    corners = Delaunay(places).simplices
    pairs = np.unique(np.sort(np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [0, 2]]]), 1), axis=0)
    apart = np.linalg.norm(places[:, None] - places, axis=-1)
    lengths = apart[pairs[:, 0], pairs[:, 1], None]
    between = ((apart[pairs[:, 0]] < lengths) & (apart[pairs[:, 1]] < lengths)).any(axis=1)
    return so.Graph.from_edges(pairs[~between], CROSSINGS), places


def constant(graph: so.Graph, places: np.ndarray) -> np.ndarray:
    """A disc and a slanted half plane on level ground."""
    x, y = places.T
    return 3.0 * (np.hypot(x - 0.35, y - 0.4) < 0.22) + 1.5 * (x + 0.3 * y > 0.85)


def linear(graph: so.Graph, places: np.ndarray) -> np.ndarray:
    """A roof of four planes."""
    x, y = places.T
    return np.min([4 * x, 3 * (1 - x), 2.5 * y + 0.3, 3.5 * (1 - y)], axis=0)


def smooth(graph: so.Graph, places: np.ndarray) -> np.ndarray:
    """Waves on a slope."""
    x, y = places.T
    return np.sin(2 * np.pi * x) * np.cos(np.pi * y) + x


def spiky(graph: so.Graph, places: np.ndarray) -> np.ndarray:
    """Six peaks on level ground that fall exponentially with the distance along the edges."""
    tails, heads = graph.edges.T
    lengths = np.linalg.norm(places[tails] - places[heads], axis=1)
    adjacency = sparse.coo_array((lengths, (tails, heads)), shape=(graph.num_nodes,) * 2)
    summits = np.linalg.norm(places - PEAKS[:, None], axis=-1).argmin(axis=1)
    return HEIGHTS @ np.exp(-csgraph.dijkstra(adjacency, directed=False, indices=summits) / WIDTH)


GRAPHS = {"grid": grid, "road": road}
SIGNALS = {"constant": constant, "linear": linear, "smooth": smooth, "spiky": spiky}
# The order that suits the signal; order 2 would take hours on the road graph.
PROBLEMS = {
    "grid-constant": 0, "grid-linear": 1, "grid-smooth": 2, "grid-spiky": 1,
    "road-constant": 0, "road-linear": 1, "road-smooth": 1, "road-spiky": 1,
    "grid-constant-poisson": 0, "grid-constant-logistic": 0, "road-constant-poisson": 0, "road-constant-logistic": 0,
}  # fmt: skip
# Level and scale of log-rates and log-odds: rates of about 1 to 10, probabilities of about 0.2 to 0.95.
SCALES = {"poisson": (1.0, 0.8), "logistic": (0.0, 1.5)}
MEANS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"poisson": np.exp, "logistic": special.expit}
CV_RULES = {"cv": "min", "cv, half a standard error": "half_se", "cv, one standard error": "one_se"}


def levels_of(path: TrendPath, loss: str | None) -> dict[str, int]:
    """The level that each rule chooses that needs one path; for counts and labels those that need no noise level."""
    if loss is None:
        rules: dict[str, tuple[Any, ...]] = {"bic": ("bic", path.noise)}
        rules |= {"sure": ("sure",), "sure, true noise": ("sure", NOISE), "gcv": ("gcv",), "aic, corrected": ("aic",)}
        return {rule: so.select(path, *given).index for rule, given in rules.items()}
    share = path.degrees_of_freedom / path.observations
    # As `select`, which refuses labels.
    gcv = np.where(share <= 0.5, path.deviances / (1 - np.minimum(share, 0.5)) ** 2, np.inf)
    aic = path.deviances + 2 * path.degrees_of_freedom
    return {"gcv": int(np.argmin(gcv)), "aic": int(np.argmin(aic)), "bic": so.select(path, "bic").index}


def drawn(truth: np.ndarray, loss: str | None, seed: int) -> np.ndarray:
    """Observations of a signal, on the scale of the loss."""
    rng = np.random.default_rng(seed)
    if loss == "poisson":
        return rng.poisson(np.exp(truth)).astype(float)
    if loss == "logistic":
        return (rng.random(truth.size) < special.expit(truth)).astype(float)
    return truth + NOISE * rng.standard_normal(truth.size)


def measure(name: str, repeats: int) -> None:
    order, (kind, signal, *kinds) = PROBLEMS[name], name.split("-")
    graph, places = GRAPHS[kind]()
    truth = SIGNALS[signal](graph, places)
    truth = (truth - truth.mean()) / truth.std()
    about = {"problem": name, "graph": kind, "nodes": graph.num_nodes, "signal": signal, "order": order}
    about |= {"repeats": repeats}
    rules(about, graph, truth, kinds[0] if kinds else None)
    if order == 0 and not kinds:
        concave(about, graph, truth)


def rules(about: dict[str, Any], graph: so.Graph, truth: np.ndarray, loss: str | None) -> None:
    start, order = time.process_time(), about["order"]
    level, scale = SCALES[loss] if loss else (0.0, 1.0)
    truth = level + scale * truth
    means = MEANS[loss](truth) if loss else truth
    # Weights of higher orders span a wider range. Without the cosine transforms of a grid, use many cheap steps.
    settings: dict[str, Any] = {"num": 30, "ratio": 1e-3} if order < 2 else {"num": 40, "ratio": 1e-4}
    quick = about["graph"] == "grid" or order == 0
    settings |= {"tol": 1e-4, "method": "auto"} if quick else {"tol": 1e-3, "method": "doge"}
    settings |= {"loss": loss} if loss else {}
    errors: dict[str, list[float]] = {"oracle": []}
    noise = []
    for repeat in range(about["repeats"]):
        y = drawn(truth, loss, repeat)
        validation: dict[str, int] = {}
        path = trend_path(y, graph, order=order, **settings).check()
        if not order:
            validated = so.cross_validate(path, FOLDS, seed=repeat).check()
            validation = {label: validated.index_by(rule) for label, rule in CV_RULES.items()}
        apart = node_deviances(path.loss, path.values.reshape(len(path), -1), means).mean(axis=1)
        for rule, index in ({"oracle": int(apart.argmin())} | levels_of(path, loss) | validation).items():
            errors.setdefault(rule, []).append(float(f"{apart[index]:.5g}"))
        noise.append(path.noise)
    means_of = {rule: float(np.mean(values)) for rule, values in errors.items()}
    oracle = means_of.pop("oracle")
    emit(
        "choice of the weight", **about, **settings, folds=None if order else FOLDS, noise=None if loss else NOISE,
        noise_estimate=None if loss else float(np.mean(noise)), oracle_error=oracle,
        ratios={rule: mean / oracle for rule, mean in means_of.items()}, target=TARGET, errors=errors,
        cpu_seconds=round(time.process_time() - start, 1), **environment(),
    )  # fmt: skip


def concave(about: dict[str, Any], graph: so.Graph, truth: np.ndarray) -> None:
    start, order, apart = time.process_time(), about["order"], truth - truth.mean()
    penalties: dict[str, Callable[[float], Any]] = {"L1": so.L1}
    penalties |= {f"MCP, gamma {gamma:g}": functools.partial(so.MCP, gamma=gamma) for gamma in GAMMAS}
    found: dict[str, list[tuple[float, float]]] = {penalty: [] for penalty in penalties}
    for repeat in range(about["repeats"]):
        y = drawn(truth, None, repeat)
        weights = so.trend.largest_weight(y, graph, order) * np.geomspace(0.3, 3e-3, LEVELS)
        for penalty, make in penalties.items():
            fits: list[Any] = [
                so.trend_filter(y, graph, make(weight), order, tol=1e-5).check() if penalty == "L1"
                else so.trend.reweighted(y, graph, make(weight), order, tol=1e-5)
                for weight in weights
            ]  # fmt: skip
            values = [np.asarray(fit.value).reshape(-1) for fit in fits]
            errors = [((fit - truth) ** 2).mean() for fit in values]
            best = int(np.argmin(errors))
            # The slope of the least-squares line of the fit over the truth.
            found[penalty].append((float(errors[best]), float(apart @ values[best] / (apart @ apart))))
    means = {penalty: np.mean(pairs, axis=0).tolist() for penalty, pairs in found.items()}
    emit(
        "concave penalty", **about, noise=NOISE, levels=LEVELS,
        errors={penalty: mean[0] for penalty, mean in means.items()},
        slopes={penalty: mean[1] for penalty, mean in means.items()},
        cpu_seconds=round(time.process_time() - start, 1), **environment(),
    )  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    selection(parser, "--only", PROBLEMS)
    parser.add_argument("--repeats", type=int, default=50, help="draws of the noise")
    arguments = parser.parse_args()
    for name in arguments.only:
        measure(name, arguments.repeats)


if __name__ == "__main__":
    main()
