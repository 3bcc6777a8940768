"""Pictures of the committed benchmark records, as SVG files; the tables on the same page have the figures.

quality.svg: perplexity of each pruning method at each sparsity, with public codes.
peers.svg: seconds to an accurate answer for each trend-filtering problem, with public solvers.
memory.svg: peak memory against the size of a model, and of a graph.
tokens.svg: perplexity and held-out error against the number of calibration tokens.
frontier.svg: perplexity against seconds a token and against megabytes, for dense, smaller and pruned models.
"""

import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from records import Record, groups, missing, read, select

SETTINGS = {"0.5": "50 %", "0.6": "60 %", "0.7": "70 %", "2:4": "2:4"}

OURS = "#0072B2"
PEERS = {
    "ALPS": ("#009E73", "D"),
    "ADMM (Boza)": ("#CC79A7", "^"),
    "SparseGPT": ("#E69F00", "s"),
    "mAIHT reference": ("#56B4E9", "v"),
    "Wanda": ("#D55E00", "X"),
}
# Methods over calibration tokens.
COLOURS = {
    "best": (OURS, "o"),
    "best one shot": ("#56B4E9", "v"),
    "admm": ("#CC79A7", "^"),
    "maiht": ("#009E73", "D"),
    "sparsegpt": ("#E69F00", "s"),
    "wanda": ("#D55E00", "X"),
}
# What was done to a model, see `_treatment`.
TREATMENTS = {
    "dense": ("#000000", "*"),
    "shrunk": (OURS, "s"),
    "pruned": ("#E69F00", "^"),
    "both": ("#009E73", "D"),
}
# Filled markers show the first of these runtimes that is recorded, hollow ones the others.
FRONTIER_RUNTIMES = ("transformers float32", "llama.cpp Q8_0")
SOLVERS = {"sparseopt auto": (OURS, "o"), "fastprox": ("#E69F00", "s"), "PIQP": ("#009E73", "^")}


def quality(records: list[Record], dense: float) -> Any:
    """Perplexity over sparsity, one line per method, with the dense model's."""
    models = select(records, r"perplexity, models, (?P<run>.+) at (?P<setting>[^,]+)")
    found = {(record["run"], record["setting"]): record for record in models}
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, (colour, marker) in ({"best": (OURS, "o")} | PEERS).items():
        points = {setting: found[name, setting]["value"] for setting in SETTINGS if (name, setting) in found}
        places = [place for place, setting in enumerate(SETTINGS) if setting in points]
        ours = name == "best"
        label = "sparseopt, best" if ours else name
        # 2:4 is not the next sparsity, so no line connects it.
        unstructured = [place for place in places if place < 3]
        values = list(points.values())
        style: dict[str, Any] = {"color": colour, "marker": marker, "linewidth": 2.6 if ours else 1.4}
        axis.plot(unstructured, values[: len(unstructured)], label=label, zorder=3 if ours else 2, **style)
        axis.plot(places[len(unstructured) :], values[len(unstructured) :], **style)
        if ours:
            for place, value in zip(places, values, strict=True):
                axis.annotate(f"{value:.1f}", (place, value), (0, -14), textcoords="offset points", ha="center")
    axis.axhline(dense, color="#666666", linestyle="--", linewidth=1)
    axis.annotate(f"dense {dense:.1f}", (2.5, dense), (0, 4), textcoords="offset points", color="#444444", ha="center")
    axis.set(yscale="log", ylabel="perplexity", xlabel="zeros in every linear layer", xlim=(-0.3, 3.3))
    axis.set_xticks(range(len(SETTINGS)), list(SETTINGS.values()))
    _logarithmic(axis.yaxis, [30, 50, 100, 200, 500, 1500])
    axis.legend(loc="upper left", frameon=False)
    return figure


def peers(records: list[Record]) -> Any:
    """Seconds to two tolerances, one row per problem, sorted by order and size."""
    found = [record for record in select(records, "time to target") if record["target"] < 1e-3 and record["seconds"]]
    problems = sorted(
        {(record["order"], record["nodes"], record["problem"]) for record in found},
        reverse=True,
    )
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, sharex=True, layout="constrained")
    for axis, exponent in zip(panels, (-4, -6), strict=True):
        for row, (_, _, problem) in enumerate(problems):
            times = {
                r["solver"]: r["seconds"] for r in found if r["problem"] == problem and r["target"] == 10.0**exponent
            }
            shown = {solver: times[solver] for solver in SOLVERS if solver in times}
            axis.plot([min(shown.values()), max(shown.values())], [row, row], color="#cccccc", zorder=1)
            for solver, seconds in shown.items():
                colour, marker = SOLVERS[solver]
                axis.plot(seconds, row, marker=marker, color=colour, markersize=7, linestyle="", zorder=2)
        axis.set(xscale="log", xlabel="seconds, one core", title=f"relative suboptimality $10^{{{exponent}}}$")
        axis.grid(axis="x", color="#eeeeee")
    panels[0].set_yticks(range(len(problems)), [_problem(*problem) for problem in problems])
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=solver.replace(" auto", ""))
        for solver, (colour, marker) in SOLVERS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def memory(pruning: list[Record], sizes: list[Record]) -> Any:
    """Peak memory: of pruning over the model's size, of the trend filter over the number of nodes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for preset, marker in (("paper", "s"), ("tuned", "o")):
        runs = [record for record in pruning if record["preset"] == preset]
        left.plot(
            [record["model_bytes"] / 1e6 for record in runs],
            [record["peak_memory_bytes"] / 1e6 for record in runs],
            marker=marker,
            color=OURS if preset == "tuned" else "#E69F00",
            label=f"mAIHT, preset {preset}",
        )
    left.set(xlabel="model, MB", ylabel="peak memory, MB", ylim=(0, 1200), title="Pruning a model")
    left.legend(loc="lower right", frameon=False)
    for order, colour in ((0, OURS), (1, "#E69F00")):
        grids = [r for r in select(sizes, "size") if r["problem"] == "picture" and r["order"] == order]
        right.plot(
            [record["nodes"] for record in grids],
            [record["peak_bytes"] / 1e9 for record in grids],
            marker="o",
            color=colour,
            label=f"order {order}",
        )
    right.set(xscale="log", yscale="log", xlabel="nodes of the grid", ylabel="peak memory, GB", title="Trend filtering")
    _logarithmic(right.yaxis, [0.5, 1, 2, 5])
    right.legend(loc="upper left", frameon=False)
    return figure


def tokens(records: list[Record]) -> Any:
    """Perplexity and held-out error over the calibration tokens, a row of panels for each model."""
    scored = [r for r in select(records, r"perplexity, tokens, (?P<run>.+) at .+") if r["value"] is not None]
    models = groups(scored, "model")
    if not models:
        return _without_records("quality")
    figure, panels = plt.subplots(len(models), 2, figsize=(9, 3.6 * len(models)), squeeze=False, layout="constrained")
    errors = {"value": "perplexity", "mean_heldout_error": "held-out error of the layers"}
    for of_model, row in zip(models, panels, strict=True):
        counts = sorted({record["calibration_tokens"] for record in of_model})
        for axis, (field, label) in zip(row, errors.items(), strict=True):
            for run, (colour, marker) in COLOURS.items():
                # The median over the draws of each number of tokens.
                draws = groups([r for r in of_model if r["run"] == run], "calibration_tokens")
                medians = {draw[0]["calibration_tokens"]: statistics.median(r[field] for r in draw) for draw in draws}
                axis.plot(*zip(*sorted(medians.items()), strict=True), color=colour, marker=marker, label=run)
            axis.set(xscale="log", xlabel="calibration tokens", ylabel=label, title=of_model[0]["model"])
            axis.set_xticks(counts, [f"{count:,}" for count in counts], rotation=30)
            axis.minorticks_off()
            axis.grid(color="#eeeeee")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _without_records(name: str) -> Any:
    """A line of text in place of a picture."""
    figure, axis = plt.subplots(figsize=(9, 0.6), layout="constrained")
    axis.text(0, 0.5, missing(name).replace("`", ""), va="center")
    axis.set_axis_off()
    return figure


def frontier(records: list[Record]) -> Any:
    """Perplexity over milliseconds a token and over megabytes on disk; points of a runtime are all in one run."""
    found = [r for r in records if r["figure"].startswith("decode, ") and r["runtime"] in FRONTIER_RUNTIMES]
    if not found:
        return _without_records("runtime")
    runtimes = [name for name in FRONTIER_RUNTIMES if any(record["runtime"] == name for record in found)]
    scales = (("milliseconds a token, one thread", "decode_seconds", 1e3), ("MB on disk", "disk_bytes", 1e-6))
    beside: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 8}
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
    for axis, (label, name, unit) in zip(panels, scales, strict=True):
        for record in found:
            colour, marker = TREATMENTS[_treatment(record["model"])]
            place = (record[name] * unit, record["perplexity"])
            hollow = record["runtime"] != runtimes[0]
            axis.plot(*place, marker=marker, color=colour, markerfacecolor="none" if hollow else colour, linestyle="")
            if not hollow:
                axis.annotate(record["model"], place, (-6, 0), color=colour, **beside)
        axis.set(xlabel=label, yscale="log", xlim=(0, None))
        axis.grid(color="#eeeeee")
    shown = [record["perplexity"] for record in found]
    _logarithmic(panels[0].yaxis, [30, 40, 50, 70, 100, 200])
    panels[0].set(ylabel="perplexity", ylim=(0.95 * min(shown), 1.05 * max(shown)))
    treatments = dict.fromkeys(_treatment(record["model"]) for record in found)
    handles = [
        Line2D([], [], color=TREATMENTS[name][0], marker=TREATMENTS[name][1], linestyle="", label=name)
        for name in TREATMENTS
        if name in treatments
    ]
    handles += [
        Line2D([], [], color="#666666", marker="o", markerfacecolor=face, linestyle="", label=runtime)
        for runtime, face in zip(runtimes, ("#666666", "none"), strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _treatment(model: str) -> str:
    """What was done to a model by its name: "channels 0.75", "pruned 0.5", "channels 0.75, pruned 0.5"."""
    if "pruned" not in model:
        return "dense" if model == "dense" else "shrunk"
    return "pruned" if model.startswith("pruned") else "both"


def _problem(order: int, nodes: int, name: str) -> str:
    """The label of a problem: "grid256_k0" is a picture of 256 x 256 at order 0."""
    kind, _, rest = name.partition("_")
    graph = {
        "grid": "picture {0} x {0}",
        "cube": "cube {0}³",
        "road": "roads, {1:,} nodes",
        "chain": "chain, {1:,} nodes",
    }
    word = kind.rstrip("0123456789k")
    penalty = rest if rest == "isotropic" else f"order {order}"
    return f"{graph[word].format(kind.removeprefix(word), nodes)}, {penalty}"


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
        "memory": memory(read("memory"), read("trend_sizes")),
        "tokens": tokens(read("quality")),
        "frontier": frontier(read("runtime")),
    }
    for name, figure in pictures.items():
        figure.savefig(target / f"{name}.svg")
        plt.close(figure)
