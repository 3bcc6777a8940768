"""The commands `sparseopt denoise` and `sparseopt trend`."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

import sparseopt as so
from sparseopt.core.penalties.names import BY_WEIGHT, penalty_of_weight
from sparseopt.shell import console
from sparseopt.shell.options import ManyDevices, number_of_devices, numbers
from sparseopt.system import report
from sparseopt.system.machine import environment
from sparseopt.trend.methods.choice import AUTO, METHODS

# Steps of times that differ by less than this fraction are equal.
EVEN = 1e-6
METHOD_HELP = f"{', '.join((AUTO, *METHODS))}."


def denoise(
    image: Annotated[
        Path, typer.Argument(help="Image: grey or colour, 8 or 16 bit. Volume: TIFF stack, NIfTI, NPZ (image, volume).")
    ],
    output: Annotated[Path, typer.Option(help="File to write; volumes as TIFF, NPZ or, from NIfTI, NIfTI.")],
    weight: Annotated[
        float | None, typer.Option(help="Smoothing level, in grey levels. Default: that of the least estimated error.")
    ] = None,
    order: Annotated[int, typer.Option(help="0: flat patches with sharp edges; 1: slopes; 2: curves.")] = 0,
    isotropic: Annotated[
        bool, typer.Option("--isotropic", help="Order 0: edges in all directions cost the same.")
    ] = False,
    couple: Annotated[bool, typer.Option(help="Let the colours of a pixel change together.")] = False,
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
    stem = output.with_suffix("")
    picture, summary, page = (Path(f"{stem}-{end}") for end in ("before-after.png", "summary.json", "report.html"))
    for target in (output, picture, summary, page):
        files.check_output(target, None, force)
    scan = volumes.read_scan(image)
    volumes.check_format(output, scan)
    pixels, step = scan.values, scan.spacing if spacing is None else tuple(numbers(spacing, "--spacing", repeat=True))
    mask = None if known is None else volumes.read_known(known, scan)
    absent: Literal["nan", "error"] = "nan" if missing else "error"
    start = time.perf_counter()
    with console.waiting(f"denoising {image.name}, {' x '.join(map(str, pixels.shape))}, order {order}"):
        found = denoise_array(
            pixels, weight, order, isotropic=isotropic, couple=couple, volume=scan.volume, spacing=step, ends=ends,
            known=mask, missing=absent, method=method, tol=tol, devices=chosen,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    volumes.write_scan(output, found.image, scan)
    captions = image.name, f"order {order}, weight {found.weight:.3g}"
    before = pixels
    if mask is not None:  # what is not known is black
        before = pixels * mask.reshape(*mask.shape, *(1 for _ in pixels.shape[mask.ndim :]))
    before_and_after(scan.shown(before), scan.shown(found.image), picture, captions)
    if weight is None:
        console.say(f"weight {found.weight:.3g}, of the least estimated error (Stein, 1981)")
    figures = {
        "image": str(image), "shape": pixels.shape, "spacing": step, "dtype": str(pixels.dtype),
        "weight": found.weight, "order": order, "ends": ends, "isotropic": isotropic,
    }  # fmt: skip
    _finish_fit(found.solution, figures, seconds, summary, [output, picture])

    def made(command: str) -> str:
        rows = [(name.replace("_", " "), report.cell(value)) for name, value in figures.items()]
        shown = report.Report(
            report.Table("The fit", ("figure", "value"), rows),
            figures=[report.Figure(picture, f"{captions[0]}, and its fit of {captions[1]}")],
        )
        steps = [report.Fact(f"--weight {2 * found.weight:.3g} --force", "in the same command smooths more")]
        return report.html_page(f"{image.name}, denoised", [shown], command, environment(), steps)

    console.write_page(page, made)


def trend(
    signal: Annotated[
        Path,
        typer.Option(
            help="Signal: one row per node, one column per channel; a first column `node` or `id` names the nodes. In "
            "a series an increasing column `time`, `date`, `t` or `index` has the times."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="File for nodes, values and, at order 0, pieces: .csv, .parquet or .npz.")
    ],
    weight: Annotated[float, typer.Option(help="Penalty level, in units of the signal.")],
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
    """Smooth a signal on a graph; files are CSV, Parquet or NPZ."""
    from sparseopt.experiments.read import files, graph_files, tables

    chosen = number_of_devices(devices)
    made = penalty_of_weight(penalty, weight)
    summary = Path(f"{output.with_suffix('')}-summary.json")
    files.check_output(output, tables.TABLE_KINDS, force)
    files.check_output(summary, None, force)
    if graph is not None and (times is not None or ends not in (None, "graph")):
        raise ValueError("--times and --ends belong to a series, given --graph too: leave out --graph, or both of them")
    if graph is None and merge:
        raise ValueError("--merge belongs to the edges of --graph: leave it out, or give --graph")
    ends = ends or ("free" if graph is None else "graph")
    given = graph_files.read_signal(signal, series=graph is None)
    y, count = given.values, len(given.names)
    console.say(f"{count} channel{'s' * (count > 1)}: {', '.join(given.names)}")
    if graph is None:
        network = _series(given, None if times is None else graph_files.read_signal(times).values, ends, order)
    else:
        edges, edge_weights = graph_files.read_edges(graph, given.nodes)
        network = so.Graph.from_edges(edges, len(y), edge_weights, merge=merge)
    title = f"fitting {signal.name} on {network.num_nodes:,} nodes and {network.num_edges:,} edges, order {order}"
    start = time.perf_counter()
    with console.waiting(title):
        absent: Literal["nan", "error"] = "nan" if missing else "error"
        found = so.trend_filter(y, network, made, order, method, tol=tol, missing=absent, devices=chosen)
    seconds = time.perf_counter() - start
    pieces = None if order else found.pieces()
    graph_files.write_fit(output, dataclasses.replace(given, values=np.asarray(found.value)), pieces)
    figures = {
        "graph": None if graph is None else str(graph), "ends": ends, "signal": str(signal),
        "channels": given.names, "nodes": network.num_nodes, "edges": network.num_edges,
        "penalty": penalty, "weight": weight, "order": order,
    }  # fmt: skip
    if pieces is not None:
        figures["pieces"] = int(pieces.max()) + 1
    _finish_fit(found, figures, seconds, summary, [output])


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


def _finish_fit(found: Any, figures: dict[str, Any], seconds: float, summary: Path, written: list[Path]) -> None:
    """Say how a fit ended, and write the same as JSON."""
    status = so.Status(int(found.status))
    steps, gap, residual = int(found.steps), float(found.gap), float(found.residual)
    figures |= {
        "status": status.name,
        "steps": steps,
        "objective": float(found.objective),
        "relative_duality_gap": None if gap != gap else gap,
        "residual": residual,
        "seconds": seconds,
    }
    summary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    measure = f"relative duality gap {gap:.2e}" if gap == gap else f"residual {residual:.2e}, no certificate"
    console.say(f"{status.name}: {measure} after {steps} steps, {seconds:.1f} s with compiling")
    if status not in (so.Status.CONVERGED, so.Status.STATIONARY):
        console.say(status.advice)
    console.say(f"wrote {', '.join(map(str, [*written, summary]))}")
