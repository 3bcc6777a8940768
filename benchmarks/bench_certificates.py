"""Certificates of `solve` at its defaults, on random and degenerate problems with known optima. JSON lines.

    python benchmarks/bench_certificates.py [--seeds 1064] [--first 0] [--all] [--only SEED]

Every seed is a problem, solved in float32 and in float64. An objective is computed with NumPy in float64, from the data
that `solve` got. The optimum is at most that of Clarabel's answer, or of an answer of `solve` to 1e-12 where that is
better, so that an error of Clarabel hides faults and makes none. Only where its answer may miss a constraint on `K x`
by rounding, differences up to ALLOWANCE do not count. The exit code is 1 for any fault.
"""

import contextlib
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from certificate_problems import KINDS, PENALTIES, Given, drawn
from common import emit, environment, options, pin, say

import sparseopt as so

ALLOWANCE = 1e-6
# What rounding may change of a gap, and of an objective besides the rounding of its residuals.
ROUNDING: dict[Any, tuple[float, float]] = {np.float64: (1e-9, 1e-9), np.float32: (3e-7, 1e-4)}
TOL: dict[Any, float] = {np.float64: 1e-6, np.float32: 1e-4}
# A constraint may be missed by this much; the optimum is 0 below this many eps of the loss at 0.
MISSED, NOTHING = {np.float64: 1e-9, np.float32: 1e-4}, 128
# What an answer may lose of the loss at 0 to count as far from the optimum.
FAR = 1e-2
FAULTS = ("false gap", "false converged", "wrong objective", "exception")
APART = ("optimum 0", "rounded gap", "far stationary", "without a known optimum")
PACKAGE = Path(so.__file__).parent


def is_sentence(error: Exception) -> bool:
    """Whether an error is the package's own, in words."""
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ValueError) and "\n" not in str(error) and raised.is_relative_to(PACKAGE)


def best_known(given: Given, x: Any, reached: float) -> tuple[float, Any]:
    """The lowest objective known, NaN if nothing is known, and where it is reached; `reached` is that of x."""
    if PENALTIES[given.kind.penalty].terms is None:
        return np.nan, x
    answer = given.answer()
    known = [(reached, x)] if answer is None else [(given.value(answer).objective, answer), (reached, x)]
    if answer is None or reached <= known[0][0]:
        # A Hessian may be indefinite after rounding.
        with contextlib.suppress(ValueError):
            deep = np.asarray(so.solve(given.problem(np.float64), tol=1e-12, max_steps=20_000).value)
            again = given.value(deep)
            known += [(again.objective, deep)] if again.violation <= MISSED[np.float64] else []
    return min(known, key=lambda pair: pair[0])


def judged(seed: int, dtype: Any) -> tuple[dict[str, Any], list[str]]:
    """What is known of a solve, and its faults."""
    given, eps = drawn(seed, dtype), float(np.finfo(dtype).eps)
    about = {"seed": seed, "dtype": np.dtype(dtype).name, **given.kind._asdict(), "traits": given.traits}
    start = time.perf_counter()
    try:
        # In float32 every other time with arrays of JAX.
        found = so.solve(given.problem(dtype, jax=dtype == np.float32 and seed // len(KINDS) % 2 == 1))
    except Exception as error:
        known = is_sentence(error)
        about |= {"status": "refused" if known else "exception", "error": f"{type(error).__name__}: {error}"}
        return about, [] if known else ["exception"]
    status = so.Status(int(found.status)).name
    about |= {"status": status, "steps": int(found.steps), "seconds": time.perf_counter() - start}
    x = np.asarray(found.value, float)
    if not np.isfinite(x).all():
        return about, []
    gap, claimed, value = float(found.gap), float(found.objective), given.value(x, dtype)
    missed, slight, relative = float(found.violation or 0), *ROUNDING[dtype]
    best, where = best_known(given, x, value.objective if value.violation == 0 else np.inf)
    at_zero, lengths = given.value(0 * x).loss, [float(np.linalg.norm((z.T / given.units).T)) for z in (where, x)]
    if given.kind.operator in ("dense", "full") and given.kind.penalty in ("box", "nonnegative", "simplex"):
        slight = ALLOWANCE
    apart = (value.objective - best) / best if best > 0 else np.nan
    # Both the optimum and the bound that the gap claims.
    nothing = max(best, value.objective / (1 + gap)) <= NOTHING * eps * at_zero
    about |= {"gap": gap, "suboptimality": apart, "objective": claimed, "recomputed": value.objective, "best": best}
    about |= {"violation": value.violation, "claimed_violation": missed, "loss_at_zero": at_zero}
    rounding, longer = value.rounding / max(abs(value.objective), 1e-300), lengths[0] / max(lengths[1], 1e-300)
    about |= {"rounding": rounding, "allowed": slight, "longer": longer}
    # The gap is that of matrices which differ by rounding, and costs what this changes along a far longer answer.
    rounding += 64 * eps * longer if longer > 2 else 0.0
    faults = ["exception"] if found.value.dtype != dtype else []
    if gap < apart - slight:
        faults.append("optimum 0" if nothing else "false gap" if gap < apart - slight - rounding else "rounded gap")
    beyond = (apart > TOL[dtype] + slight + rounding and not nothing) or value.violation > MISSED[dtype]
    if status == "STATIONARY" and value.objective - best > FAR * at_zero:
        faults.append("far stationary")
    if status == "CONVERGED" and (beyond or np.isnan(gap)):
        faults.append("false converged")
    inside = value.violation <= 4 * eps and not missed
    if inside and abs(claimed - value.objective) > relative * abs(value.objective) + value.rounding:
        faults.append("wrong objective")
    return about, faults


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=14 * len(KINDS), help="the number of problems of each precision")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--all", action="store_true", help="print the sound problems too")
    parser.add_argument("--only", type=int, help="one seed, with everything that is known of it")
    arguments = parser.parse_args()
    emit("environment", **environment(), cores=pin(1))
    first, number = (arguments.first, arguments.seeds) if arguments.only is None else (arguments.only, 1)
    counts = {dtype: Counter[str]() for dtype in TOL}
    statuses = {dtype: Counter[str]() for dtype in TOL}
    reasons = Counter[str]()
    for seed in range(first, first + number):
        if (seed - first) % 50 == 0:
            say(f"{seed - first} of {number} problems")
        for dtype in TOL:
            about, faults = judged(seed, dtype)
            counts[dtype].update(["problems", *faults])
            counts[dtype]["without a known optimum"] += about.get("best") is None or bool(np.isnan(about["best"]))
            statuses[dtype][about["status"]] += 1
            reasons.update([about["error"]] if about["status"] == "refused" else [])
            if faults or arguments.all or arguments.only is not None:
                emit("fault" if set(faults) & set(FAULTS) else "apart" if faults else "sound", faults=faults, **about)
    for text, times in reasons.most_common():
        emit("refused", text=text, times=times)
    for dtype in TOL:
        fields = {name: counts[dtype][name] for name in ("problems", *FAULTS, *APART)}
        emit("certificates", dtype=np.dtype(dtype).name, **fields, statuses=dict(statuses[dtype]))
    sys.exit(any(counts[dtype][fault] for dtype in TOL for fault in FAULTS))


if __name__ == "__main__":
    main()
