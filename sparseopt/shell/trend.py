"""The commands `sparseopt denoise` and `sparseopt trend`."""

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

import sparseopt as so
from sparseopt.core.losses.scalar import LOSSES, check_scalar_loss
from sparseopt.core.penalties.names import BY_WEIGHT, penalty_of_weight
from sparseopt.shell import console
from sparseopt.shell.options import ManyDevices, number_of_devices, numbers
from sparseopt.system import report
from sparseopt.system.files import write_whole
from sparseopt.system.machine import environment
from sparseopt.trend.methods.choice import AUTO, METHODS

# Steps of times that differ by less than this fraction are equal.
EVEN = 1e-6
METHOD_HELP = f"{', '.join((AUTO, *METHODS))}."
# How a weight is chosen, as it is said.
RULES = {
    "gcv": "by GCV",
    "sure": "by SURE, the smallest estimated error",
    "aic": "by AIC",
    "bic": "by BIC",
    "cv": "by cross-validation",
}
# Where the last of a path's weights is the best, as of a long series at order 1, a path from there follows.
LEVELS, RATIO, MOST_PATHS = 50, 1e-3, 4
UNLIKE = 5  # times the noise of another channel: too much for one weight
DIGITS = 10  # of the values that are written: more than a certificate confirms


def denoise(
    image: Annotated[
        Path, typer.Argument(help="Image: grey or colour, 8 or 16 bit. Volume: TIFF stack, NIfTI, NPZ (image, volume).")
    ],
    output: Annotated[Path, typer.Option(help="File to write; volumes as TIFF, NPZ or, from NIfTI, NIfTI.")],
    weight: Annotated[
        float | None,
        typer.Option(help="Smoothing level, in grey levels. Default: chosen to minimise the estimated error (SURE)."),
    ] = None,
    order: Annotated[int, typer.Option(help="0: flat patches with sharp edges; 1: slopes; 2: curves.")] = 0,
    isotropic: Annotated[
        bool | None,
        typer.Option(
            "--isotropic/--no-isotropic",
            help="Order 0: edges in all directions cost the same. Default: for colour images.",
        ),
    ] = None,
    couple: Annotated[
        bool | None,
        typer.Option(
            "--couple/--no-couple",
            help="Couple the colour channels, so that edges coincide. Default: for colour images at order 0.",
        ),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="Distance of neighbours along each axis, as in 2.5,1,1. Default: that in the file."),
    ] = None,
    ends: Annotated[
        str, typer.Option(help="Borders: graph, or free, which keeps slopes from order 1 on (Kronecker trend filter).")
    ] = "graph",
    known: Annotated[
        Path | None, typer.Option(help="Image or volume that is 0 where a pixel is not known and is to be filled in.")
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Fill in NaN.")] = False,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "auto",
    tol: Annotated[float, typer.Option(help="Relative duality gap to reach.")] = 1e-4,
    devices: ManyDevices = None,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")] = False,
) -> None:
    """Denoise an image or a volume by trend filtering on its grid, with a before/after picture and a report."""
    from sparseopt.experiments.plots.signals import before_and_after
    from sparseopt.experiments.read import files, volumes
    from sparseopt.trend.images import denoise as denoise_array

    chosen = number_of_devices(devices)
    stem = Path(str(output).removesuffix(".gz")).with_suffix("")
    picture, summary, page = (Path(f"{stem}-{end}") for end in ("before-after.png", "summary.json", "report.html"))
    for target in (output, picture, summary, page):
        files.check_output(target, None, force)
    scan = volumes.read_scan(image)
    volumes.check_format(output, scan)
    pixels, step = scan.values, scan.spacing if spacing is None else tuple(numbers(spacing, "--spacing", repeat=True))
    mask = None if known is None else volumes.read_known(known, scan)
    absent: Literal["nan", "error"] = "nan" if missing else "error"
    start = time.perf_counter()
    console.say(f"{image.name}: {' x '.join(map(str, pixels.shape))}, order {order}")
    with console.waiting("denoising") as observer:
        found = denoise_array(
            pixels, weight, order, isotropic=isotropic, couple=couple, volume=scan.volume, spacing=step, ends=ends,
            known=mask, missing=absent, method=method, tol=tol, devices=chosen,
            observer=observer,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    volumes.write_scan(output, found.image, scan)
    captions = image.name, f"order {order}, weight {found.weight:.3g}"
    before = pixels
    if mask is not None:
        seen = mask.reshape(*mask.shape, *(1 for _ in pixels.shape[mask.ndim :]))
        before = np.where(seen, pixels.astype(float), np.nan)
    drawn = _draw(picture, lambda: before_and_after(scan.shown(before), scan.shown(found.image), picture, captions))
    figures = {
        "image": str(image), "shape": pixels.shape, "spacing": step, "dtype": str(pixels.dtype),
        "noise": _number(found.noise), "weight": found.weight, "weight_rule": "given" if weight is not None else "sure",
        "order": order, "ends": ends, "isotropic": found.isotropic, "couple": found.couple,
    }  # fmt: skip
    figures |= _said(found.solution, figures, seconds)
    title = f"{image.name}, denoised"
    shown = report.Figure(picture, f"{captions[0]}, and its fit of {captions[1]}")
    _write(title, figures, (summary, page), [output, *drawn], [shown] if drawn else [])


def trend(
    signal: Annotated[
        Path,
        typer.Option(
            help="Signal: one row per node, one column per channel; a first column `node` or `id` names the nodes. In "
            "a series an increasing column `time`, `date`, `timestamp`, `datetime`, `year`, `t` or `index` has the "
            "times."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="File for nodes, values and, at order 0, pieces: .csv, .parquet or .npz.")
    ],
    weight: Annotated[
        str | None,
        typer.Option(
            help=f"Penalty level, in units of the signal, or the rule that chooses it: {', '.join(RULES)}. Default: "
            "gcv, or cv for labels, losses of outliers and penalties that are not convex."
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(LOSSES)}, or quantile:LEVEL. Of counts (poisson) the fit is the rate, of labels 0, 1 "
            "(logistic) the probability of 1; huber and absolute are for outliers."
        ),
    ] = "square",
    graph: Annotated[
        Path | None,
        typer.Option(
            help="Edges: two columns of node numbers from 0, or ids; a third of weights w, which scale differences by "
            "sqrt(w). Default: a series."
        ),
    ] = None,
    times: Annotated[Path | None, typer.Option(help="Times of a series with free ends: one column.")] = None,
    ends: Annotated[
        str | None,
        typer.Option(help="Ends of a series: free, which keeps polynomials, or graph. Default: free, without --graph."),
    ] = None,
    order: Annotated[int, typer.Option(help="0: piecewise constant; 1: piecewise linear; 2: quadratic.")] = 0,
    penalty: Annotated[str, typer.Option(help=f"{', '.join(BY_WEIGHT)}; group_l2 couples the channels.")] = "l1",
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "auto",
    tol: Annotated[float, typer.Option(help="Relative duality gap to reach.")] = 1e-5,
    missing: Annotated[bool, typer.Option("--missing", help="Treat NaN and empty cells as unobserved.")] = False,
    devices: ManyDevices = None,
    merge: Annotated[bool, typer.Option("--merge", help="Drop self-loops and add up duplicate edges.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")] = False,
) -> None:
    """Smooth a signal on a graph, with a figure and a report; files are CSV, Parquet or NPZ."""
    from sparseopt.experiments.plots.signals import observed_and_fit
    from sparseopt.experiments.read import files, graph_files, tables

    chosen = number_of_devices(devices)
    template, family, rule = penalty_of_weight(penalty, 1.0), _loss(loss), _rule(weight, loss, penalty)
    if rule is not None and chosen is not None:
        raise ValueError("a weight is chosen on one device: give --weight a number, or leave out --devices")
    stem = output.with_suffix("")
    picture, summary, page = Path(f"{stem}.png"), Path(f"{stem}-summary.json"), Path(f"{stem}-report.html")
    files.check_output(output, tables.TABLE_KINDS, force)
    for target in (picture, summary, page):
        files.check_output(target, None, force)
    if graph is not None and (times is not None or ends not in (None, "graph")):
        raise ValueError("--times and --ends belong to a series, given --graph too: leave out --graph, or both of them")
    if graph is None and merge:
        raise ValueError("--merge belongs to the edges of --graph: leave it out, or give --graph")
    ends = ends or ("free" if graph is None else "graph")
    given = graph_files.read_signal(signal, series=graph is None)
    y, count = given.values, len(given.names)
    console.say(f"{count} channel{'s' * (count > 1)}: {', '.join(given.names)}")
    for name in given.names if graph is None and count > 1 else ():
        if name.lower() in graph_files.TIME_NAMES:
            console.say(f"the column {name} is taken as a channel: times must increase", console.errors)
    if graph is None:
        network = _series(given, None if times is None else graph_files.read_signal(times).values, ends, order)
    else:
        edges, edge_weights = graph_files.read_edges(graph, given.nodes)
        network = so.Graph.from_edges(edges, len(y), edge_weights, merge=merge)
    console.say(f"{signal.name}: {network.num_nodes:,} nodes and {network.num_edges:,} edges, order {order}")
    absent: Literal["nan", "error"] = "nan" if missing else "error"
    options: dict[str, Any] = {"missing": absent, "loss": family}
    start = time.perf_counter()
    if rule is not None:
        with console.waiting(f"choosing the weight {RULES[rule].partition(',')[0]}") as observer:
            choice = options | {"method": method, "observer": observer}
            level = _chosen_weight(rule, (y, network, template, order), choice)
    else:
        level = float(str(weight))
    with console.waiting(f"fitting with weight {level:.3g}"):
        made = penalty_of_weight(penalty, level)
        found = so.trend_filter(y, network, made, order, method, tol=tol, devices=chosen, **options)
    known = loss == "square" and chosen is None
    noise = so.trend.noise_level(y, network, order, missing=absent) if known else math.nan
    columns = y.reshape(len(y), -1)
    if known and count > 1:
        apart = [so.trend.noise_level(column, network, order, missing=absent) for column in columns.T]
        if 0 < UNLIKE * min(apart) < max(apart):
            unit = f"the noise of the channels is {min(apart):.3g} to {max(apart):.3g}, and one weight smooths them all"
            console.say(f"{unit}: bring them to one unit, or smooth them one by one", console.errors)
    seconds = time.perf_counter() - start
    pieces = None if order else found.pieces()
    # Of counts and labels the fit is a logarithm or a score, and a signal its mean.
    rounded = np.vectorize(lambda value: float(f"{value:.{DIGITS}g}"))
    fit = dataclasses.replace(given, values=rounded(family.mean(found.value)))
    graph_files.write_fit(output, fit, pieces)
    positions = given.times if given.dates is None else graph_files.as_dates(given.dates)
    if graph is None and positions is None:
        positions = np.arange(len(y))
    draws = columns, fit.values.reshape(len(y), -1), given.names, picture
    drawn = _draw(picture, lambda: observed_and_fit(*draws, times=positions, places=given.times_name or "node"))
    figures = {
        "graph": None if graph is None else str(graph), "ends": ends, "signal": str(signal),
        "channels": given.names, "nodes": network.num_nodes, "edges": network.num_edges, "loss": loss,
        "noise": _number(noise), "penalty": penalty, "weight": level, "weight_rule": rule or "given", "order": order,
    }  # fmt: skip
    if pieces is not None:
        figures["pieces"] = int(pieces.max()) + 1
    figures |= _said(found, figures, seconds)
    shown = report.Figure(picture, f"{', '.join(given.names)}: observed, and the fit of order {order}")
    _write(f"{signal.name}, smoothed", figures, (summary, page), [output, *drawn], [shown] if drawn else [])


def _loss(text: str) -> Any:
    """The loss of a name, or of the quantile with a level."""
    name, _, level = text.partition(":")
    if name != "quantile":
        return check_scalar_loss(text)
    try:
        return check_scalar_loss(so.scalar.Quantile(float(level)))
    except ValueError:
        raise ValueError(f"--loss quantile needs a level between 0 and 1, as in quantile:0.9, given {text!r}") from None


def _rule(weight: str | None, loss: str, penalty: str) -> str | None:
    """The rule that chooses the weight, None for a number; the defaults are those of how-to/choose.md."""
    if weight is None or weight in RULES:
        if penalty == "l0":
            raise ValueError("for --penalty l0 no rule chooses a weight: give --weight a number")
        if (loss == "logistic" and weight in ("gcv", "aic")) or (loss != "square" and weight == "sure"):
            raise ValueError(f"--weight {weight} does not choose well for --loss {loss}: give cv or bic")
        likely = loss in ("square", "poisson") and penalty in ("l1", "group_l2")
        return weight or ("gcv" if likely else "cv")
    try:
        float(weight)
    except ValueError:
        raise ValueError(f"--weight is a number or one of {', '.join(RULES)}, given {weight!r}") from None
    return None


def _chosen_weight(rule: str, problem: tuple[Any, ...], options: dict[str, Any]) -> float:
    """The weight of the best level of a path, which goes on while its last level is the best."""
    for path in range(MOST_PATHS):
        if rule == "cv":
            chosen: Any = so.trend.cross_validate(*problem, **options)
        else:
            chosen = so.trend.select(so.trend.trend_path(*problem, **options), rule)
        if chosen.index < len(chosen.path) - 1 or path == MOST_PATHS - 1:
            break
        options = options | {"weights": chosen.weight * np.geomspace(1, RATIO, LEVELS)}
    return chosen.weight


def _series(given: Any, times: np.ndarray | None, ends: str, order: int) -> so.Graph:
    """The chain of a series, at the times of an option or of a column of its file."""
    if given.times is None:
        return so.Graph.chain(len(given.values), times, ends)
    if times is not None:
        raise ValueError(f"the signal has its times in the column {given.times_name!r}: leave out --times")
    console.say(f"times: the column {given.times_name}")
    steps = np.diff(given.times)
    if ends == "graph" and order and np.ptp(steps) > EVEN * steps.max():
        raise ValueError(
            f"the times of the column {given.times_name!r} are uneven: leave out --ends graph, since free ends count "
            "them, or leave the column out"
        )
    return so.Graph.chain(len(given.values), given.times if ends == "free" else None, ends)


def _number(value: float) -> float | None:
    """A number as JSON knows it."""
    return value if math.isfinite(value) else None


def _draw(picture: Path, draw: Callable[[], None]) -> list[Path]:
    """The figure that was written. The fit is finished, so what goes wrong is only a warning."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            draw()
    except ModuleNotFoundError as error:
        console.say(f"no figure, which needs {error.name}: pip install 'sparseopt[plot]'")
    except Exception as error:
        console.say(f"warning: no figure: {error}", console.errors)
    else:
        return [picture]
    return []


def _said(found: Any, figures: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Say how a fit ended; the figures of it."""
    status = so.Status(int(found.status))
    steps, gap, residual = int(found.steps), float(found.gap), float(found.residual)
    noise, rule = figures["noise"], RULES.get(figures["weight_rule"])
    level = f"weight {figures['weight']:.3g}" + (f" chosen {rule}" if rule else "")
    about = f"noise about {noise:.3g}, " if noise else ""
    console.say(f"done in {console.duration(seconds)} ({about}{level})")
    measure = f"relative duality gap {gap:.2e}" if gap == gap else f"residual {residual:.2e}, no certificate"
    console.say(f"{status.name}: {measure}{f' after {steps} steps' if steps else ', solved directly'}")
    if status not in (so.Status.CONVERGED, so.Status.STATIONARY):
        console.say(status.advice)
    return {
        "status": status.name,
        "steps": steps,
        "objective": float(found.objective),
        "relative_duality_gap": _number(gap),
        "residual": residual,
        "seconds": seconds,
    }


def _write(
    title: str, figures: dict[str, Any], ends: tuple[Path, Path], written: list[Path], drawn: list[report.Figure]
) -> None:
    """Write a fit's figures as JSON and as a page."""
    summary, page = ends
    write_whole(summary, json.dumps(figures, indent=2) + "\n")
    console.say(f"wrote {', '.join(map(str, [*written, summary]))}")

    def made(command: str) -> str:
        rows = [(name.replace("_", " "), report.cell(value)) for name, value in figures.items()]
        shown = report.Report(report.Table("The fit", ("quantity", "value"), rows), figures=drawn)
        steps = [report.Fact(f"--weight {2 * figures['weight']:.3g} --force", "in the same command smooths more")]
        return report.html_page(title, [shown], command, environment(), steps)

    console.write_page(page, made)
