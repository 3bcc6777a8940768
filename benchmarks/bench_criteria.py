"""False places and errors of every rule for the weight, and of `so.trend.jumps`, on series. JSON lines.

    python benchmarks/bench_criteria.py [--only steps,line] [--nodes 100,1000,10000] [--draws 20]

Noise of variance 1 is added to a flat signal, to steps between the levels 0 and 3 in fifths of the series, and to a
line that rises by 10. The paths have order 0, for the line order 1. A place is a node at which the fit has a jump, or
a bend at order 1; it is false unless a jump of the signal is within 2 nodes and has no other place. The error is the
mean squared error over that of least squares with the true places, p / n for p levels or coefficients.
"""

import time
from collections.abc import Callable

import numpy as np
from common import emit, environment, options, pin, selection

import sparseopt as so

NEAR, STEP, RISE = 2, 3.0, 10.0
# At order 1 a gap of 1e-4 leaves bends that are not those of the optimum, and the rules count them.
TOL = 1e-8
SIGNALS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "flat": np.zeros_like,
    "steps": lambda t: STEP * (np.floor(5 * t) % 2),
    "line": lambda t: RISE * t,
}
COEFFICIENTS, ORDERS = {"flat": 1, "steps": 5, "line": 2}, {"flat": 0, "steps": 0, "line": 1}
RULES = {"gcv": "gcv", "sure": "sure", "aic": "aic", "bic": "bic", "cv": "min", "cv, one standard error": "one_se"}


def counted(places: np.ndarray, true: np.ndarray) -> tuple[int, int]:
    """The numbers of false places and of true ones that are found."""
    found = sum(bool(np.any(np.abs(places - place) <= NEAR)) for place in true)
    return len(places) - found, found


def fits(y: np.ndarray, order: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The fit of every rule and its places."""
    path = so.trend.trend_path(y, so.Graph.chain(len(y)), order=order, tol=TOL).check()
    validated = so.cross_validate(path, 5, seed=seed).check()
    found = {}
    for name, rule in RULES.items():
        if name.startswith("cv"):
            index = validated.index_by(rule)
        else:
            index = so.select(path, rule, *([path.noise] if rule == "bic" else [])).index
        fit = path.at(index)
        found[name] = np.asarray(fit.value), np.flatnonzero(fit.nonzero) + 1
    jumps = so.trend.jumps(y)
    return {**found, "jumps": (jumps.fit, jumps.places)}


def measure(signal: str, n: int, draws: int) -> None:
    start, truth = time.process_time(), SIGNALS[signal](np.arange(n) / n)
    scores: dict[str, list[tuple[float, float, float]]] = {}
    true = np.flatnonzero(np.diff(truth)) + 1 if signal == "steps" else np.zeros(0, int)
    for seed in range(draws):
        y = truth + np.random.default_rng(seed).standard_normal(n)
        for rule, (fit, places) in fits(y, ORDERS[signal], seed).items():
            error = np.mean((fit - truth) ** 2) * n / COEFFICIENTS[signal]
            scores.setdefault(rule, []).append((*counted(places, true), float(error)))
    false, found, errors = np.mean([scores[rule] for rule in scores], axis=1).T
    emit(
        "rules on series", signal=signal, nodes=n, order=ORDERS[signal], tol=TOL, jumps=len(true), draws=draws,
        false_places=dict(zip(scores, false.tolist(), strict=True)),
        found=dict(zip(scores, found.tolist(), strict=True)),
        errors={rule: float(f"{error:.4g}") for rule, error in zip(scores, errors, strict=True)},
        none_false={rule: float(np.mean([each[0] == 0 for each in scores[rule]])) for rule in scores},
        cpu_seconds=round(time.process_time() - start, 1), **environment(),
    )  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    selection(parser, "--only", SIGNALS)
    parser.add_argument("--nodes", type=lambda text: list(map(int, text.split(","))), default=[100, 1000, 10_000])
    parser.add_argument("--draws", type=int, default=20, help="series of each kind")
    arguments = parser.parse_args()
    pin(1)
    for signal in arguments.only:
        for n in arguments.nodes:
            measure(signal, n, arguments.draws)


if __name__ == "__main__":
    main()
