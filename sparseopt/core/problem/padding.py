"""Problems of many sizes as problems of few, so that they share compiled programs.

A matrix gets rows and columns of zeros; the entries of x that multiply these columns start at 0 and stay there. This is
done only if each class says that it changes nothing but the rounding of sums: the loss with a method `pad`, the penalty
with `keeps_zeros = True`, the solver with `ignores_zeros = True`; and only for known arrays on the default device: a
tracer belongs to a program that is compiled for its shapes anyway.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from sparseopt.core.base.types import is_traced
from sparseopt.core.problem.problem import Problem, Solution

# Sizes are rounded up to a geometric sequence: with the first ratio for matrices of up to FEW entries, whose products
# take less time than the rest of an iteration, else with the second. From MANY entries on the copies and the longer
# products would cost too much.
COARSE, FINE = 1.25, 1.0625
FEW, MANY = 2**14, 2**16


def round_up(size: int, ratio: float) -> int:
    """The next member of a sequence of integers that grow by at most `ratio`, or by 1."""
    member = 1
    while member < size:
        member = max(member + 1, int(member * ratio))
    return member


def pad_problem(problem: Problem, solver: Any, start: Any) -> tuple[Problem, Any] | None:
    """The problem and its start with zeros appended, or None if nothing is or may be appended."""
    loss, penalty = problem.loss, problem.penalty
    say = ((loss, "pad"), (penalty, "keeps_zeros"), (solver, "ignores_zeros"))
    if problem.operator is not None or not all(getattr(part, name, False) for part, name in say):
        return None
    if np.ndim(start) != 1 or np.ndim(loss.target) != 1:
        return None
    leaves = jax.tree.leaves((problem, solver, start))
    if is_traced(leaves) or not _are_here(leaves):
        return None
    rows, columns = np.size(loss.target), np.size(start)
    if rows * columns > MANY:
        return None
    ratio = COARSE if rows * columns <= FEW else FINE
    more_rows, more_columns = (round_up(size, ratio) - size for size in (rows, columns))
    # Different lengths distinguish arrays on the rows from arrays on the columns.
    more_rows += rows != columns and rows + more_rows == columns + more_columns
    if not (more_rows or more_columns) or (loss := loss.pad(more_rows, more_columns)) is None:
        return None

    def longer(leaf: Any) -> Any:
        """A parameter, one number or one per entry."""
        return np.append(leaf, np.repeat(leaf[-1:], more_columns)) if np.shape(leaf) == (columns,) else leaf

    return Problem(loss, jax.tree.map(longer, penalty)), np.pad(np.asarray(start), (0, more_columns))


def _are_here(leaves: list[Any]) -> bool:
    """Whether all are numbers, arrays of NumPy, or arrays on the default device."""
    here = {getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0]}
    rest = (leaf for leaf in leaves if not isinstance(leaf, np.ndarray | np.generic | int | float))
    return all(isinstance(leaf, jax.Array) and leaf.devices() == here for leaf in rest)


def cut(found: Solution, problem: Problem, padded: Problem, start: Any) -> Solution:
    """A solution of a padded problem as one of the problem."""
    lengths = {np.shape(padded.loss.target): np.size(problem.loss.target)}
    lengths[np.shape(found.value)] = np.size(start)
    leaves, tree = jax.tree.flatten((found.value, found.dual, found.state))
    long = {place: leaf for place, leaf in enumerate(leaves) if leaf.shape in lengths}
    # With NumPy, since a slice in JAX is a program for every length.
    short = jax.device_put([np.asarray(leaf)[: lengths[leaf.shape]] for leaf in long.values()])
    for place, leaf in zip(long, short, strict=True):
        leaves[place] = leaf
    value, dual, state = jax.tree.unflatten(tree, leaves)
    return dataclasses.replace(found, value=value, dual=dual, state=state)
