"""sparseopt: sparse optimisation in JAX.

One problem, `minimise loss(x) + penalty(K x)`, one family of penalties, one `solve`, and two
front-ends: l0 pruning of language models (`sparseopt.pruning`) and trend filtering on graphs.
"""

from sparseopt.system import early_stop  # noqa: F401

# isort: split
import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sparseopt import core, trend
from sparseopt.core.base.types import pytree, static
from sparseopt.core.losses import scalar
from sparseopt.core.losses.data import (
    AbsoluteLoss,
    DataLoss,
    HuberLoss,
    LeastSquares,
    LogisticLoss,
    PoissonLoss,
    QuantileLoss,
    SquaredHingeLoss,
)
from sparseopt.core.losses.quadratic import Quadratic
from sparseopt.core.path import path
from sparseopt.core.penalties.entries import L0, L1, MCP, SCAD, ElasticNet, LHalf, LogSum
from sparseopt.core.penalties.groups import GroupL2, NuclearNorm, SparseGroup
from sparseopt.core.penalties.patterns import NM, BlockTopK, Grid, GroupTopK, RowTopK, TopK
from sparseopt.core.penalties.sets import Box, Nonnegative, Simplex, Support
from sparseopt.core.problem.problem import Problem, Solution, Status
from sparseopt.core.proximal import proximal, proximal_adam
from sparseopt.core.select import cross_validate, select
from sparseopt.core.solve import chosen_solver, solve
from sparseopt.core.solvers.accelerated import AcceleratedProximalGradient
from sparseopt.core.solvers.maiht import Maiht
from sparseopt.core.solvers.primal_dual import PrimalDual, SplitAdmm
from sparseopt.core.solvers.proximal_gradient import ProximalGradient
from sparseopt.core.solvers.refit import Refit
from sparseopt.core.working_sets.working_set import WorkingSet
from sparseopt.system.programs import keep_programs
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.solver import trend_solver
from sparseopt.trend.total_variation import TotalVariation

if TYPE_CHECKING:
    from sparseopt import models, pruning
    from sparseopt.estimators.graph import GraphTrendClassifier, GraphTrendFilter
    from sparseopt.estimators.regression import (
        SparseClassifier,
        SparseClassifierCV,
        SparseRegressor,
        SparseRegressorCV,
    )

__version__ = version("sparseopt")

__all__ = [
    "L0",
    "L1",
    "MCP",
    "NM",
    "SCAD",
    "AbsoluteLoss",
    "AcceleratedProximalGradient",
    "BlockTopK",
    "Box",
    "DataLoss",
    "ElasticNet",
    "Graph",
    "GraphTrendClassifier",
    "GraphTrendFilter",
    "Grid",
    "GroupL2",
    "GroupTopK",
    "HuberLoss",
    "LHalf",
    "LeastSquares",
    "LogSum",
    "LogisticLoss",
    "Maiht",
    "Nonnegative",
    "NuclearNorm",
    "PoissonLoss",
    "PrimalDual",
    "Problem",
    "ProximalGradient",
    "Quadratic",
    "QuantileLoss",
    "Refit",
    "RowTopK",
    "Simplex",
    "Solution",
    "SparseClassifier",
    "SparseClassifierCV",
    "SparseGroup",
    "SparseRegressor",
    "SparseRegressorCV",
    "SplitAdmm",
    "SquaredHingeLoss",
    "Status",
    "Support",
    "TopK",
    "TotalVariation",
    "WorkingSet",
    "chosen_solver",
    "core",
    "cross_validate",
    "keep_programs",
    "models",
    "path",
    "proximal",
    "proximal_adam",
    "pruning",
    "pytree",
    "scalar",
    "select",
    "solve",
    "static",
    "trend",
    "trend_filter",
    "trend_solver",
]


# The files of `sparseopt.estimators`, which need scikit-learn.
ESTIMATORS = {
    "GraphTrendClassifier": "graph",
    "GraphTrendFilter": "graph",
    "SparseClassifier": "regression",
    "SparseClassifierCV": "regression",
    "SparseRegressor": "regression",
    "SparseRegressorCV": "regression",
}
# Where the public names of 0.2 are.
MOVED = {
    "Composed": "so.DataLoss, or a ready-made loss such as so.LogisticLoss(A, y)",
    "Conjugate": "so.core.Conjugate",
    "Measure": "so.core.Measure",
    "Penalty": "so.core.Penalty",
    "Solver": "so.core.Solver",
    "TrendPath": "so.trend.TrendPath",
    "TrendSolver": "so.trend.TrendSolver",
    "degrees_of_freedom": "so.trend.degrees_of_freedom",
    "largest_weight": "so.trend.largest_weight",
    "lift": "sparseopt.core.penalties.sums.Lifted",
    "noise_level": "so.trend.noise_level",
    "reweighted_trend_filter": "so.trend.reweighted",
    "trend_path": "so.trend.trend_path",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Load the pruner, the models and the estimators on first use: the core imports neither flax nor sklearn."""
    if name in ("models", "pruning"):
        return importlib.import_module(f"sparseopt.{name}")
    if name in ESTIMATORS:
        return getattr(importlib.import_module(f"sparseopt.estimators.{ESTIMATORS[name]}"), name)
    if name in MOVED:
        raise AttributeError(f"sparseopt.{name} is {MOVED[name]} since 0.3")
    raise AttributeError(f"module 'sparseopt' has no attribute {name!r}; it has {', '.join(__all__)}")
