"""The choice of the weight of a trend filter by one rule, with as many paths as it takes."""

import warnings
from typing import Any

import numpy as np

from sparseopt.core.base.arguments import unknown
from sparseopt.core.losses.residuals import Huber, Squared
from sparseopt.core.losses.scalar import ScalarLoss, check_scalar_loss
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.groups import GroupL2
from sparseopt.core.select import CRITERIA, CrossValidation, Selection, cross_validate, select
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.noise import unlike_channels
from sparseopt.trend.filter import first_part, trend_filter
from sparseopt.trend.paths.path import TrendPath, fits_odds, refuses_criterion, template_of, trend_path

# The rules of `choose_weight`.
WEIGHT_RULES = (*CRITERIA, "cv")
# If the last level of a path is the best, as for a long series at order 1, a path of LEVELS weights follows, down to
# RATIO times that weight.
LEVELS, RATIO, MOST_PATHS = 50, 1e-3, 4
# Weights that are chosen beside covariates and a season: a third changes little.
ROUNDS = 2


def choose_weight(
    y: Any,
    graph: Graph,
    penalty: Any = L1,
    order: int = 0,
    rule: str | None = None,
    *,
    folds: Any = 5,
    seed: int = 0,
    missing: str = "error",
    covariates: Any = None,
    season: int | None = None,
    **options: Any,
) -> Selection[TrendPath] | CrossValidation[TrendPath]:
    """Choose a weight by a rule, with as many paths as the rule needs.

    The `rule` is "cv" for `so.cross_validate`, or a criterion of `so.select`: "gcv", "sure", "aic", "bic". None is the
    rule that did well in our benchmarks: "gcv" for the square and for counts with `L1` or `GroupL2`, and "cv" for
    labels, losses of outliers and other penalties. If the best weight is the smallest of a path, another path begins
    there. The other arguments are as in `trend_path`; `folds` and `seed` are those of `so.cross_validate`. The result
    has the `weight`, the fit `value` and the last `path`.

    With `covariates` or a `season`, as `trend_filter` has them, what they explain is taken from the signal: first by
    least squares of its differences, then as `trend_filter` fits it with the weight chosen so far, twice. `value` and
    `path` are those of the trend. The rules count its freedom alone, and need the square or Huber's loss.

    Raises:
        ValueError: before any work also for a rule that does not suit the loss.

    Warns:
        UserWarning: if one weight does not suit all channels, see `unlike_channels`.

    Example:
        >>> clean = np.repeat([0.0, 5.0, 2.0], 40)
        >>> y = clean + np.random.default_rng(0).standard_normal(120)
        >>> chosen = so.trend.choose_weight(y, so.Graph.chain(120))
        >>> (chosen.criterion, bool(np.mean((chosen.value - clean) ** 2) < 0.2))
        ('gcv', True)
    """
    chosen: Selection[TrendPath] | CrossValidation[TrendPath]
    loss = check_scalar_loss(options.get("loss", "square"))
    rule = weight_rule(rule, loss, penalty)
    if covariates is not None or season is not None:
        if not isinstance(loss, Squared | Huber):
            raise ValueError(f"no rule chooses a weight beside covariates or a season for {loss}: give a number")
        fitted: Any = {"node_weights": options.get("node_weights"), "missing": missing, "loss": loss}
        beside: Any = {"covariates": covariates, "season": season}
        part = first_part(y, graph, order, **fitted, **beside)
        for _ in range(ROUNDS):
            more = {"folds": folds, "seed": seed, "missing": missing, **options}
            chosen = choose_weight(np.asarray(y) - part, graph, penalty, order, rule, **more)
            found = trend_filter(y, graph, L1(chosen.weight), order, **fitted, **beside)
            part = found.fitted - found.value
        return chosen
    options["missing"] = missing
    if getattr(loss, "is_square", False) and (
        unlike := unlike_channels(y, graph, order, options.get("node_weights"), missing=missing)
    ):
        warnings.warn(unlike, stacklevel=2)
    for count in range(MOST_PATHS):
        path = trend_path(y, graph, penalty, order, **options)
        if rule == "cv":
            chosen = cross_validate(path, folds, seed=seed, observer=options.get("observer"))
        else:
            chosen = select(path, rule)
        if chosen.index < len(path) - 1 or count == MOST_PATHS - 1:
            break
        options["weights"] = chosen.weight * np.geomspace(1, RATIO, LEVELS)
    return chosen


def weight_rule(rule: str | None, loss: ScalarLoss, penalty: Any) -> str:
    """The rule of `choose_weight`, or the default for this loss and penalty; a ValueError if it does not suit them."""
    if rule is None:
        counts = getattr(loss, "known_variance", False) and not fits_odds(loss)
        likely = (getattr(loss, "is_square", False) or counts) and isinstance(template_of(penalty), (L1, GroupL2))
        return "gcv" if likely else "cv"
    if rule not in WEIGHT_RULES:
        raise ValueError(unknown("rule", rule, WEIGHT_RULES))
    if rule != "cv" and (reason := refuses_criterion(rule, loss)):
        raise ValueError(reason)
    return rule
