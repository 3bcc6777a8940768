"""Trend filtering on graphs: signals whose differences along the edges are mostly zero.

`so.trend_filter` fits one signal, `so.trend_solver` makes a pure function for many; this module exports the rest:
paths of weights and the choice among them, images, concave penalties, the jumps of a series and the regions of a
graph, and the methods with their settings.
"""

from typing import Any

from sparseopt.trend.base.noise import noise_level, unlike_channels
from sparseopt.trend.base.pieces import TrendSolution, degrees_of_freedom
from sparseopt.trend.filter import chosen_method, trend_filter
from sparseopt.trend.images import denoise
from sparseopt.trend.methods.choice import FAST_ADMM, Admm, Doge, DogeGroups, FusedLasso, Interior
from sparseopt.trend.paths.choose_weight import choose_weight
from sparseopt.trend.paths.largest_weight import largest_weight
from sparseopt.trend.paths.path import TrendPath, trend_path
from sparseopt.trend.regions import Regions, regions
from sparseopt.trend.reweighting import reweighted
from sparseopt.trend.segments.find import Jumps, jumps
from sparseopt.trend.segments.inference import Thinning
from sparseopt.trend.solver import TrendSolver, trend_solver

__all__ = [
    "Admm",
    "Doge",
    "DogeGroups",
    "FusedLasso",
    "Interior",
    "Jumps",
    "Regions",
    "Thinning",
    "TrendPath",
    "TrendSolution",
    "TrendSolver",
    "choose_weight",
    "chosen_method",
    "degrees_of_freedom",
    "denoise",
    "jumps",
    "largest_weight",
    "noise_level",
    "regions",
    "reweighted",
    "trend_filter",
    "trend_path",
    "trend_solver",
    "unlike_channels",
]


# Names that have ended, and what to use instead.
_ENDED = {
    "FastAdmm": FAST_ADMM,
    "select": "use so.select(path, criterion)",
    "cross_validate": "use so.cross_validate(so.trend.trend_path(y, graph))",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _ENDED:
        raise AttributeError(f"sparseopt.trend.{name} has ended: {_ENDED[name]}")
    raise AttributeError(f"module 'sparseopt.trend' has no attribute {name!r}; it has {', '.join(__all__)}")
