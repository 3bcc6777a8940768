"""Peers that solve the isotropic total variation of pictures."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from trend_problems import TrendProblem
from trend_solver import Answer, doubled


@dataclasses.dataclass(frozen=True)
class ScikitImage:
    """Isotropic total variation of pictures and volumes; the rung is the number of iterations."""

    method: str
    package: str = "scikit-image"
    module: str = "skimage"
    compiles: bool = False
    kinds: tuple[bool, ...] = (True,)

    @property
    def name(self) -> str:
        """With the name of the method."""
        return f"scikit-image {self.method}"

    def can(self, problem: TrendProblem) -> bool:
        """Split Bregman takes pictures."""
        return problem.shape is not None and (self.method == "Chambolle" or len(problem.shape) == 2)

    def ladder(self, problem: TrendProblem) -> Sequence[int]:
        """Doubling."""
        del problem
        return doubled(8, 16384 if self.method == "Chambolle" else 512)

    def solve(self, problem: TrendProblem, rung: int) -> Callable[[], Answer]:
        """Its own stop never acts."""
        from skimage import restoration

        assert problem.shape is not None
        field, weight = problem.y.reshape(problem.shape), problem.weight
        if self.method == "Chambolle":
            options: dict[str, Any] = {"eps": 0, "max_num_iter": rung}
            return lambda: Answer(restoration.denoise_tv_chambolle(field, weight, **options))
        options = {"eps": 1e-30, "max_num_iter": rung, "isotropic": True}
        return lambda: Answer(restoration.denoise_tv_bregman(field, 1 / weight, **options))


@dataclasses.dataclass(frozen=True)
class Pyunlocbox:
    """Isotropic total variation of pictures, by FISTA on the dual; the rung is the number of iterations."""

    name: str = "pyunlocbox"
    package: str = "pyunlocbox"
    module: str = "pyunlocbox"
    compiles: bool = False
    kinds: tuple[bool, ...] = (True,)

    def can(self, problem: TrendProblem) -> bool:
        """Its norm takes two axes."""
        return problem.shape is not None and len(problem.shape) == 2

    def ladder(self, problem: TrendProblem) -> Sequence[int]:
        """Doubling."""
        del problem
        return doubled(8, 4096)

    def solve(self, problem: TrendProblem, rung: int) -> Callable[[], Answer]:
        """Its own stop never acts."""
        from pyunlocbox import functions

        assert problem.shape is not None
        field = problem.y.reshape(problem.shape)
        norm = functions.norm_tv(maxit=rung, tol=0, dim=2, verbosity="NONE")
        return lambda: Answer(norm.prox(field.copy(), problem.weight))
