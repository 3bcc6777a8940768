"""The interface of the solvers of the trend-filter problem. To add one, see `Solver`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from trend_problems import TrendProblem

# The factors of larger problems do not fit in memory.
LARGEST_FACTORED = 300_000


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer of a solver.

    Attributes:
        fit: `[n]`, or in the shape of the grid.
        lower: a lower bound of the objective, if the solver has one.
        details: numbers for the record.
    """

    fit: np.ndarray
    lower: float | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


class Solver(Protocol):
    """One solver."""

    @property
    def name(self) -> str:
        """In records."""
        ...

    @property
    def package(self) -> str:
        """Its distribution."""
        ...

    @property
    def module(self) -> str:
        """The module to import."""
        ...

    @property
    def compiles(self) -> bool:
        """Whether the first call compiles, which is timed separately."""
        ...

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Which values of `problem.isotropic` it takes."""
        ...

    def can(self, problem: TrendProblem) -> bool:
        """Whether it solves this problem, if it is of one of its kinds."""
        ...

    def ladder(self, problem: TrendProblem) -> Sequence[Any]:
        """Settings from coarse to fine."""
        ...

    def solve(self, problem: TrendProblem, rung: Any) -> Callable[[], Answer]:
        """Prepare the data for the library. The returned call is timed, from a cold start."""
        ...


def powers(first: int, last: int, per_decade: int = 1) -> list[float]:
    """`10^first ... 10^last`, decreasing."""
    return [float(f"{value:.1e}") for value in np.logspace(first, last, (first - last) * per_decade + 1)]


def doubled(first: int, last: int) -> list[int]:
    """`first`, twice that, and so on up to `last`."""
    return [count for power in range(32) if (count := first << power) <= last]
