"""The optimisation core, `minimise loss(x) + penalty(K x)`: its problems, their solvers, and paths of levels.

`so.solve`, the losses and the penalties are names of `sparseopt`; this module exports the protocols that your own loss,
penalty, operator or solver implements.
"""

from sparseopt.core.losses.scalar import ScalarLoss
from sparseopt.core.operators.maps import LinearMap
from sparseopt.core.path import Path, largest_level
from sparseopt.core.penalties.protocols import Composite, Conjugate, IterativeProx, Norm, Penalty
from sparseopt.core.problem.problem import Measure, Solver

__all__ = [
    "Composite",
    "Conjugate",
    "IterativeProx",
    "LinearMap",
    "Measure",
    "Norm",
    "Path",
    "Penalty",
    "ScalarLoss",
    "Solver",
    "largest_level",
]


def __dir__() -> list[str]:
    return sorted(__all__)
