"""What all estimators share: tags, the warning of a fit that did not converge, and how it ended for a notebook.

A fit has the attribute `solution_`, a `Solution` or, for several classes, a list of them.
"""

import warnings
from typing import Any

from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning

from sparseopt.core.problem.problem import Solution, Status


class Fitted(BaseEstimator):
    """A base class of estimators."""

    solution_: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        loss = getattr(self, "loss", None)
        tags.target_tags.positive_only = loss == "poisson" or getattr(loss, "counts", False) is True
        return tags

    def warn_unless_converged(self, found: Solution, depth: int) -> None:
        """A warning that points `depth` calls up, to the caller of `fit`; a RuntimeError for an overflow."""
        status = Status(int(found.status))
        if status is Status.NONFINITE:
            found.check()
        if not Status.reached(status):
            warnings.warn(
                f"{type(self).__name__} stopped ({status.name}) after {int(found.steps)} steps with residual "
                f"{float(found.residual):.3g}: {status.advice}",
                ConvergenceWarning,
                stacklevel=depth + 1,
            )

    @property
    def _repr_html_(self) -> Any:
        # scikit-learn has no such attribute if it is asked for text, and a function otherwise.
        shown = super()._repr_html_
        return lambda: shown() + self._html_of_fit()

    def _repr_mimebundle_(self, **options: Any) -> dict[str, str]:
        found = super()._repr_mimebundle_(**options)
        return found | {kind: text + self._html_of_fit() for kind, text in found.items() if kind == "text/html"}

    def _html_of_fit(self) -> str:
        found = getattr(self, "solution_", [])
        return "".join(one._repr_html_() for one in (found if isinstance(found, list) else [found]))
