"""Floor 5: how a fit is to run, checked once, for every kind of fit."""

import dataclasses
from typing import Any

from sparseopt.core.solve import Solution

METHODS = ("auto", "doge", "admm", "fast_admm", "interior")
# Of them those for other losses and for sums of penalties.
SPLITTING_METHODS = ("auto", "doge", "admm")


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
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; known are {', '.join(METHODS)}")
        if self.method == "interior" and (self.warm_start is not None or self.history):
            raise ValueError('method="interior" takes no warm_start and keeps no history; use "doge" or "admm"')
        numbers = {"tol": self.tol, "rho": self.rho, "cadence": self.cadence, "max_steps": self.max_steps}
        positive = all(value is None or value > 0 for value in numbers.values())
        if not (positive and 0 < self.relaxation < 2):
            given = ", ".join(f"{name}={value}" for name, value in (numbers | {"relaxation": self.relaxation}).items())
            raise ValueError(
                f"tol, rho, cadence and max_steps must be positive and relaxation in (0, 2), given {given}"
            )

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
