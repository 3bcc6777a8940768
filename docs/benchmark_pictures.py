"""Pictures of the committed benchmark records, as SVG files.

quality.svg: perplexity of each pruning method at each sparsity, with public codes.
peers.svg: seconds to an accurate answer for each trend-filtering problem, with public solvers.
benchopt.svg: distance to the best objective over seconds in each suite of benchopt.
tokens.svg: perplexity and held-out error against the number of calibration tokens.
frontier.svg: perplexity against seconds a token and against megabytes, for dense, smaller and pruned models.
bits.svg: perplexity against megabytes, for models in few bits.
power.svg: share of single steps that were found, against their height.
selection.svg: error at the weight that each rule chooses, over that of the best weight.
"""

from math import inf
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from records import Record, groups, model_name, problem_name, read, select

SETTINGS = {"0.5": "50 %", "0.6": "60 %", "0.7": "70 %", "2:4": "2:4"}
BLUE, ORANGE, GREEN, SKY, PINK, RED = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#D55E00"
# The colours and markers of lines, by what the records call them.
PEERS = {
    "best": (BLUE, "o"), "ALPS": (GREEN, "D"), "ADMM (Boža)": (PINK, "^"), "SparseGPT": (ORANGE, "s"),
    "mAIHT reference": (SKY, "v"), "Wanda": (RED, "X"),
}  # fmt: skip
METHODS = {
    "best": (BLUE, "o"), "admm": (PINK, "^"), "maiht": (GREEN, "D"),
    "sparsegpt": (ORANGE, "s"), "wanda": (RED, "X"),
}  # fmt: skip
# What was done to a model, see `_treatment`.
TREATMENTS = {"dense": ("#000000", "*"), "shrunk": (BLUE, "s"), "pruned": (ORANGE, "^"), "both": (GREEN, "D")}
# Who quantised a model.
MAKERS = {"dense": ("#000000", "*"), "llama.cpp": (ORANGE, "s"), "sparseopt": (BLUE, "o")}
SOLVERS = {"sparseopt auto": (BLUE, "o"), "fastprox": (ORANGE, "s"), "PIQP": (GREEN, "^")}
RULES = {
    "sure": ("SURE", "#0072B2", "o"),
    "gcv": ("GCV", "#E69F00", "s"),
    "aic, corrected": ("AIC", "#56B4E9", "P"),  # uncorrected for counts and labels
    "cv": ("cross-validation", "#009E73", "D"),
    "cv, half a standard error": ("half a standard error", "#F0E442", "d"),
    "cv, one standard error": ("one standard error", "#CC79A7", "v"),
    "bic": ("BIC", "#D55E00", "^"),
}
FINDERS = {
    "sparseopt": ("jumps", BLUE, "o"), "confirmed by thinning": ("confirmed by thinning", SKY, "D"),
    "ruptures Pelt": ("PELT", ORANGE, "s"),
}  # fmt: skip
SIGNALS = {"poisson": "counts", "logistic": "labels"}
TOP = 3.5  # of the axis of `selection`
# Filled markers show the first of these runtimes, hollow ones the second.
FRONTIER_RUNTIMES = ("transformers float32", "llama.cpp Q8_0")


def quality(records: list[Record], dense: float) -> Any:
    """A figure of `draw_quality`."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    draw_quality(axis, records, dense)
    return figure


def draw_quality(axis: Any, records: list[Record], dense: float) -> None:
    """Perplexity over sparsity, one line per method, with the dense model's."""
    models = select(records, r"perplexity, models, (?P<run>.+) at (?P<setting>[^,]+)")
    found = {(record["run"], record["setting"]): record["value"] for record in models}
    for name, (colour, marker) in PEERS.items():
        ours = name == "best"
        style: dict[str, Any] = {"color": colour, "marker": marker, "linewidth": 2.6 if ours else 1.4}
        points = {place: found[name, s] for place, s in enumerate(SETTINGS) if (name, s) in found}
        # 2:4 is not the next sparsity, so no line connects it.
        last = {3: points.pop(3)} if 3 in points else {}
        axis.plot(*_pair(points), label="sparseopt, best" if ours else name, zorder=3 if ours else 2, **style)
        axis.plot(*_pair(last), **style)
        for point in (points | last).items() if ours else ():
            axis.annotate(f"{point[1]:.1f}", point, (0, -14), textcoords="offset points", ha="center")
    axis.axhline(dense, color="#666666", linestyle="--", linewidth=1)
    axis.annotate(f"dense {dense:.1f}", (2.5, dense), (0, 4), textcoords="offset points", color="#444444", ha="center")
    axis.set(yscale="log", ylabel="perplexity", xlabel="zeros in every linear layer", xlim=(-0.3, 3.3))
    axis.set_xticks(range(len(SETTINGS)), list(SETTINGS.values()))
    _logarithmic(axis.yaxis, [30, 50, 100, 200, 500, 1500])
    axis.legend(loc="upper left", frameon=False)


def peers(records: list[Record]) -> Any:
    """Seconds to two tolerances, one row per problem, sorted by order and size."""
    found = [record for record in select(records, "time to target") if record["target"] < 1e-3 and record["seconds"]]
    problems = sorted({(record["order"], record["nodes"], record["problem"]) for record in found}, reverse=True)
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, sharex=True, layout="constrained")
    for axis, exponent in zip(panels, (-4, -6), strict=True):
        close = {(r["problem"], r["solver"]): r["seconds"] for r in found if r["target"] == 10.0**exponent}
        for row, (_, _, name) in enumerate(problems):
            shown = {solver: close[name, solver] for solver in SOLVERS if (name, solver) in close}
            axis.plot([min(shown.values()), max(shown.values())], [row, row], color="#cccccc", zorder=1)
            for solver, seconds in shown.items():
                colour, marker = SOLVERS[solver]
                axis.plot(seconds, row, marker=marker, color=colour, markersize=7, linestyle="", zorder=2)
        axis.set(xscale="log", xlabel="seconds, one core", title=f"relative suboptimality $10^{{{exponent}}}$")
        axis.grid(axis="x", color="#eeeeee")
    panels[0].set_yticks(range(len(problems)), [problem_name(name, nodes, order) for order, nodes, name in problems])
    _legend(figure, {solver.replace(" auto", ""): {"color": c, "marker": m} for solver, (c, m) in SOLVERS.items()})
    return figure


def suites(records: list[Record]) -> Any:
    """Distance to the best objective over seconds, for one problem of each of benchopt's suites."""
    figure, panels = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
    for axis, found in zip(panels.flat, groups(select(records, "curve"), "benchmark"), strict=True):
        reached = {r["solver"]: min((s for s, far in r["points"] if far <= 1e-6), default=inf) for r in found}
        peer = min((solver for solver in reached if solver != "sparseopt"), key=reached.__getitem__)
        for record in found:
            solver = record["solver"]
            colour, width = {"sparseopt": (BLUE, 2.4), peer: (ORANGE, 1.8)}.get(solver, ("#bbbbbb", 1.0))
            seconds, far = np.transpose(record["points"])
            nearest = np.maximum(np.minimum.accumulate(far), 1e-10)
            axis.plot(seconds, nearest, color=colour, linewidth=width, zorder=width)
        axis.set(xscale="log", yscale="log", ylim=(5e-11, 2))
        axis.set_title(f"{found[0]['benchmark']}\norange: {peer.partition(' ')[0].partition('[')[0]}", fontsize=10)
        axis.xaxis.set_minor_formatter("")
    for axis in panels[-1]:
        axis.set_xlabel("seconds, one core")
    for axis in panels[:, 0]:
        axis.set_ylabel("distance to the best")
    lines = {"sparseopt": BLUE, "fastest other solver": ORANGE, "the others": "#bbbbbb"}
    _legend(figure, {name: {"color": colour, "linestyle": "-"} for name, colour in lines.items()})
    return figure


def tokens(records: list[Record]) -> Any:
    """Perplexity and held-out error over the calibration tokens."""
    scored = [r for r in select(records, r"perplexity, tokens, (?P<run>.+) at .+") if r["value"] is not None]
    counts = sorted({record["calibration_tokens"] for record in scored})
    runs = {record["run"] for record in scored}
    lines = {run: {"color": c, "marker": m, "linestyle": "-"} for run, (c, m) in METHODS.items() if run in runs}
    errors = {"value": "perplexity", "mean_heldout_error": "held-out error of the layers"}
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (field, label) in zip(panels, errors.items(), strict=True):
        for run, style in lines.items():
            axis.plot(*_pair({r["calibration_tokens"]: r[field] for r in scored if r["run"] == run}), **style)
        axis.set(xscale="log", xlabel="calibration tokens", ylabel=label)
        axis.set_xticks(counts, [f"{count:,}" for count in counts], rotation=30)
        axis.minorticks_off()
        axis.grid(color="#eeeeee")
    _legend(figure, lines)
    return figure


def frontier(records: list[Record]) -> Any:
    """Perplexity over milliseconds a token and over megabytes on disk; points of a runtime are all in one run."""
    found = [r for r in records if r["figure"].startswith("decode, ") and r["runtime"] in FRONTIER_RUNTIMES]
    scales = (("milliseconds a token, one thread", "decode_seconds", 1e3), ("MB on disk", "disk_bytes", 1e-6))
    beside: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 8}
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
    for axis, (label, name, unit) in zip(panels, scales, strict=True):
        for record in found:
            colour, marker = TREATMENTS[_treatment(record["model"])]
            place, hollow = (record[name] * unit, record["perplexity"]), record["runtime"] != FRONTIER_RUNTIMES[0]
            axis.plot(*place, marker=marker, color=colour, markerfacecolor="none" if hollow else colour, linestyle="")
            if not hollow:
                axis.annotate(record["model"], place, (-6, 0), color=colour, **beside)
        axis.set(xlabel=label, yscale="log", xlim=(0, None))
        axis.grid(color="#eeeeee")
    shown = [record["perplexity"] for record in found]
    _logarithmic(panels[0].yaxis, [30, 40, 50, 70, 100, 200])
    panels[0].set(ylabel="perplexity", ylim=(0.95 * min(shown), 1.05 * max(shown)))
    entries: dict[str, dict[str, Any]] = {name: {"color": c, "marker": m} for name, (c, m) in TREATMENTS.items()}
    for runtime, face in zip(FRONTIER_RUNTIMES, ("#666666", "none"), strict=True):
        entries[runtime] = {"color": "#666666", "marker": "o", "markerfacecolor": face}
    _legend(figure, entries)
    return figure


def bits(records: list[Record]) -> Any:
    """Perplexity over megabytes, a panel for each model."""
    found = select(records, r"few bits, (?P<run>.+)")
    models = groups(found, "model")
    figure, panels = plt.subplots(1, len(models), figsize=(9, 4.2), layout="constrained", squeeze=False)
    for axis, of_model in zip(panels[0], models, strict=True):
        for record in of_model:
            run = record["run"]
            kind = "dense" if run.startswith("dense") else "llama.cpp" if "llama.cpp" in run else "sparseopt"
            colour, marker = MAKERS[kind]
            place = (record["megabytes"], record["value"])
            axis.plot(*place, marker=marker, color=colour, linestyle="")
            label, above = run.removeprefix("llama.cpp "), 7 * ("channels" in run)
            axis.annotate(label, place, (6, above), textcoords="offset points", color=colour, va="center", fontsize=8)
        axis.margins(x=0.6, y=0.1)
        axis.set(xlabel="MB", title=model_name(of_model[0]["model"]))
        axis.grid(color="#eeeeee")
    panels[0, 0].set_ylabel("perplexity")
    _legend(figure, {name: {"color": colour, "marker": marker} for name, (colour, marker) in MAKERS.items()})
    return figure


def power(records: list[Record]) -> Any:
    """The share of series whose step was found against its height, a panel for each length."""
    lengths = groups(select(records, "power: .*"), "n")
    figure, axes = plt.subplots(1, len(lengths), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, shown in zip(axes, lengths, strict=True):
        sizes = [record["size"] for record in shown]
        for name, (label, colour, marker) in FINDERS.items():
            axis.plot(sizes, [record["shares"][name] for record in shown], color=colour, marker=marker, label=label)
        axis.set(title=f"{shown[0]['n']:,} values", xlabel="step, in deviations of the noise", ylim=(-0.03, 1.03))
        axis.grid(color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share found")
    axes[-1].legend(frameon=False, fontsize=9)
    return figure


def selection(records: list[Record]) -> Any:
    """Mean error at the weight of each rule over that at the best weight, with bars of two standard errors."""
    records = select(records, "choice of the weight")
    graphs = list(dict.fromkeys(record["graph"] for record in records))
    figure, axes = plt.subplots(1, len(graphs), figsize=(11, 4.4), sharey=True, layout="constrained")
    for axis, graph in zip(axes, graphs, strict=True):
        shown = [record for record in records if record["graph"] == graph]
        best = np.array([record["errors"]["oracle"] for record in shown])
        least = best.mean(axis=1, keepdims=True)
        for index, (rule, (label, colour, marker)) in enumerate(RULES.items()):
            absent = [np.nan] * best.shape[1]  # cross-validation was not run everywhere
            found = [record["errors"] for record in shown]
            taken = np.array([each.get(rule, each.get(rule.partition(",")[0], absent)) for each in found])
            ratio = taken.mean(axis=1, keepdims=True) / least
            # Draws of the noise are paired, so the ratio's spread is that of the difference of the errors.
            spread = ((taken - ratio * best) / least).std(axis=1, ddof=1) / np.sqrt(best.shape[1])
            places = np.arange(len(shown)) + 0.12 * (index - 3)
            for place, level in zip(places, ratio[:, 0], strict=True):
                if level > TOP:  # said instead of drawn, one of two neighbours below the other
                    high = TOP * (0.95, 0.7)[index % 2]
                    axis.text(place, high, f"{label} {level:.0f}", color=colour, rotation=90, va="top", ha="center")
            axis.errorbar(places, ratio[:, 0], 2 * spread, color=colour, marker=marker, linestyle="", label=label)
        axis.axhline(1, color="0.2", linewidth=1)
        axis.axhline(shown[0]["target"], color="0.2", linewidth=1, linestyle="--")
        axis.set(title=f"{graph}, {shown[0]['nodes']:,} nodes", yscale="log")
        kinds = [SIGNALS.get(record.get("loss"), record["signal"]) for record in shown]
        ticks = [f"{kind}\n(order {record['order']})" for kind, record in zip(kinds, shown, strict=True)]
        axis.set_xticks(range(len(shown)), ticks, fontsize=9)
        axis.set_ylim(0.93, TOP)
        axis.set_yticks([1, 1.1, 1.5, 2, 3], ["1", "1.1", "1.5", "2", "3"])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("error over the oracle's")
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def _pair(points: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    """Places and values of points, by place."""
    return sorted(points), [points[place] for place in sorted(points)]


def _legend(figure: Any, entries: dict[str, dict[str, Any]]) -> None:
    """One legend below all panels."""
    handles = [Line2D([], [], label=label, **({"linestyle": ""} | style)) for label, style in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _treatment(model: str) -> str:
    """What was done to a model by its name: "channels 0.75", "pruned 0.5", "channels 0.75, pruned 0.5"."""
    if "pruned" not in model:
        return "dense" if model == "dense" else "shrunk"
    return "pruned" if model.startswith("pruned") else "both"


def _logarithmic(axis: Any, ticks: list[float]) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_formatter("")
    axis.minorticks_off()


def write_all(target: Path) -> None:
    """Write every picture to `target/NAME.svg`."""
    dense = select(read("prune"), "dense perplexity")[0]["value"]
    pictures = {
        "quality": quality(read("quality"), dense),
        "peers": peers(read("trend_peers")),
        "benchopt": suites(read("benchopt")),
        "tokens": tokens(read("quality")),
        "frontier": frontier(read("runtime")),
        "bits": bits(read("bits")),
        "power": power(read("jumps")),
        "selection": selection(read("trend_selection")),
    }
    for name, figure in pictures.items():
        figure.savefig(target / f"{name}.svg")
        plt.close(figure)
