"""Sparse regression beside skglm, celer and scikit-learn, one core, float64. JSON lines.

    python benchmarks/bench_regression.py [--only lasso,logistic,more,sparse,path,first] [--small]

    minimise over x    loss(A x; b) + weight ||x||_1,    the weight a fraction of the smallest one whose answer is 0

Every program runs at the loosest tolerance of 1e-2, 1e-3, ..., 1e-9 that reaches a relative suboptimality of 1e-6; the
best objective known comes from runs at 1e-10. A call has NumPy or SciPy arrays as input and output: for sparseopt it
builds the problem, too. Compilation comes before the clock starts, except in `first`: CPU seconds from the import to
the first answer of a process, and to its next one, which has another size. `sparse` and `first` run every program in a
process of its own. Peers that are not installed are skipped. Each part ends with the geometric mean and the largest of
the ratios of sparseopt's milliseconds to those of the fastest peer.
"""

import importlib
import os
import resource
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import LONG, apart, emit, fastest, installed, options, run_parts, say, selection, timed
from regression_problems import FIRST, PATHS, Case, drawn, lassos, logistic, more, sparse_case

TOLERANCES, REFERENCE_TOL, SUBOPTIMALITY = [10.0**-digits for digits in range(2, 10)], 1e-10, 1e-6
# Calls of a program at its tolerance, fewer if they take long; fresh processes of one in `first`.
CALLS, PROCESSES = 7, 3
PEERS = ("skglm", "celer", "scikit-learn")
# scikit-learn takes too long at the tolerance of the reference, and needs a limit of iterations.
OF_REFERENCE, MANY = ("sparseopt", "skglm", "celer"), 100_000
LEVELS, LAST_LEVEL, SMALL_LEVELS = 100, 0.01, 5

Program = Callable[[float], Any]


def solution(case: Case, tol: float) -> Any:
    """What `so.solve` returns."""
    return importlib.import_module("sparseopt").solve(our_problem(case), tol=tol)


def gap_of(case: Case) -> float:
    """The relative gap that sparseopt certifies at the tolerance of the reference; NaN if it fails."""
    try:
        return float(solution(case, REFERENCE_TOL).gap)
    except Exception:  # of any kind: `measured` reports it
        return np.nan


def our_problem(case: Case) -> Any:
    so = importlib.import_module("sparseopt")
    if case.logistic:
        loss = so.LogisticLoss(case.matrix, case.target, case.weights, intercept=case.intercept)
    else:
        loss = so.LeastSquares(case.matrix, case.target, case.weights, intercept=case.intercept)
    if case.nonnegative:
        return so.Problem(loss, so.Nonnegative(case.weight))
    return so.Problem(loss, so.ElasticNet(case.weight, case.ridge) if case.ridge else so.L1(case.weight))


def peer(name: str, case: Case, tol: float) -> Any:
    """The estimator of a peer.

    Raises:
        NotImplementedError: if it has none for this problem.
    """
    package = importlib.import_module({"scikit-learn": "sklearn.linear_model"}.get(name, name))
    common = {"fit_intercept": case.intercept, "tol": tol}
    alpha, share = (case.weight + case.ridge) / case.mass, 1 / (1 + case.ridge_share)
    if case.logistic:
        if name == "skglm":
            return package.SparseLogisticRegression(alpha=alpha, **common)
        if name == "celer":
            return package.LogisticRegression(C=1 / case.weight, **common)
        # liblinear penalises the intercept.
        solver = "saga" if case.intercept else "liblinear"
        return package.LogisticRegression(l1_ratio=1, C=1 / case.weight, solver=solver, max_iter=MANY, **common)
    if name == "skglm" and case.weights is not None:
        datafit = importlib.import_module("skglm.datafits").WeightedQuadratic(case.weights)
        penalty = importlib.import_module("skglm.penalties").L1(alpha)
        solver = importlib.import_module("skglm.solvers").AndersonCD(ws_strategy="subdiff", **common)
        return package.GeneralizedLinearEstimator(datafit, penalty, solver)
    common |= {"alpha": alpha, "positive": case.nonnegative} | ({"max_iter": MANY} if name == "scikit-learn" else {})
    return package.ElasticNet(l1_ratio=share, **common) if case.ridge else package.Lasso(**common)


def program(name: str, case: Case) -> Program:
    """From a tolerance to an answer."""
    if name == "sparseopt":
        return lambda tol: np.asarray(solution(case, tol).value)
    weighted = {} if case.weights is None or name == "skglm" else {"sample_weight": case.weights}

    def fitted(tol: float) -> np.ndarray:
        found = peer(name, case, tol).fit(case.matrix, case.target, **weighted)
        return np.append(found.coef_.ravel(), found.intercept_) if case.intercept else found.coef_.ravel()

    return fitted


def names_here(part: str) -> list[str]:
    for name in PEERS:
        if not installed(name):
            emit("SKIPPED", part=part, solver=name, reason="not installed")
    return ["sparseopt", *filter(installed, PEERS)]


def best_known(programs: Mapping[str, Program], values: Callable[[Any], Any]) -> Any:
    """The smallest objectives of the programs that can be run at a small tolerance."""
    found = []
    for name in OF_REFERENCE:
        if name in programs:
            try:
                found.append(values(programs[name](REFERENCE_TOL)))
            except Exception as error:  # of any kind: `measured` reports it
                say(f"no reference from {name}: {error}")
    return np.min(found, axis=0)


def loosest(run: Program, values: Callable[[Any], Any], best: Any) -> dict[str, Any]:
    """The loosest tolerance that reaches the suboptimality, or why there is none."""
    warnings.filterwarnings("ignore")
    excess = np.inf
    try:
        for tol in TOLERANCES:
            excess = float(np.max((values(run(tol)) - best) / best))
            if excess <= SUBOPTIMALITY:
                return {"tolerance": tol, "suboptimality": excess}
    except Exception as error:  # of any kind, since peers refuse in their own ways
        return {"trouble": f"{type(error).__name__}: {error}"[:200]}
    return {"suboptimality": excess, "trouble": "no tolerance reaches the suboptimality"}


def measured(run: Program, values: Callable[[Any], Any], best: Any) -> dict[str, Any]:
    """That, and milliseconds of calls at it."""
    found, spent = loosest(run, values, best), list[float]()
    while "trouble" not in found and len(spent) < CALLS and sum(spent) < LONG:
        spent.append(timed(partial(run, found["tolerance"])).seconds)
    return found | summed(spent)


def summed(seconds: list[float]) -> dict[str, Any]:
    if not seconds:
        return {}
    return {"best_ms": 1e3 * min(seconds), "median_ms": 1e3 * statistics.median(seconds), "calls": len(seconds)}


def report(part: str, about: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> float:
    """Print a record for every program; returns the ratio of ours to the fastest peer, NaN without one."""
    times = {name: row["best_ms"] for name, row in rows.items() if "best_ms" in row}
    (own, ours), (other, theirs) = fastest(times, ours=True), fastest(times, ours=False)
    ratio = ours / theirs if ours is not None and theirs is not None else np.nan
    # Without a number of ours, the fastest peer; NaN compares as false.
    best = other if own is None or ratio > 1 else own
    for name, row in rows.items():
        emit("regression", part=part, **about, solver=name, version=installed(name), **row, fastest=best)
    return ratio


def summary(part: str, ratios: list[float], small: bool, **more: Any) -> None:
    known = [ratio for ratio in ratios if np.isfinite(ratio)]
    mean, largest = (float(np.exp(np.mean(np.log(known)))), max(known)) if known else (np.nan, np.nan)
    ends = {"geometric_mean_ratio": mean, "largest_ratio": largest, "compared": len(known), "problems": len(ratios)}
    each = [ratio if np.isfinite(ratio) else None for ratio in ratios]
    emit("summary", part=part, **ends, ratios=each, **more, reduced=small)


def compare(part: str, cases: Callable[[bool], Iterable[Case]], small: bool) -> None:
    names, ratios = names_here(part), []
    for case in cases(small):
        programs = {name: program(name, case) for name in names}
        best = best_known(programs, case.objective)
        about = {"problem": case.name, "reduced": small, "reference_gap": gap_of(case)}
        rows = {name: measured(run, case.objective, best) for name, run in programs.items()}
        ratios.append(report(part, about, rows))
    summary(part, ratios, small)


def peak_mib() -> float:
    """The largest resident set of this process. Linux's ru_maxrss has that of the process that started it, too."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def alone(name: str, case: Case, best: float) -> dict[str, Any]:
    before = peak_mib()
    found = measured(program(name, case), case.objective, best)
    return found | {"peak_mib": peak_mib(), "peak_mib_before": before}


def sparse_part(small: bool) -> None:
    case, names = sparse_case(small), names_here("sparse")
    best = float(best_known({name: program(name, case) for name in names}, case.objective))
    rows = {name: apart(alone, name, case, best) for name in names}
    ratio = report("sparse", {"problem": case.name, "reduced": small}, rows)
    peaks = {name: row["peak_mib"] for name, row in rows.items() if "best_ms" in row}
    summary("sparse", [ratio], small, peaks_mib=peaks)


def path_program(name: str, case: Case, weights: np.ndarray) -> Program:
    """From a tolerance to answers `[columns, levels]`; for sparseopt, to their objectives."""
    if name == "sparseopt":

        def ours(tol: float) -> np.ndarray:
            found = importlib.import_module("sparseopt").path(
                our_problem(case), num=len(weights), ratio=LAST_LEVEL, tol=tol
            )
            of_path = case.weight * np.asarray(found.levels)
            if not np.allclose(of_path, weights, rtol=1e-6):
                raise ValueError(f"so.path has weights {of_path}, wanted are {weights}")
            return np.asarray(found.objectives)

        return ours
    given, alphas = (case.matrix, case.target), weights / case.mass
    if name == "celer":
        return lambda tol: importlib.import_module("celer").celer_path(*given, "lasso", alphas=alphas, tol=tol)[1]
    if name == "skglm":
        return lambda tol: peer(name, case, tol).path(*given, alphas)[1]
    path = importlib.import_module("sklearn.linear_model").lasso_path
    return lambda tol: path(*given, alphas=alphas, tol=tol, max_iter=MANY)[1]


def path_part(small: bool) -> None:
    names, ratios = names_here("path"), []
    if not hasattr(importlib.import_module("sparseopt"), "path"):
        say("THIS VERSION OF SPARSEOPT HAS NO so.path: its paths are left out")
        emit("SKIPPED", part="path", solver="sparseopt", reason="no so.path in this version")
        names.remove("sparseopt")
    for shape in PATHS:
        case = drawn(shape, small)
        weights = case.weight * np.geomspace(1, LAST_LEVEL, SMALL_LEVELS if small else LEVELS)

        def values(found: np.ndarray, case: Case = case, weights: np.ndarray = weights) -> np.ndarray:
            return found if found.ndim == 1 else case.objective(found, weights)

        programs = {name: path_program(name, case, weights) for name in names}
        best = best_known(programs, values)
        about = {"problem": f"{case.name} to {LAST_LEVEL:g}", "levels": len(weights), "reduced": small}
        ratios.append(report("path", about, {name: measured(run, values, best) for name, run in programs.items()}))
    summary("path", ratios, small)


def tolerances(names: list[str], cases: list[Case]) -> list[dict[str, dict[str, Any]]]:
    found = []
    for case in cases:
        programs = {name: program(name, case) for name in names}
        best = best_known(programs, case.objective)
        found.append({name: loosest(run, case.objective, best) for name, run in programs.items()})
    return found


def started(name: str, cases: list[Case], tols: list[float]) -> list[float]:
    """CPU seconds of the calls of a fresh process, the import in the first; NumPy is imported before."""
    warnings.filterwarnings("ignore")
    return [timed(partial(program(name, case), tol)).cpu_seconds for case, tol in zip(cases, tols, strict=True)]


def first_part(small: bool) -> None:
    cases, names = [drawn(shape, small) for shape in FIRST], names_here("first")
    found = tolerances(names, cases)
    rows: list[dict[str, dict[str, Any]]] = [{}, {}]
    for name in names:
        tols = [row[name].get("tolerance") for row in found]
        spent = [] if None in tols else [apart(started, name, cases, tols) for _ in range(1 if small else PROCESSES)]
        for k, row in enumerate(rows):
            row[name] = found[k][name] | summed([seconds[k] for seconds in spent])
    calls = ("from the import to the first answer", "the next size")
    ratios = [
        report("first", {"problem": case.name, "call": call, "clock": "CPU", "reduced": small}, row)
        for case, call, row in zip(cases, calls, rows, strict=True)
    ]
    summary("first", ratios, small)


PARTS: dict[str, Callable[[bool], None]] = {
    "lasso": partial(compare, "lasso", lassos),
    "logistic": partial(compare, "logistic", logistic),
    "more": partial(compare, "more", more),
    "sparse": sparse_part,
    "path": path_part,
    "first": first_part,
}


def main() -> None:
    parser = options(__doc__)
    selection(parser, "--only", PARTS)
    parser.add_argument("--small", action="store_true", help="small problems, for a trial")
    arguments = parser.parse_args()
    # Read by the processes of the parts; XLA takes a first word without dashes for a file.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    run_parts(PARTS, arguments.only, arguments.small)


if __name__ == "__main__":
    main()
