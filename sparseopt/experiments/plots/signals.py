"""Signals on images, chains and graphs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.experiments.plots import style
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.regions import draw_boundaries

MOST_PANELS = 6  # of a signal's channels


def plot_image(image: Any, axis: Any = None, *, title: str = "", limits: tuple[float, float] | None = None) -> Any:
    """An image, pixel by pixel.

    Args:
        image: `[height, width]` for grey, `[height, width, 3]` or `[height, width, 4]` for RGB and RGBA; booleans,
            integers or floats.
        axis: to draw on.
        title: above it.
        limits: the values drawn black and white. None uses the whole range of 8- or 16-bit integers, 0 to 1 for floats
            in this range, and the range of the values otherwise.
    """
    given = np.asarray(image)
    colours, alpha = (given[..., :3], given[..., 3:]) if given.ndim == 3 else (given, None)
    values = colours.astype(float)
    low, high = style.colour_limits(_image_limits(colours) if limits is None else limits, values)
    height, width = given.shape[:2]
    axis = style.axis_or_new(axis, (5, float(np.clip(5 * height / width, 1, 10)) + (0.3 if title else 0)))
    if alpha is None:
        # The values themselves, so that a colour bar added later reads in their units.
        axis.imshow(values, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    else:
        top = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "ui" else 1
        parts = [(values - low) / (high - low), alpha.astype(float) / top]
        axis.imshow(np.clip(np.concatenate(parts, axis=2), 0, 1), interpolation="nearest")
    axis.set_title(title)
    style.bare(axis)
    return axis


def before_and_after(
    noisy: np.ndarray, denoised: np.ndarray, path: str | Path, captions: tuple[str, str] = ("before", "after")
) -> None:
    """Write two images side by side as a figure: grey, or three colours, without opacity and further channels.

    Black and white are 0 and 255 for 8 bits, and otherwise the range of `noisy`: few scans use all of 16 bits, or start
    at 0. NaN is black.
    """
    style.write_figure(_side_by_side(noisy, denoised, captions)[0].figure, path, 150)


def _side_by_side(noisy: np.ndarray, denoised: np.ndarray, captions: tuple[str, str]) -> np.ndarray:
    """The axes of `before_and_after`."""
    known = noisy[np.isfinite(noisy)]
    limits = (0, 255) if denoised.dtype == np.uint8 else style.colour_limits(None, known)
    height, width = noisy.shape[:2]
    axes = style.axes_or_new(None, 2, 2, (10, 5.4 * height / width + 0.4))
    for axis, image, caption in zip(axes, (noisy, denoised), captions, strict=True):
        colours = image if image.ndim < 3 else image[..., :3] if image.shape[-1] > 2 else image[..., 0]
        plot_image(np.where(np.isnan(colours), limits[0], colours), axis, limits=limits)
        axis.set_title(caption, parse_math=False)
    return axes


def observed_and_fit(
    observed: np.ndarray,
    fit: np.ndarray,
    names: Sequence[str],
    *,
    times: np.ndarray | None = None,
    places: Any = "node",
    marks: Sequence[int] = (),
    pieces: np.ndarray | None = None,
) -> Any:
    """A signal and its fit as a figure of its own, a panel for each of the first `MOST_PANELS` channels.

    Args:
        observed: `[n, channels]`; NaN where missing.
        fit: `[n, channels]`.
        names: of the channels.
        times: ascending `[n]`, numbers or dates; None for a graph, whose nodes stand in the order of their fit.
        places: what the times are.
        marks: the nodes of a series at which a line is drawn, such as jumps.
        pieces: the part of every pixel `[height, width]`, for a picture and its fit, with its boundaries, side by side.
    """
    from matplotlib import dates

    if pieces is not None:
        shape = (*pieces.shape, len(names))
        axes = _side_by_side(observed.reshape(shape), fit.reshape(shape), ("observed", "fit"))
        draw_boundaries(axes[1], pieces)
        return axes
    shown = min(len(names), MOST_PANELS)
    axes = style.axes_or_new(None, shown, 1, (8, 3.2 * shown))
    dated = times is not None and times.dtype.kind == "M"
    positions = dates.date2num(times) if dated else times
    for axis, name, dots, line in zip(axes, names, observed.T, fit.T, strict=False):
        order = np.argsort(line, kind="stable") if times is None else np.arange(line.size)
        plot_chain(dots[order], line[order], axis, positions=positions, marks=marks)
        axis.set_xlabel("nodes, in the order of their fit" if times is None else str(places), parse_math=False)
        axis.set_ylabel(name, parse_math=False)
        if dated:
            axis.xaxis_date()
            axis.xaxis.set_major_formatter(dates.ConciseDateFormatter(axis.xaxis.get_major_locator()))
        elif times is None or times.dtype.kind == "i":
            axis.xaxis.get_major_locator().set_params(integer=True)
    return axes


def _image_limits(colours: np.ndarray) -> tuple[float, float] | None:
    if colours.dtype.kind == "b":
        return 0.0, 1.0
    if colours.dtype.kind in "ui":
        known = np.iinfo(colours.dtype)
        return (float(known.min), float(known.max)) if known.bits <= 16 else None
    finite = colours[np.isfinite(colours)]
    return (0.0, 1.0) if finite.size and finite.min() >= 0 and finite.max() <= 1 else None


def plot_chain(
    observed: Any,
    fit: Any,
    axis: Any = None,
    *,
    truth: Any = None,
    positions: Any = None,
    marks: Sequence[int] = (),
) -> Any:
    """A signal on a chain: dots for what was observed, a line for the fit, a dashed line for the truth.

    Args:
        observed: `[n]`; NaN where missing.
        fit: `[n]`.
        axis: to draw on.
        truth: `[n]`, or None if it is not known.
        positions: ascending `[n]`; None numbers the nodes.
        marks: nodes at which a line is drawn, such as the `places` of `so.trend.jumps`.
    """
    dots, line = np.asarray(observed, float), np.asarray(fit, float)
    places = np.arange(dots.size) if positions is None else positions
    axis = style.axis_or_new(axis, (7, 3.6))
    # Many dots hide the line through them unless they are small and pale.
    size, alpha = (4, 0.8) if dots.size <= 300 else (2.5, 0.6)
    axis.plot(places, dots, "o", markersize=size, color="#777777", alpha=alpha, markeredgewidth=0, label="observed")
    if truth is not None:
        axis.plot(places, truth, linestyle="--", color=style.INK, linewidth=1.4, label="truth")
    axis.plot(places, line, color=style.COLOURS[5], linewidth=2, label="fit")
    for number, mark in enumerate(marks):
        label = "" if number else "jump or bend"
        axis.axvline(places[mark], color=style.INK, linewidth=0.8, linestyle=":", zorder=1, label=label)
    axis.set(xlabel="node" if positions is None else "position", ylabel="signal")
    style.tidy(axis)
    style.legend(axis)
    return axis


def plot_graph_signal(
    graph: Graph,
    positions: Any,
    signal: Any,
    axis: Any = None,
    *,
    limits: tuple[float, float] | None = None,
    label: str = "",
    edges: bool = True,
) -> Any:
    """A signal on the nodes of a graph, as colours.

    Args:
        graph: its edges are drawn in grey below the nodes.
        positions: of the nodes in the plane, `[n, 2]`.
        signal: `[n]`; NaN is drawn grey.
        axis: to draw on.
        limits: of the colours, or None for the signal's range.
        label: of the colour bar: what the signal is, with its unit.
        edges: draw them.
    """
    from matplotlib.collections import LineCollection

    places, values = np.asarray(positions, float), np.asarray(signal, float)
    low, high = style.colour_limits(limits, values)
    width, height = np.ptp(places, axis=0)
    # 1.3 of the width go to the colour bar.
    axis = style.axis_or_new(axis, (6.5, float(np.clip(5.2 * height / width, 2.2, 7)) if width > 0 else 7.0))
    crowded = graph.num_nodes > 3000
    if edges and graph.num_edges:
        thin = float(np.clip(40 / np.sqrt(graph.num_edges), 0.3, 1.2))
        lines = LineCollection(list(places[graph.edges]), colors="#999999", linewidths=thin, zorder=1)
        lines.set_rasterized(crowded)
        axis.add_collection(lines)
    # Dots that cover about half of the picture, whatever their number; few ones need not be that large.
    area = float(np.clip(50_000 / max(graph.num_nodes, 1), 1, 60))
    dots = axis.scatter(
        *places.T, s=area, c=values, cmap=style.value_map(), vmin=low, vmax=high, plotnonfinite=True,
        linewidths=0 if graph.num_nodes > 300 else 0.5, edgecolors=style.INK, zorder=2, rasterized=crowded,
    )  # fmt: skip
    # Dots have a size of their own, which a flat graph's few per cent of margin would cut.
    room = 0.04 * float(max(width, height))
    axis.update_datalim(np.concatenate([places - room, places + room]))
    axis.autoscale_view()
    style.bare(axis)
    style.colour_bar(axis, dots, values, label)
    return axis
