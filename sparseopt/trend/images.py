"""Denoise and complete an array of pixels or voxels; its type and range are kept."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparseopt.core.base.mesh import Devices
from sparseopt.core.base.types import Observer
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.groups import GroupL2
from sparseopt.core.select import select
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.noise import noise_level
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.paths.path import trend_path

# The relative gap of the fits by which a weight is chosen, and how many weights are tried at most: far more than the
# usual three or four. On four photographs smaller gaps and weights chose no better ones.
CHOICE_TOL, MOST_WEIGHTS = 1e-3, 20


@dataclasses.dataclass(frozen=True)
class Denoised:
    """A denoised image."""

    image: np.ndarray  # of the shape and dtype of the input; integers are rounded and clipped to their range
    solution: TrendSolution  # of the trend filter, in the input's units
    weight: float  # of the penalty: the given or the chosen one
    noise: float  # the `noise_level` of the input, of order 1 or higher; NaN if it is too small, and on several devices
    isotropic: bool  # of the fit, as `couple`
    couple: bool


def denoise(
    image: Any,
    weight: float | None = None,
    order: int = 0,
    *,
    isotropic: bool | None = None,
    couple: bool | None = None,
    alpha: bool | None = None,
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
    observer: Observer | None = None,
) -> Denoised:
    """Fit a trend to every channel of an image or a volume on its grid, and fill in unknown pixels.

    Args:
        image: `[height, width]` or `[height, width, channels]`, of integers of 8, 16 or 32 bits or floats. With
            `volume` `[depth, height, width]` or the same with channels.
        weight: of the penalty, in the image's units (grey levels); None chooses the one with the smallest estimated
            error: weights that differ by factors of 2, from the noise level on, are tried until one is better than its
            neighbours by `sure`; the weight is the minimum of the parabola through these three over the logarithm.
        order: 0 for flat patches with sharp edges, 1 for slopes.
        isotropic: at order 0, penalise the length of the gradient (`GroupL2` with axis 0) instead of its entries, so
            that edges in all directions cost the same. None does so for three colours, without or with alpha.
        couple: let the channels of a pixel change together (`GroupL2`) instead of separately (`L1`). None does so at
            order 0 for three colours, without or with alpha.
        alpha: whether the last channel of an image is its opacity, which is kept unchanged. None says so of the last
            of 4 channels, and of the last of 2 if it holds unsigned integers or lies within 0 to 1: two components of
            a field are two channels.
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
        observer: called with "weight", how many weights were tried, and how many there will be as far as is known, the
            fit at the chosen one included; that may become more.

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
    for name, choice in (("isotropic", isotropic), ("couple", couple), ("alpha", alpha)):
        if choice not in (None, True, False):
            raise ValueError(f"{name} is True, False or None, given {choice!r}")
    shape, has_channels = given.shape[:axes], given.ndim > axes
    if alpha is None and not volume:
        last, count = given[..., -1], given.shape[-1] if has_channels else 1
        alpha = count == 4 or (count == 2 and (given.dtype.kind == "u" or bool(np.all((last >= 0) & (last <= 1)))))
    has_alpha = bool(alpha)
    if has_alpha and (volume or not has_channels or given.shape[-1] < 2):
        raise ValueError(
            f"alpha needs an image [height, width, channels] of two channels or more, no volume; given {given.shape}"
        )
    colours = given[..., :-1] if has_alpha else given
    grid = Graph.grid(shape, spacing, ends)
    if grid.spacing is not None:  # with 1 for the shortest, a weight keeps its meaning
        grid = Graph.grid(shape, [h / min(grid.spacing) for h in grid.spacing], ends)
    coloured = has_channels and colours.shape[-1] == 3 and order == 0
    isotropic = coloured if isotropic is None else isotropic
    coupled = has_channels and (coloured if couple is None else couple)
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
    # Differences of neighbours hold much of what is in an image, those of order 1 little.
    noise = math.nan
    if devices is None:
        noise = noise_level(colours, grid, max(order, 1), mask, missing=missing)
    if weight is None:
        if devices is not None:
            raise ValueError("a weight is chosen on one device: give weight, or leave out devices")
        weight = _of_least_risk(colours, grid, template, order, noise, options, observer)
        # By the program with which the weight was chosen.
        solution = trend_path(colours, grid, template, order, weights=[weight], **options).at(0)
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
    return Denoised(fitted, solution, float(weight), noise, bool(isotropic), bool(coupled))


def _of_least_risk(
    y: np.ndarray,
    grid: Graph,
    template: Any,
    order: int,
    noise: float,
    options: dict[str, Any],
    observer: Observer | None,
) -> float:
    """The weight of the least unbiased estimate of risk, between weights that differ by factors of 2."""
    if not noise > 0:
        raise ValueError(f"no weight can be chosen: the noise level of the image is {noise:g}; give weight")
    options = options | {"tol": max(options["tol"], CHOICE_TOL)}
    risks, best = dict[int, float](), 0  # by the powers of 2
    while len(risks) < MOST_WEIGHTS:
        near = [power for power in (best, best - 1, best + 1) if power not in risks]
        if not near:
            break
        if observer is not None:
            observer("weight", len(risks), len(risks) + len(near) + 1)
        path = trend_path(y, grid, template, order, weights=[noise * 2.0 ** near[0]], **options)
        risks[near[0]] = float(select(path, "sure", noise).curve[0])
        best = min(risks, key=lambda power: risks[power])
    if observer is not None:
        observer("weight", len(risks), len(risks) + 1)
    low, middle, high = (risks.get(best + move, np.inf) for move in (-1, 0, 1))
    bend = low - 2 * middle + high
    move = (low - high) / (2 * bend) if 0 < bend < np.inf else 0.0
    return float(noise * 2.0 ** (best + move))


def psnr(image: np.ndarray, reference: np.ndarray, peak: float = 255.0) -> float:
    """`10 log10(peak² / mean squared difference)` in decibels."""
    apart = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    return float(10 * np.log10(peak**2 / np.mean(apart**2)))
