"""What a method of the trend filter says about itself, and its settings."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

from sparseopt.core.base.arguments import is_positive, whole_number

# Steps are counted in int32, and the last check may be one cadence later.
MOST_STEPS = 10**9


@runtime_checkable
class Method(Protocol):
    """A method with its settings."""

    name: str  # for callers
    single: bool = False  # whether it accepts only one penalty, and the square loss
    one_metric: bool = False  # whether its x-step may need one metric for all nodes
    over_devices: bool = False  # whether it works over several devices
    cold: bool = False  # whether it has no use for a start
    short_from: float = math.inf  # from this many nodes on a signal in float64 is first solved in float32
    merges: bool = False  # whether a path of exact fits at order 0 may replace it
    balances_rho: bool = False  # whether it computes rho again at every level of a path, from the start
    keeps_rho_from: int = 0  # from this order on it keeps the rho of the previous level of a path, for a norm

    def refuses(self, asked: Any) -> str | None:
        """Why it cannot do a request, and what to do; None if it can. It does not look at the values of the signal."""
        if self.single and not asked.square:
            return f"method={self.name!r} solves the square loss only; with loss={asked.loss} use auto, doge, admm"
        if self.single and asked.several:
            return f"method={self.name!r} solves single orders; with several penalties use auto, doge, admm"
        return asked.geometry.refuses_method(asked, self)

    def plan(self, asked: Any) -> Any:
        """The host work for a request: a pytree, cached for similar ones; a plain object for a method on the host."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of every splitting method.

    Args:
        rho: the first ADMM parameter; None chooses it from the data.
        relaxation: over-relaxation in (0, 2).
        cadence: steps between two checks; None uses 10 for Doge, above 10,000 nodes 20, and 5 for other methods. A
            start that is the fit itself is checked after one step.
    """

    rho: float | None = None
    relaxation: float = 1.7
    cadence: int | None = None

    def __post_init__(self) -> None:
        relaxed = is_positive(self.relaxation) and self.relaxation < 2
        if not (relaxed and (self.rho is None or is_positive(self.rho))):
            raise ValueError(
                f"rho must be positive and finite and relaxation in (0, 2), given rho={self.rho!r}, "
                f"relaxation={self.relaxation!r}"
            )
        if self.cadence is not None:
            object.__setattr__(self, "cadence", whole_number("cadence", self.cadence, 1, MOST_STEPS))


DEFAULTS = Settings()
