"""Floor 5: denoise an image array; its type and range are kept."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from sparseopt.core.group_penalties import GroupL2
from sparseopt.core.mesh import Devices
from sparseopt.core.penalties import L1
from sparseopt.core.problem import Solution
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.graph import Graph


@dataclasses.dataclass(frozen=True)
class Denoised:
    """A denoised image."""

    image: np.ndarray  # of the shape and dtype of the input; integers are rounded and clipped to their range
    solution: Solution  # of the trend filter, in the input's units


def denoise(
    image: Any,
    weight: float,
    order: int = 0,
    *,
    couple: bool = False,
    method: str = "auto",
    tol: float = 1e-4,
    max_steps: int = 20_000,
    dtype: Any = np.float32,
    devices: Devices = None,
) -> Denoised:
    """Fit a trend of an order to every channel of an image on its pixel grid.

    Args:
        image: `[height, width]` or `[height, width, channels]`, of 8- or 16-bit integers or floats; an alpha channel
            (the last of 2 or 4) is kept unchanged.
        weight: of the penalty, in the image's units (grey levels).
        order: 0 for flat patches with sharp edges, 1 for slopes.
        couple: let the channels of a pixel change together (`GroupL2`) instead of separately (`L1`).
        method: of `trend_filter`.
        tol: relative duality gap; 1e-4 is below one grey level.
        max_steps: step limit.
        dtype: of the computation.
        devices: as in `trend_filter`.
    """
    given = np.asarray(image)
    if given.ndim not in (2, 3) or given.dtype.kind not in "uif" or min(given.shape) < 1:
        raise ValueError(
            f"an image has the shape [height, width] or [height, width, channels] and holds numbers, given "
            f"{given.shape} of {given.dtype}"
        )
    has_alpha = given.ndim == 3 and given.shape[2] in (2, 4)
    colours = given[..., :-1] if has_alpha else given
    penalty = GroupL2(weight) if couple and colours.ndim == 3 else L1(weight)
    grid = Graph.grid(given.shape[:2])
    solution = trend_filter(colours, grid, penalty, order, method, tol, max_steps, dtype=dtype, devices=devices)
    fitted = np.asarray(solution.value)
    if given.dtype.kind in "ui":
        limits = np.iinfo(given.dtype)
        fitted = np.clip(np.rint(fitted), limits.min, limits.max)
    fitted = fitted.astype(given.dtype)
    if has_alpha:
        fitted = np.concatenate([fitted, given[..., -1:]], axis=-1)
    return Denoised(fitted, solution)


def psnr(image: np.ndarray, reference: np.ndarray, peak: float = 255.0) -> float:
    """`10 log10(peak² / mean squared difference)` in decibels."""
    apart = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    return float(10 * np.log10(peak**2 / np.mean(apart**2)))


def before_and_after(
    noisy: np.ndarray, denoised: np.ndarray, path: str | pathlib.Path, captions: tuple[str, str] = ("before", "after")
) -> None:
    """Write both images side by side as a figure; needs the `plot` extra."""
    from matplotlib.figure import Figure

    height, width = noisy.shape[:2]
    figure = Figure(figsize=(10, 5.4 * height / width + 0.4), layout="constrained")
    top = float(np.iinfo(noisy.dtype).max) if noisy.dtype.kind in "ui" else max(float(noisy.max()), 1e-12)
    for axes, image, caption in zip(figure.subplots(1, 2), (noisy, denoised), captions, strict=True):
        shown = np.clip(np.asarray(image, np.float64) / top, 0, 1)
        axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(caption)
        axes.set_axis_off()
    figure.savefig(path, dpi=150)
