"""sparseopt: sparse optimisation in JAX.

One problem, `minimise loss(x) + penalty(K x)`, one family of penalties, one `solve`, and two
front-ends: l0 pruning of language models (`sparseopt.pruning`) and trend filtering on graphs.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

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
from sparseopt.core.penalties.entries import L0, L1, MCP, SCAD, ElasticNet, LogSum
from sparseopt.core.penalties.groups import GroupL2, NuclearNorm, SparseGroup
from sparseopt.core.penalties.patterns import NM, BlockTopK, GroupTopK, RowTopK, TopK
from sparseopt.core.penalties.protocols import Conjugate, Penalty
from sparseopt.core.penalties.sets import Box, Nonnegative, Simplex, Support
from sparseopt.core.penalties.sums import lift
from sparseopt.core.problem.problem import Measure, Problem, Solution, Solver, Status
from sparseopt.core.proximal import proximal, proximal_adam
from sparseopt.core.solve import chosen_solver, solve
from sparseopt.core.solvers.accelerated import AcceleratedProximalGradient
from sparseopt.core.solvers.aiht import Maiht
from sparseopt.core.solvers.primal_dual import PrimalDual, SplitAdmm
from sparseopt.core.solvers.proximal_gradient import ProximalGradient
from sparseopt.core.solvers.refit import Refit
from sparseopt.system.programs import keep_programs
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.freedom import degrees_of_freedom
from sparseopt.trend.graph import Graph
from sparseopt.trend.largest_weight import largest_weight
from sparseopt.trend.path import TrendPath, trend_path
from sparseopt.trend.reweighting import reweighted_trend_filter
from sparseopt.trend.selection import cross_validate, select
from sparseopt.trend.signal import noise_level
from sparseopt.trend.solver import TrendSolver, trend_solver
from sparseopt.trend.total_variation import TotalVariation

if TYPE_CHECKING:
    from sparseopt import models, pruning
    from sparseopt.trend.estimator import GraphTrendClassifier, GraphTrendFilter

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
    "Conjugate",
    "DataLoss",
    "ElasticNet",
    "Graph",
    "GraphTrendClassifier",
    "GraphTrendFilter",
    "GroupL2",
    "GroupTopK",
    "HuberLoss",
    "LeastSquares",
    "LogSum",
    "LogisticLoss",
    "Maiht",
    "Measure",
    "Nonnegative",
    "NuclearNorm",
    "Penalty",
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
    "Solver",
    "SparseGroup",
    "SplitAdmm",
    "SquaredHingeLoss",
    "Status",
    "Support",
    "TopK",
    "TotalVariation",
    "TrendPath",
    "TrendSolver",
    "chosen_solver",
    "cross_validate",
    "degrees_of_freedom",
    "keep_programs",
    "largest_weight",
    "lift",
    "models",
    "noise_level",
    "proximal",
    "proximal_adam",
    "pruning",
    "pytree",
    "reweighted_trend_filter",
    "scalar",
    "select",
    "solve",
    "static",
    "trend_filter",
    "trend_path",
    "trend_solver",
]


def __getattr__(name: str) -> Any:
    """Load the pruner, the models and the estimators on first use: the core imports neither flax nor sklearn."""
    if name in ("models", "pruning"):
        return importlib.import_module(f"sparseopt.{name}")
    if name in ("GraphTrendClassifier", "GraphTrendFilter"):
        return getattr(importlib.import_module("sparseopt.trend.estimator"), name)
    raise AttributeError(f"module 'sparseopt' has no attribute {name!r}; it has {', '.join(__all__)}")
