"""What all figures share: colours and line styles, checks of the data, helpers for axes."""

import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.system.files import write_whole

# Distinguishable with any colour vision; dashes and hatches distinguish them in grey print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
# Seven dashes for six colours: 42 lines differ, and neighbours differ in both.
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)), (0, (2, 1)))
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLOUR_MAP = "viridis"  # lightness rises evenly, so it keeps its order in grey
MISSING = "#c8c8c8"
INK = "#333333"
TITLE_CHARACTERS = 9  # of a figure's title per inch; a longer one is wrapped


def line_style(index: int, markers: bool = False) -> dict[str, Any]:
    """Colour, dash and marker of the line with this number, as keywords of `Axes.plot`."""
    style: dict[str, Any] = {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.8,
    }
    return {**style, "marker": MARKERS[index % len(MARKERS)], "markersize": 5} if markers else style


def axis_or_new(axis: Any, size: tuple[float, float] = (6, 4)) -> Any:
    """The given axis, or the axis of a new figure with this size in inches."""
    return axes_or_new(axis, 1, 1, size)[0]


def axes_or_new(axes: Any, count: int, columns: int, size: tuple[float, float], **options: Any) -> np.ndarray:
    """`count` axes as a flat array: the given ones, or the panels of a new figure with this size in inches."""
    if axes is None:
        import matplotlib.pyplot as plt

        rows = -(-count // columns)
        panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)[1].ravel()
        for unused in panels[count:]:
            unused.set_visible(False)
        return panels[:count]
    given = np.ravel(axes)
    if given.size != count:
        raise ValueError(f"this picture has {count} panels and needs as many axes, given {given.size}")
    return given


def tidy(axis: Any, grid: str = "both") -> None:
    """Open frame and a faint grid behind the data."""
    axis.grid(axis=grid, which="major", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def bare(axis: Any) -> None:
    """No frame and no ticks, for coordinates without meaning but with equal scale."""
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def legend(axis: Any) -> None:
    """A legend with lines long enough to show their dashes."""
    axis.legend(frameon=False, handlelength=2.8)


def colour_bar(axis: Any, drawn: Any, values: np.ndarray, label: str) -> None:
    """A colour bar, pointed where values lie beyond its limits."""
    low, high = drawn.get_clim()
    finite = values[np.isfinite(values)]
    below, above = (finite < low).any(), (finite > high).any()
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    axis.figure.colorbar(drawn, ax=axis, label=label, extend=extend)


def value_map() -> Any:
    """The colour map of signals; missing values are grey."""
    import matplotlib

    return matplotlib.colormaps[COLOUR_MAP].with_extremes(bad=MISSING)


def colour_limits(limits: Any, values: np.ndarray) -> tuple[float, float]:
    """The limits given, or the range of the finite values."""
    if limits is not None:
        return limits
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def save_figure(axes: Any, path: Path, title: str) -> Path:
    """Give the axes' figure a title, write it, close it."""
    figure = np.ravel(axes)[0].figure
    figure.suptitle(textwrap.fill(title, max(int(TITLE_CHARACTERS * figure.get_figwidth()), 20)))
    write_figure(figure, path, 130)
    return path


def write_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a figure whole, in the format of the file's ending, and close it."""
    import matplotlib.pyplot as plt

    drawn, file = io.BytesIO(), Path(path)
    figure.savefig(drawn, dpi=dpi, format=file.suffix[1:] or None)
    plt.close(figure)
    write_whole(file, drawn.getvalue())
