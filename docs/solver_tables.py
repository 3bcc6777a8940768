"""The table of problems that each public solver accepts, from its `refuses` on typical problems."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparseopt as so

CHOSEN, TAKEN = "**chosen**", "yes"


@so.pytree
class OwnLoss:
    """A loss with a value and a gradient and nothing else."""

    target: Any

    def value(self, x: jax.Array) -> jax.Array:
        """`||x - target||² / 2`."""
        return jnp.sum((x - self.target) ** 2) / 2

    def gradient(self, x: jax.Array) -> jax.Array:
        """`x - target`."""
        return x - self.target


def solvers() -> list[Any]:
    """Every public solver with a `refuses`, with default settings."""
    names = [getattr(so, name) for name in so.__all__]
    return [made() for made in names if isinstance(made, type) and hasattr(made, "refuses") and hasattr(made, "step")]


def problems() -> dict[str, so.Problem]:
    """One problem of every kind, by label."""
    matrix, target, labels = np.ones((4, 3), np.float32), np.ones(4, np.float32), np.ones(4, np.float32)
    quadratic = so.Quadratic(np.eye(3, dtype=np.float32), np.ones(3, np.float32))
    squares = so.LeastSquares(matrix, target)
    logistic = so.LogisticLoss(matrix, labels)
    quantile = so.DataLoss(so.scalar.Quantile(0.9), matrix, target)
    own, differences = OwnLoss(np.ones(3, np.float32)), so.Graph.chain(3).matrix(1)
    many = so.LeastSquares(None, np.ones(4000, np.float32))
    return {
        "`LeastSquares`, convex penalty": so.Problem(squares, so.L1(1.0)),
        "`LeastSquares`, other penalty": so.Problem(squares, so.MCP(1.0)),
        "other losses of data, smooth, such as logistic": so.Problem(logistic, so.L1(1.0)),
        "other losses of data, with kinks, such as quantiles": so.Problem(quantile, so.L1(1.0)),
        "`Quadratic`, convex penalty": so.Problem(quadratic, so.L1(1.0)),
        "`Quadratic`, other penalty": so.Problem(quadratic, so.L0(1.0)),
        "`Quadratic`, fixed support": so.Problem(quadratic, so.Support(np.ones(3, bool))),
        "own loss: `value`, `gradient`": so.Problem(own, so.L1(1.0)),
        "`LeastSquares`, operator": so.Problem(squares, so.L1(1.0), differences),
        "`LeastSquares`, operator, 4,000 unknowns": so.Problem(many, so.L1(1.0), so.Graph.chain(4000).matrix(1)),
        "other losses of data, operator": so.Problem(quantile, so.L1(1.0), differences),
        "`Quadratic`, operator": so.Problem(quadratic, so.L1(1.0), differences),
        "own loss, operator": so.Problem(own, so.L1(1.0), differences),
    }


def page() -> str:
    """MyST text: one row per problem, one column per solver, and the reasons by number below."""
    asked = solvers()
    reasons: dict[str, int] = {}
    rows = [
        "| problem | " + " | ".join(f"`{type(solver).__name__}`" for solver in asked) + " |",
        "|---" * (len(asked) + 1) + "|",
    ]
    for words, problem in problems().items():
        refused = [solver.refuses(problem) for solver in asked]
        # If all refuse there is no choice.
        chosen = None if all(refused) else type(so.chosen_solver(problem).solver)
        cells = []
        for solver, reason in zip(asked, refused, strict=True):
            if reason is None:
                cells.append(CHOSEN if type(solver) is chosen else TAKEN)
            else:
                number = reasons.setdefault(_need(solver, reason), len(reasons) + 1)
                cells.append(f"[{number}]")
        rows.append(f"| {words} | " + " | ".join(cells) + " |")
    listed = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(rows) + "\n\n" + "\n".join(listed) + "\n"


def _need(solver: Any, reason: str) -> str:
    """The requirement in a refusal, without the solver's name and the given value, which differ from row to row."""
    need = reason.removeprefix(f"{type(solver).__name__} ").partition(", given ")[0]
    return f"{need[0].upper()}{need[1:]}."
