"""Denoise and complete an array of pixels or voxels; its type and range are kept."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparseopt.core.base.mesh import Devices
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.groups import GroupL2
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.base.signal import noise_level
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.paths.path import trend_path
from sparseopt.trend.paths.selection import Selection, select

# Weights over the noise level, among which one is chosen, and how often the range is moved if the best is at its end.
HIGHEST, RATIO, LEVELS, MOVES = 4.0, 2.0**-0.5, 11, 4


@dataclasses.dataclass(frozen=True)
class Denoised:
    """A denoised image."""

    image: np.ndarray  # of the shape and dtype of the input; integers are rounded and clipped to their range
    solution: TrendSolution  # of the trend filter, in the input's units
    weight: float  # of the penalty: the given or the chosen one


def denoise(
    image: Any,
    weight: float | None = None,
    order: int = 0,
    *,
    isotropic: bool = False,
    couple: bool = False,
    volume: bool = False,
    spacing: Sequence[float] | None = None,
    ends: str = "graph",
    known: Any = None,
    missing: str = "error",
    method: str = "auto",
    tol: float = 1e-4,
    max_steps: int = 20_000,
    dtype: Any = None,
    devices: Devices = None,
) -> Denoised:
    """Fit a trend to every channel of an image or a volume on its grid, and fill in unknown pixels.

    Args:
        image: `[height, width]` or `[height, width, channels]`, of integers of 8, 16 or 32 bits or floats; an alpha
            channel (the last of 2 or 4) is kept unchanged. With `volume` `[depth, height, width]` or the same with
            channels.
        weight: of the penalty, in the image's units (grey levels); None takes that of the least `sure`, among eleven
            about the noise level that are spaced by a factor of `2^(1/2)`.
        order: 0 for flat patches with sharp edges, 1 for slopes.
        isotropic: at order 0, penalise the length of the gradient (`GroupL2` with axis 0) instead of its entries, so
            that edges in all directions cost the same.
        couple: let the channels of a pixel change together (`GroupL2`) instead of separately (`L1`).
        volume: whether the image has three axes besides channels.
        spacing: the distance of neighbours along each axis; only its ratios matter. None for equal ones.
        ends: as in `Graph.grid`; "free" leaves slopes unchanged at order 1, even at the borders.
        known: booleans `[height, width]` (a volume's `[depth, height, width]`): False where a pixel is unknown; the fit
            fills it in. None for all.
        missing: "nan" fills in NaN pixels too; "error" raises.
        method: as in `trend_filter`.
        tol: relative duality gap; 1e-4 is below one grey level.
        max_steps: step limit.
        dtype: of the computation; None uses float32, or float64 for integers of 32 bits, with free ends from order 1
            on, and if pixels are unknown, since rounding would hide their part of the gap.
        devices: as in `trend_filter`; not without a weight.

    Raises:
        ValueError: for invalid arguments, and for an image without noise if no weight is given.

    Example:
        >>> from sparseopt.trend.images import denoise
        >>> steps = np.repeat([[40.0, 200.0]], 8, axis=0).repeat(8, axis=1)
        >>> noisy = steps + 5 * np.random.default_rng(0).standard_normal(steps.shape)
        >>> bool(np.abs(denoise(noisy, isotropic=True).image - steps).mean() < 0.5 * np.abs(noisy - steps).mean())
        True
    """
    given = np.asarray(image)
    axes, names = (3, "depth, height, width") if volume else (2, "height, width")
    whole_numbers = given.dtype.kind in "ui"
    held = given.dtype.kind == "f" or (whole_numbers and given.dtype.itemsize <= 4)
    if given.ndim not in (axes, axes + 1) or not held or min(given.shape) < 1:
        raise ValueError(
            f"{'a volume' if volume else 'an image'} has the shape [{names}] or [{names}, channels] and holds floats "
            f"or integers of 8, 16 or 32 bits, given {given.shape} of {given.dtype}"
        )
    if not (weight is None or np.ndim(weight) == 0):
        raise ValueError(f"weight is one number, given an array of shape {np.shape(weight)}")
    shape, has_channels = given.shape[:axes], given.ndim > axes
    has_alpha = has_channels and not volume and given.shape[-1] in (2, 4)
    colours = given[..., :-1] if has_alpha else given
    grid = Graph.grid(shape, spacing, ends)
    if grid.spacing is not None:  # with 1 for the shortest, a weight keeps its meaning
        grid = Graph.grid(shape, [h / min(grid.spacing) for h in grid.spacing], ends)
    coupled = couple and has_channels
    axis = (0, -1) if coupled else 0
    template: Any = GroupL2(1.0, axis) if isotropic else GroupL2(1.0) if coupled else L1(1.0)
    mask = None if known is None else np.asarray(known)
    if mask is not None and (mask.shape != shape or mask.dtype.kind != "b"):
        raise ValueError(
            f"known says for each of {shape} pixels whether it is known, as booleans; given {mask.dtype} of shape "
            f"{mask.shape}"
        )
    if dtype is None:
        whole = mask is None and not (missing == "nan" and np.isnan(colours).any())
        narrow = not whole_numbers or given.dtype.itemsize <= 2
        dtype = np.float32 if whole and narrow and not (grid.free and order) else np.float64
    options: dict[str, Any] = {"node_weights": mask, "missing": missing, "tol": tol, "max_steps": max_steps}
    options |= {"method": method, "dtype": dtype}
    if weight is None:
        if devices is not None:
            raise ValueError("a weight is chosen on one device: give weight, or leave out devices")
        chosen = _of_least_risk(colours, grid, template, order, options)
        weight, solution = chosen.weight, chosen.path.at(chosen.index)
    else:
        penalty = dataclasses.replace(template, weight=weight)
        solution = trend_filter(colours, grid, penalty, order, devices=devices, **options)
    fitted = np.asarray(solution.value)
    if whole_numbers:
        limits = np.iinfo(given.dtype)
        fitted = np.clip(np.rint(fitted.astype(np.float64)), limits.min, limits.max)
    fitted = fitted.astype(given.dtype)
    if has_alpha:
        fitted = np.concatenate([fitted, given[..., -1:]], axis=-1)
    return Denoised(fitted, solution, float(weight))


def _of_least_risk(y: np.ndarray, grid: Graph, template: Any, order: int, options: dict[str, Any]) -> Selection:
    """The fit of the least unbiased estimate of risk among weights about the noise level."""
    # Differences of neighbours hold much of what is in a picture, those of order 1 little.
    noise = noise_level(y, grid, max(order, 1), options["node_weights"], missing=options["missing"])
    if not noise > 0:
        raise ValueError(f"no weight can be chosen: the noise level of the picture is {noise:g}; give weight")
    top = HIGHEST * noise
    for _ in range(MOVES):
        path = trend_path(y, grid, template, order, weights=top * RATIO ** np.arange(LEVELS), **options)
        chosen = select(path, "sure", noise)
        if 0 < chosen.index < LEVELS - 1:
            break
        top *= RATIO ** (LEVELS - 2 if chosen.index else 2 - LEVELS)
    return chosen


def psnr(image: np.ndarray, reference: np.ndarray, peak: float = 255.0) -> float:
    """`10 log10(peak² / mean squared difference)` in decibels."""
    apart = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    return float(10 * np.log10(peak**2 / np.mean(apart**2)))
