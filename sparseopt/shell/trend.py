"""The commands `sparseopt denoise` and `sparseopt trend`."""

import inspect
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from sparseopt.core.problem.problem import Status
from sparseopt.experiments.config import expand
from sparseopt.experiments.task import Task
from sparseopt.experiments.tasks.trend import Trend, figures_of
from sparseopt.shell import console
from sparseopt.shell.options import ManyDevices, number_of_devices, numbers
from sparseopt.system import report, run_folder
from sparseopt.system.files import write_whole
from sparseopt.system.machine import environment
from sparseopt.trend.methods.choice import AUTO, METHODS

METHOD_HELP = f"{', '.join((AUTO, *METHODS))}."
# How a weight is chosen, as it is said.
RULES = {
    "gcv": "by GCV",
    "sure": "by SURE, the smallest estimated error",
    "aic": "by AIC",
    "bic": "by BIC",
    "cv": "by cross-validation",
}
# The types of fields that are those of their options; others are texts.
SHELL_KINDS = (bool, int, float, str, Path, Path | None)


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
    end = figures_of(found.solution, time.perf_counter() - start)
    volumes.write_scan(output, found.image, scan)
    captions = image.name, f"order {order}, weight {found.weight:.3g}"
    before = pixels
    if mask is not None:
        seen = mask.reshape(*mask.shape, *(1 for _ in pixels.shape[mask.ndim :]))
        before = np.where(seen, pixels.astype(float), np.nan)
    drawn = _draw(picture, lambda: before_and_after(scan.shown(before), scan.shown(found.image), picture, captions))
    figures = {
        "image": str(image), "shape": pixels.shape, "spacing": step, "dtype": str(pixels.dtype),
        "noise": found.noise, "weight": found.weight, "weight_rule": "given" if weight is not None else "sure",
        "order": order, "ends": ends, "isotropic": found.isotropic, "couple": found.couple, **end,
    }  # fmt: skip
    figures = run_folder.plain(figures) | {"shape": pixels.shape, "spacing": step}
    _say(figures)
    title = f"{image.name}, denoised"
    shown = report.Figure(picture, f"{captions[0]}, and its fit of {captions[1]}")
    _write(title, figures, (summary, page), [output, *drawn], [shown] if drawn else [])


def _takes(model: type[Task]) -> Callable[[Any], Any]:
    """Give a command the own fields of a task as options, in place of its `**`."""

    def marked(command: Any) -> Any:
        first, *rest = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = []
        for name, field in model.model_fields.items():
            if name not in Task.model_fields:
                kind: Any = field.annotation if field.annotation in SHELL_KINDS else str | None
                info = typer.Option(*([f"--{name}"] if kind is bool else []), help=field.description)
                default = inspect.Parameter.empty if field.is_required() else field.default
                options.append(first.replace(name=name, default=default, annotation=Annotated[kind, info]))
        parameters = [each.replace(kind=each.KEYWORD_ONLY) for each in (options[0], first, *options[1:], *rest)]
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return marked


@_takes(Trend)
def trend(
    output: Annotated[
        Path, typer.Option(help="File for nodes, values and, at order 0, pieces: .csv, .parquet or .npz.")
    ],
    devices: ManyDevices = None,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")] = False,
    **given: Any,
) -> None:
    """Smooth a signal on a graph, with a figure and a report; files are CSV, Parquet or NPZ."""
    from sparseopt.experiments.plots.signals import observed_and_fit
    from sparseopt.experiments.plots.style import write_figure
    from sparseopt.experiments.read import files, graph_files, tables

    values = {"name": "trend", "task": "trend", "devices": number_of_devices(devices), **given}
    task: Any = expand(values, source="the command")[0].task
    stem = output.with_suffix("")
    picture, summary, page = Path(f"{stem}.png"), Path(f"{stem}-summary.json"), Path(f"{stem}-report.html")
    places = [Path(f"{stem}-{task.sought}.csv")] if task.sought else []
    files.check_output(output, tables.TABLE_KINDS, force)
    for target in (picture, summary, page, *places):
        files.check_output(target, None, force)
    signal, rule = task.read(), task.rule()
    for note in signal.notes:
        console.say(note)
    title = f"choosing the weight {RULES[rule].partition(',')[0]}" if rule else f"finding {task.sought}"
    title = title if rule or task.sought else "fitting"
    with warnings.catch_warnings(record=True) as warned, console.waiting(title) as observer:
        found = task.fit(signal, observer)
    for warning in warned:
        console.say(f"warning: {warning.message}", console.errors)
    graph_files.write_fit(output, found.table, found.pieces)
    for target in places:
        tables.write_table(target, found.breaks or {})
    drawn = _draw(picture, lambda: write_figure(observed_and_fit(**found.drawn)[0].figure, picture, 150))
    _say(found.record)
    caption = f"{', '.join(found.record['channels'])}: observed, and the fit of order {task.order}"
    shown = [report.Figure(picture, caption)] if drawn else []
    _write(f"{task.signal.name}, smoothed", found.record, (summary, page), [output, *places, *drawn], shown)


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


def _say(figures: dict[str, Any]) -> None:
    """Say how a fit ended."""
    if "weight" not in figures:
        kind = "part" if "regions" in figures else "line" if figures["lines"] else "constant"
        pieces = (
            f"{figures['pieces']:,} {kind}{'s' * (figures['pieces'] > 1)}{', smooth' * bool(figures.get('smooth'))}"
        )
        console.say(f"done in {console.duration(figures['seconds'])} (noise about {figures['noise']:.3g}): {pieces}")
        found = figures.get("regions") or [*figures["jumps"], figures["basis"]]
        console.say("\n".join(found) if "regions" in figures or figures["jumps"] else "no jump")
        return
    steps, gap, status = figures["steps"], figures["relative_duality_gap"], Status[figures["status"]]
    noise, rule = figures["noise"], RULES.get(figures["weight_rule"])
    level = f"weight {figures['weight']:.3g}" + (f" chosen {rule}" if rule else "")
    about = f"noise about {noise:.3g}, " if noise else ""
    console.say(f"done in {console.duration(figures['seconds'])} ({about}{level})")
    measure = (
        f"residual {figures['residual']:.2e}, no certificate" if gap is None else f"relative duality gap {gap:.2e}"
    )
    console.say(f"{status.name}: {measure}{f' after {steps} steps' if steps else ', solved directly'}")
    for name, value in figures.get("coefficients", {}).items():
        console.say(f"coefficient of {name}: {value:.4g}")
    if season := figures.get("season"):
        console.say(f"season of {len(season)} rows: from {min(season):.3g} to {max(season):.3g}")
    if not Status.reached(status):
        console.say(status.advice)


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
        step = report.Fact("--weight gcv --force", "in the same command without --jumps smooths with a trend filter")
        if "weight" in figures:
            step = report.Fact(f"--weight {2 * figures['weight']:.3g} --force", "in the same command smooths more")
        elif "regions" in figures and figures["graph"] is None:
            step = report.Fact("sparseopt denoise", "smooths the picture instead")
        return report.html_page(title, [shown], command, environment(), [step])

    console.write_page(page, made)
