"""`so.trend.jumps` at its defaults: false and found jumps of drawn series, seconds, annotated series. JSON lines.

    python benchmarks/bench_jumps.py [--draws 500] [--series FILE] [--only flat,...]

The file of annotated series is JSON: name -> `series`, a list of channels with null where missing, and `annotations`,
annotator -> the indices of the first values after the jumps. F1 with a margin of 5 and covering are those of van den
Burg and Williams, "An evaluation of change point detection algorithms" (2020); series are standardised, and missing
values joined by lines. ruptures takes part if it is installed.
"""

import importlib
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import emit, environment, installed, options, pin, selection, timed

import sparseopt as so

MARGIN, PENALTY, STEP = 5, 3.0, 3.0
CORRELATIONS, RISES, DEVIATIONS, PERIODS, PLACES = (
    (0.0, 0.3, 0.6),
    (1, 3, 10),
    (0.1, 0.3, 0.5),
    (1, 2, 3),
    (100, 50, 20),
)
SIZES, HEIGHTS, CONFIRMED, LEVEL = (100, 200), (0.5, 1.0, 1.5, 2.0, 3.0, 4.0), "confirmed by thinning", 0.05


def noise(rng: np.random.Generator, count: int, correlation: float = 0.0) -> np.ndarray:
    """An AR(1) series of variance 1, after 100 values that are dropped."""
    z = rng.standard_normal(count + 100)
    for i in range(1, len(z)):
        z[i] = correlation * z[i - 1] + np.sqrt(1 - correlation**2) * z[i]
    return z[100:]


def draw(figure: str, draws: int, clean: np.ndarray, holds: Callable[[so.trend.Jumps], bool], **about: Any) -> None:
    """How often something holds for series of noise around `clean`; `about` may set its deviation and correlation."""
    rng, deviation, correlation = np.random.default_rng(0), about.get("deviation", 1.0), about.get("correlation", 0.0)
    count = sum(holds(so.trend.jumps(clean + deviation * noise(rng, len(clean), correlation))) for _ in range(draws))
    emit(figure, n=len(clean), **about, draws=draws, share=count / draws)


def has_place(found: so.trend.Jumps) -> bool:
    return len(found.places) > 0


def has_jump(found: so.trend.Jumps) -> bool:
    return "jump" in found.kinds


def flat(draws: int) -> None:
    for n, correlation in itertools.product((100, 300), CORRELATIONS):
        rng, counts = np.random.default_rng(0), dict.fromkeys(tools(), 0)
        for _ in range(draws):
            y = noise(rng, n, correlation)
            for name, find in tools().items():
                counts[name] += len(find(y)) > 0
        shares = {name: count / draws for name, count in counts.items()}
        emit("flat: any place", n=n, correlation=correlation, draws=draws, shares=shares)


def lines(draws: int) -> None:
    for n in (100, 300):
        for rise in RISES:
            draw("line: any place", draws, np.linspace(0, rise, n), has_place, rise=rise)


def curves(draws: int) -> None:
    for n in (100, 200, 300):
        t = np.arange(n) / n
        waves = {f"sine, periods {periods}": np.sin(2 * np.pi * periods * t) for periods in PERIODS}
        for name, curve in {"parabola": (2 * t - 1) ** 2, "half a parabola": t**2, **waves}.items():
            for deviation in DEVIATIONS:
                draw("curve: any jump", draws, curve / curve.std(), has_jump, curve=name, deviation=deviation)


def steps(draws: int) -> None:
    for place in PLACES:

        def is_found(found: so.trend.Jumps, place: int = place) -> bool:
            return len(found.places) == 1 and abs(int(found.places[0]) - place) <= 2

        draw("step: one place, within 2", draws, STEP * (np.arange(200) >= place), is_found, place=place)


def power(draws: int) -> None:
    """How often a step in the middle half is the one place found, within `MARGIN`, and confirmed by thinning."""
    thin = so.trend.Thinning("gaussian", noise=1.0)
    for n, size in itertools.product(SIZES, HEIGHTS):
        rng, counts = np.random.default_rng(0), dict.fromkeys([*tools(), CONFIRMED], 0)
        for _ in range(draws):
            place = int(rng.integers(n // 4, 3 * n // 4))
            y = rng.standard_normal(n) + size * (np.arange(n) >= place)
            found = {name: find(y) for name, find in tools().items()}
            tested = so.trend.jumps(y, thin=thin)
            found[CONFIRMED] = tested.places[np.asarray(tested.p) <= LEVEL]
            for name, places in found.items():
                counts[name] += len(places) == 1 and abs(int(places[0]) - place) <= MARGIN
        shares = {name: count / draws for name, count in counts.items()}
        emit("power: one step, within 5", n=n, size=size, draws=draws, shares=shares)


def seconds(draws: int) -> None:
    from sparseopt.trend.segments.functional import optimal_jumps

    rng, n = np.random.default_rng(0), 100_000
    white = rng.standard_normal(n)
    series = {
        "flat": white,
        "100 jumps": white + np.repeat(STEP * rng.standard_normal(101), n // 101 + 1)[:n],
        "random walk": np.cumsum(white),
    }
    for name, y in series.items():
        both = {"jumps": timed(partial(so.trend.jumps, y)), "L0": timed(partial(optimal_jumps, y, 2 * np.log(n)))}
        places = len(both["jumps"].result.places), len(both["L0"].result)
        for tool, count in zip(both, places, strict=True):
            emit("seconds of 100,000 nodes", tool=tool, series=name, seconds=both[tool].seconds, places=count)


def f1(annotations: list[list[int]], places: Any) -> float:
    def hits(truth: set[int]) -> int:
        left, count = {0, *map(int, places)}, 0
        for each in sorted(truth):
            near = sorted((abs(each - place), place) for place in left if abs(each - place) <= MARGIN)
            if near:
                count += 1
                left.discard(near[0][1])
        return count

    marked = [{0, *each} for each in annotations]
    precision = hits(set().union(*marked)) / len({0, *map(int, places)})
    recall = np.mean([hits(each) / len(each) for each in marked])
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def covering(annotations: list[list[int]], places: Any, n: int) -> float:
    def pieces(cuts: Any) -> list[tuple[int, int]]:
        ends = [0, *sorted({int(cut) for cut in cuts if 0 < cut < n}), n]
        return list(itertools.pairwise(ends))

    def overlap(one: tuple[int, int], other: tuple[int, int]) -> float:
        return max(min(one[1], other[1]) - max(one[0], other[0]), 0) / (max(one[1], other[1]) - min(one[0], other[0]))

    found = pieces(places)
    return float(
        np.mean(
            [
                sum((b - a) * max(overlap((a, b), piece) for piece in found) for a, b in pieces(each)) / n
                for each in annotations
            ]
        )
    )


def searched(search: Any, z: np.ndarray) -> list[int]:
    """The places that ruptures finds."""
    return search(model="l2", jump=1).fit(z).predict(pen=PENALTY * np.log(len(z)))[:-1]


def tools() -> dict[str, Callable[[np.ndarray], Any]]:
    found: dict[str, Callable[[np.ndarray], Any]] = {
        "no jump": lambda z: [],
        "sparseopt": lambda z: so.trend.jumps(z).places,
    }
    if installed("ruptures"):
        ruptures = importlib.import_module("ruptures")
        for name in ("Pelt", "Binseg"):
            found[f"ruptures {name}"] = partial(searched, getattr(ruptures, name))
    return found


def annotated(path: Path) -> None:
    for tool, find in tools().items():
        scores = []
        for name, held in json.loads(path.read_text()).items():
            y = np.array(
                [[np.nan if value is None else value for value in channel] for channel in held["series"]], float
            ).T
            for channel in y.T:
                known = np.isfinite(channel)
                channel[:] = np.interp(np.arange(len(y)), np.flatnonzero(known), channel[known])
            places = find((y - y.mean(0)) / (y.std(0) + 1e-12))
            marked = list(held["annotations"].values())
            scores.append((f1(marked, places), covering(marked, places, len(y)), len(places)))
            emit("annotated", tool=tool, series=name, f1=scores[-1][0], covering=scores[-1][1], places=len(places))
        f, c, k = map(float, np.mean(scores, axis=0))
        emit("annotated, mean", tool=tool, f1=f, covering=c, places=k, series=len(scores))


PARTS = {"flat": flat, "lines": lines, "curves": curves, "steps": steps, "power": power, "seconds": seconds}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--draws", type=int, default=500, help="series of each kind")
    parser.add_argument("--series", type=Path, help="annotated series")
    selection(parser, "--only", [*PARTS, "annotated"])
    arguments = parser.parse_args()
    emit("environment", **environment(), cores=pin(1), ruptures=installed("ruptures"))
    for part in arguments.only:
        if part in PARTS:
            PARTS[part](arguments.draws)
        elif arguments.series:
            annotated(arguments.series)


if __name__ == "__main__":
    main()
