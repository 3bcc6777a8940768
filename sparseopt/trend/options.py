"""Floor 5: how a fit is to run, checked once, for every kind of fit."""

import dataclasses
from typing import Any

import numpy as np

from sparseopt.core.problem import Solution
from sparseopt.trend.checks import is_positive, whole_number
from sparseopt.trend.memory import require_memory

METHODS = ("auto", "doge", "admm", "fast_admm", "interior")
# Of them those for other losses and for sums of penalties.
SPLITTING_METHODS = ("auto", "doge", "admm")
# Steps are counted in int32, and the last check may lie one cadence beyond.
MOST_STEPS = 10**9
# Residual, objective, gap and rho of a step in a history.
STEP_BYTES = 4 * 8


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `trend_filter` that say how to solve, as there; `block` is its B, filled in.

    Raises:
        ValueError: for an unknown method, or a number out of its range.
    """

    method: str
    block: int
    tol: float
    max_steps: int
    warm_start: Solution | None = None
    rho: float | None = None
    relaxation: float = 1.7
    history: bool = False
    cadence: int | None = None

    def __post_init__(self) -> None:
        """Check."""
        checked_method(self.method)
        if self.method == "interior" and (self.warm_start is not None or self.history):
            raise ValueError('method="interior" takes no warm_start and keeps no history; use "doge" or "admm"')
        relaxed = is_positive(self.relaxation) and self.relaxation < 2
        if not (is_positive(self.tol) and (self.rho is None or is_positive(self.rho)) and relaxed):
            raise ValueError(
                "tol and rho must be positive and finite and relaxation in (0, 2), given "
                f"tol={self.tol!r}, rho={self.rho!r}, relaxation={self.relaxation!r}"
            )
        for name in ("max_steps", "cadence"):
            if getattr(self, name) is not None or name == "max_steps":
                # The dataclass is frozen for all others.
                object.__setattr__(self, name, whole_number(name, getattr(self, name), 1, MOST_STEPS))
        if self.history:
            what = f"a history of max_steps={self.max_steps:,} steps"
            require_memory(STEP_BYTES * self.max_steps, what, "lower max_steps")
        _check_warm_start(self.warm_start)

    @property
    def is_cold(self) -> bool:
        """Whether nothing but the fit itself is asked for and given."""
        return self.warm_start is None and not self.history

    def solver_settings(self, method: str, kind: Any) -> dict[str, Any]:
        """Relaxation and cadence as a solver of `core` takes them."""
        cadence = self.cadence or min(usual_cadence(method), self.max_steps)
        return {"relaxation": kind.type(self.relaxation), "cadence": cadence}

    def limit(self, cadence: int) -> int:
        """The step limit, up to the next check."""
        return -(-self.max_steps // cadence) * cadence


def usual_cadence(method: str) -> int:
    """Steps between two checks. A check costs two steps of Doge-ADMM; an exact x-step makes it cheap."""
    return 10 if method == "doge" else 5


def checked_method(method: Any) -> str:
    """The name of a method.

    Raises:
        ValueError: for any other.
    """
    if not (isinstance(method, str) and method in METHODS):
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    return method


def _check_warm_start(start: Any) -> None:
    if start is None:
        return
    if not isinstance(start, Solution):
        raise TypeError(f"warm_start is a Solution of trend_filter, given {type(start).__name__}")
    if not np.all(np.isfinite(np.asarray(start.value))):
        raise ValueError("warm_start holds values that are not finite; start without it")
