"""The choice of a level of a path, by criteria that count degrees of freedom, or by cross-validation.

With DEV the deviance (for the square the weighted sum of squares), N the number of observed values and sigma the noise
level:

    gcv    (DEV / N) / (1 - df / N)²,  df <= N / 2           needs no sigma
    sure   (DEV + 2 sigma² df) / N - sigma²                  an unbiased estimate of the mean squared error (L1)
    aic    DEV / sigma² + 2 df,       or  N log(DEV / N) + 2 N (df + 1) / (N - df - 2)  if sigma is not known
    bic    DEV / sigma² + log(N) df,  or  N log(DEV / N) + log(N) df,  df <= N / 2      if sigma is not known

For counts and labels sigma² is the dispersion, 1 if their variance is that of a Poisson or binomial distribution.

Source: Golub, Heath and Wahba, Technometrics 21 (1979); Stein, Annals of Statistics 9 (1981); Akaike (1974); Schwarz
(1978); Hurvich, Simonoff and Tsai, JRSS B 60 (1998), for the corrected aic; Zou, Hastie and Tibshirani, Annals of
Statistics 35 (2007), for their use with a count of dimensions; Hastie, Tibshirani and Friedman, "The Elements of
Statistical Learning", section 7.10, for rules by the standard error.
"""

import dataclasses
import math
import warnings
from typing import Any

import numpy as np

from sparseopt.core import select as core_select
from sparseopt.core.base.arguments import is_positive, unknown, whole_number
from sparseopt.core.base.types import Observer
from sparseopt.core.losses.scalar import ScalarLoss, check_scalar_loss
from sparseopt.core.penalties.entries import L1
from sparseopt.core.penalties.groups import GroupL2
from sparseopt.core.problem.problem import Status
from sparseopt.trend.base.fit import signal_on
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.noise import unlike_channels
from sparseopt.trend.base.signal import FIT_COPIES
from sparseopt.trend.methods.losses import node_deviances
from sparseopt.trend.paths.path import TrendPath, template_of, trend_path

CRITERIA = ("gcv", "sure", "aic", "bic")
# The rules of `choose_weight`.
WEIGHT_RULES = (*CRITERIA, "cv")
# If the last level of a path is the best, as for a long series at order 1, a path of LEVELS weights follows, down to
# RATIO times that weight.
LEVELS, RATIO, MOST_PATHS = 50, 1e-3, 4


class _OfWeights(core_select.Chosen[TrendPath]):
    @property
    def weight(self) -> float:
        """The chosen weight."""
        return self.level


@dataclasses.dataclass(frozen=True)
class Selection(_OfWeights, core_select.Selection[TrendPath]):
    """A weight chosen with a criterion: "gcv", "sure", "aic" or "bic"; `weight` and `value` belong to the level.

    Attributes:
        sigma: the noise level used; None if the criterion used none.
    """

    sigma: float | None


def select(path: TrendPath, criterion: str = "gcv", sigma: float | None = None) -> Selection:
    """Choose the level of a path with the best value of a criterion.

    Args:
        path: of `trend_path`.
        criterion: "gcv", "sure", "aic" or "bic". Degrees of freedom count dimensions; for penalties other than L1 this
            does not count the search for the zeros, and the criteria favour small weights. "gcv", and "bic" without a
            noise level, consider only fits with at most half as many degrees of freedom as values; if the noise is so
            small that more are needed, use "sure" or "aic".
        sigma: the standard deviation of the noise (at node weight 1). With None, "sure" and "bic" use the robust
            estimate `path.noise`, and "aic" the corrected form; "bic" uses the profiled likelihood if that estimate is
            0 or unknown. Of 100 values the estimate may be a fifth too small, and "sure" then chooses too small a
            weight: give sigma if you know it. For Poisson and logistic losses, None is 1.

    Raises:
        ValueError: also for "sure" with a loss other than the square, whose risk it estimates, and for "gcv" and "aic"
            with the logistic loss, which in our benchmarks chose fits with up to 49 times the smallest error.
        RuntimeError: if a level of the path has values that are not finite.

    Example:
        >>> clean = np.repeat([0.0, 5.0, 2.0], 40)
        >>> y = clean + np.random.default_rng(0).standard_normal(120)
        >>> best = so.trend.select(so.trend.trend_path(y, so.Graph.chain(120)), "gcv")
        >>> bool(np.mean((best.value - clean) ** 2) < 0.2)
        True
    """
    if not isinstance(path, TrendPath):
        raise TypeError(f"select takes a TrendPath, as trend_path returns it, given {type(path).__name__}")
    if criterion not in CRITERIA:
        raise ValueError(unknown("criterion", criterion, CRITERIA))
    _require_suitable(criterion, path.loss)
    if sigma is None and (criterion == "sure" or (criterion == "bic" and path.noise > 0)):
        sigma = path.noise
    if sigma is None and getattr(path.loss, "known_variance", False):
        sigma = 1.0
    _require_finite(path.statuses, "the path")
    if sigma is not None and not is_positive(sigma):
        raise ValueError(
            f"sigma, the standard deviation of the noise, must be positive and finite, given {sigma} (the path's own "
            f"estimate is {path.noise:.4g}); give the one you know"
        )
    if criterion == "gcv":
        sigma = None
    count, deviance = path.observations, path.deviances
    freedom = path.degrees_of_freedom.astype(float)
    price = {"aic": 2.0, "bic": math.log(count)}.get(criterion, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        if criterion == "gcv":
            curve = np.where(freedom <= count / 2, deviance / count / (1 - freedom / count) ** 2, np.inf)
        elif criterion == "sure":
            assert sigma is not None
            curve = (deviance + 2 * sigma**2 * freedom) / count - sigma**2
        elif sigma is None and criterion == "aic":
            left = count - freedom - 2
            curve = np.where(left > 0, count * (np.log(deviance / count) + 2 * (freedom + 1) / left), np.inf)
        elif sigma is None:
            # Without a bound it would fall towards the signal itself.
            curve = np.where(freedom <= count / 2, count * np.log(deviance / count) + price * freedom, np.inf)
        else:
            curve = deviance / sigma**2 + price * freedom
    if np.isposinf(curve).all():
        raise ValueError(
            f"{criterion} calls no level best: every level has too many degrees of freedom for it "
            f"({freedom.min():g} or more of {count} values); give a weight, or sigma, with which 'sure' and 'aic' can"
        )
    return Selection(path, criterion, curve, int(np.argmin(curve)), sigma)


def _require_suitable(criterion: str, loss: ScalarLoss) -> None:
    """A ValueError for a criterion that does not choose among fits with this loss."""
    if criterion == "sure" and not getattr(loss, "is_square", False):
        raise ValueError(
            f"sure estimates a mean squared error, given a path with loss={loss}: take cross-validation "
            "(cross_validate), or bic"
        )
    if _fits_odds(loss) and criterion in ("gcv", "aic"):
        raise ValueError(
            f"{criterion} does not choose among fits of labels, whose deviance is 0 on every piece of one label: take "
            "cross-validation (cross_validate), or bic"
        )


def _fits_odds(loss: Any) -> bool:
    """Whether it is the loss of labels by their probabilities."""
    return getattr(loss, "labels", False) and getattr(loss, "known_variance", False)


def _require_finite(statuses: np.ndarray, where: str) -> None:
    broken = np.argwhere(statuses == Status.NONFINITE)
    if broken.size:
        raise RuntimeError(
            f"{len(broken)} levels of {where} ended in values that are not finite, the first at {broken[0].tolist()}, "
            f"so none can be called best: {Status.NONFINITE.advice}"
        )


@dataclasses.dataclass(frozen=True)
class CrossValidation(_OfWeights, core_select.CrossValidation[TrendPath]):
    """A weight chosen by predicting held-out nodes, `folds` `[n]`, -1 for missing ones; errors are weighted."""


def cross_validate(
    y: Any,
    graph: Graph,
    penalty: Any = L1,
    order: int = 0,
    *,
    folds: int = 5,
    seed: int = 0,
    rule: str | None = None,
    node_weights: Any = None,
    missing: str = "error",
    **options: Any,
) -> CrossValidation:
    """Choose a weight by K-fold cross-validation over the nodes.

    The nodes of each fold are held out once: the fit fills them in as missing, and the error is the mean deviance of
    the observations there (for the square the mean squared difference), weighted by the node weights. The folds are
    random, differ in size by at most one node, and are spread evenly over the components, so that every component keeps
    a node. All folds use the weights of the path of all nodes. A fold has fewer observations, so the same weight
    smooths slightly more than on all nodes.

    There are `folds` >= 2 folds, drawn with the `seed`. The `rule` "min" picks the smallest error, "half_se" and
    "one_se" the largest weight within half a standard error or one of it; None is "half_se" for the logistic loss,
    since it came closest to the best fits in our benchmarks, and "min" for others. All other arguments are as in
    `trend_path`.

    Raises:
        ValueError: also for a component with only one observed node, which no fold can predict; and with a loss, for
            one without a finite fit if a fold is left out, as when that fold has all its counts.
        RuntimeError: if a fit has values that are not finite.

    Example:
        >>> clean = np.repeat([0.0, 5.0, 2.0], 40)
        >>> y = clean + np.random.default_rng(0).standard_normal(120)
        >>> chosen = so.trend.cross_validate(y, so.Graph.chain(120), num=20)
        >>> bool(np.mean((chosen.value - clean) ** 2) < 0.2)
        True
    """
    if rule not in (None, *core_select.RULES):
        raise ValueError(unknown("rule", rule, tuple(core_select.RULES)))
    signal = signal_on(graph, order, y, node_weights, missing, options.get("dtype"), FIT_COPIES)
    level, columns = signal.mass, signal.columns
    held = random_folds(graph, level > 0, folds, seed)
    folds, observer = int(folds), options.pop("observer", None)

    def part(paths: int) -> Observer | None:
        """The observer of one path, after some finished ones."""
        if observer is None:
            return None
        return lambda what, done, total: observer(what, paths * total + done, (folds + 1) * total)

    path = trend_path(y, graph, penalty, order, node_weights=node_weights, missing=missing, observer=part(0), **options)
    options["weights"] = path.weights
    errors, statuses = np.empty((folds, len(path))), np.empty((folds, len(path)), np.int32)
    for fold in range(folds):
        out = held == fold
        options |= {"node_weights": np.where(out, 0, level), "observer": part(fold + 1)}
        fit = trend_path(signal.values, graph, penalty, order, **options)
        found = node_deviances(fit.loss, fit.values.reshape(len(fit), *columns.shape)[:, out], columns[out])
        errors[fold], statuses[fold] = np.average(found.mean(axis=-1), axis=1, weights=level[out]), fit.statuses
    _require_finite(statuses, "the folds (fold, level)")
    mean, spread = errors.mean(axis=0), errors.std(axis=0, ddof=1) / math.sqrt(folds)
    rule = rule or ("half_se" if _fits_odds(path.loss) else "min")
    return CrossValidation(path, errors, mean, spread, held, rule, statuses)


def choose_weight(
    y: Any,
    graph: Graph,
    penalty: Any = L1,
    order: int = 0,
    rule: str | None = None,
    *,
    missing: str = "error",
    **options: Any,
) -> Selection | CrossValidation:
    """Choose a weight by a rule, with as many paths as the rule needs.

    The `rule` is "cv" for `cross_validate`, or a criterion of `select`: "gcv", "sure", "aic", "bic". None is the rule
    that did well in our benchmarks: "gcv" for the square and for counts with `L1` or `GroupL2`, and "cv" for labels,
    losses of outliers and other penalties. If the best weight is the smallest of a path, another path begins there.
    The other arguments are as in `trend_path`, and for "cv" as in `cross_validate`. The result has the `weight`, the
    fit `value` and the last `path`.

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
    loss = check_scalar_loss(options.get("loss", "square"))
    rule, options["missing"] = weight_rule(rule, loss, penalty), missing
    if getattr(loss, "is_square", False) and (
        unlike := unlike_channels(y, graph, order, options.get("node_weights"), missing=missing)
    ):
        warnings.warn(unlike, stacklevel=2)
    for path in range(MOST_PATHS):
        if rule == "cv":
            chosen: Any = cross_validate(y, graph, penalty, order, **options)
        else:
            chosen = select(trend_path(y, graph, penalty, order, **options), rule)
        if chosen.index < len(chosen.path) - 1 or path == MOST_PATHS - 1:
            break
        options["weights"] = chosen.weight * np.geomspace(1, RATIO, LEVELS)
    return chosen


def weight_rule(rule: str | None, loss: ScalarLoss, penalty: Any) -> str:
    """The rule of `choose_weight`, or the default for this loss and penalty; a ValueError if it does not suit them."""
    if rule is None:
        counts = getattr(loss, "known_variance", False) and not _fits_odds(loss)
        likely = (getattr(loss, "is_square", False) or counts) and isinstance(template_of(penalty), (L1, GroupL2))
        return "gcv" if likely else "cv"
    if rule not in WEIGHT_RULES:
        raise ValueError(unknown("rule", rule, WEIGHT_RULES))
    _require_suitable(rule, loss)
    return rule


def random_folds(graph: Graph, observed: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of every observed node, -1 for the others; a ValueError for a number of folds that does not fit.

    The shuffled nodes are dealt out component by component, so that the sizes of the folds, and their parts of a
    component, differ by at most one.
    """
    nodes = np.flatnonzero(observed)
    if nodes.size < 2:
        raise ValueError(f"two folds need two observed nodes, given {nodes.size}")
    folds, seed = whole_number("folds", folds, 2, nodes.size, "of the observed nodes"), whole_number("seed", seed, 0)
    counts = np.bincount(graph.components[nodes], minlength=graph.num_components)
    if (counts == 1).any():
        alone = nodes[counts[graph.components[nodes]] == 1]
        raise ValueError(
            f"{alone.size} components have one observed node only (one of them is node {alone[0]}); held out, it could "
            "not be predicted: leave such components out"
        )
    shuffled = np.random.default_rng(seed).permutation(nodes)
    dealt = shuffled[np.argsort(graph.components[shuffled], kind="stable")]
    held = np.full(graph.num_nodes, -1)
    held[dealt] = np.arange(nodes.size) % folds
    return held
