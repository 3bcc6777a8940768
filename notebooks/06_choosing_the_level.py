# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6. Choose the weight of a trend filter
#
# A trend filter needs a weight,
#
# $$\hat b(\lambda) = \arg\min_b\; \tfrac12 \|y - b\|^2 + \lambda\,\|\Delta^{(k+1)} b\|_1 .$$
#
# A small weight follows the noise, and a large one flattens the signal. The recommendation first: **solve a path and
# let GCV choose**,
#
# ```python
# best = so.select(so.trend.trend_path(y, graph), "gcv")
# best.weight, best.value
# ```
#
# and cross-validate, with `so.cross_validate(path)`, for penalties other than `L1`, or if you doubt the model.
# The rest of this lesson says why: it solves a whole path, and five rules choose from it. The truth is known, so each
# rule is compared with the **oracle**: the level whose fit is closest to the truth.

# %%
import matplotlib.pyplot as plt
import numpy as np
from scipy.spatial import Delaunay
from sklearn.model_selection import GridSearchCV, KFold

import sparseopt as so
from sparseopt.experiments import plots
from sparseopt.trend import largest_weight, noise_level, trend_path

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run
rng = np.random.default_rng(6)
SIGMA = 0.6

# %% [markdown]
# ## A signal on roads
#
# 800 crossings at random places. Two are joined by a road if no third crossing is closer to both than they are to each
# other (the *relative neighbourhood graph* of Toussaint, 1980), which looks much like a map. The signal has three
# levels, so order 0 suits it.

# %% alt="A road network of 800 crossings, coloured by the true signal of three levels and by the noisy one."
places = rng.uniform(size=(800, 2))
corners = Delaunay(places).simplices
pairs = np.unique(np.sort(np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [0, 2]]]), axis=1), axis=0)
apart = np.linalg.norm(places[:, None] - places, axis=-1)
lengths = apart[pairs[:, 0], pairs[:, 1], None]
between = ((apart[pairs[:, 0]] < lengths) & (apart[pairs[:, 1]] < lengths)).any(axis=1)
graph = so.Graph.from_edges(pairs[~between], len(places))
east, north = places.T
truth = 3.0 * (np.hypot(east - 0.35, north - 0.4) < 0.22) + 1.5 * (east + 0.3 * north > 0.85)
y = truth + SIGMA * rng.normal(size=len(truth))
figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
for axis, (title, values) in zip(axes, {"truth": truth, f"observed, noise {SIGMA}": y}.items(), strict=True):
    plots.plot_graph_signal(graph, places, values, axis, limits=(-1.0, 4.5), label="signal")
    axis.set_title(title)


def loss(fit):
    """Mean squared error against the truth."""
    return float(np.mean((np.asarray(fit) - truth) ** 2))


# %% [markdown]
# ## The path
#
# From some weight $\lambda_{\max}$ on, the fit is constant on every component of the graph, equal to its mean.
# `largest_weight` finds this weight with a certificate, and `trend_path` continues downwards, with 50 weights evenly
# spaced in the logarithm. Each fit is warm-started from the two before it, all share one compiled program, and each has
# its duality gap; `check` raises if one missed its tolerance.

# %% alt="Left, the fit at twelve crossings against the weight: the lines join until one value is left. Right, the degrees of freedom against the weight: they fall from 800 to 1."
path = trend_path(y, graph, order=0).check()
top = largest_weight(y, graph)
print(f"{len(path)} levels from {path.weights[0]:.3g} to {path.weights[-1]:.3g}, largest gap {path.gaps.max():.1e}")
print(f"the fit is the mean for weights from {top:.4g} on")
assert path.gaps.max() <= 1e-4
assert top <= path.weights[0] * (1 + 1e-6)
assert np.allclose(so.trend_filter(y, graph, so.L1(1.001 * top)).value, y.mean())
assert np.ptp(so.trend_filter(y, graph, so.L1(0.95 * top)).value) > 0
figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
plots.plot_fits(path, axis=axes[0])
plots.plot_degrees_of_freedom(path, axis=axes[1])
_ = axes[0].set_title("twelve of the crossings"), axes[1].set_title("degrees of freedom")

# %% [markdown]
# ## Degrees of freedom
#
# The right plot shows the degrees of freedom, which the rules below penalise. The degrees of freedom of a fit are
# $\sum_j \operatorname{cov}(\hat b_j, y_j)/\sigma^2$. For `L1` the *dimension* of the fit is an unbiased estimate: how
# many numbers describe it once its zero differences are known. At order 0 this is the number of pieces into which the
# non-zero differences cut the graph. The search for the pieces adds nothing, because shrinkage compensates for it
# exactly.
#
# Count the pieces of one level by hand: connected crossings with equal fits.

# %%
level = 15
fit = path.values[level]
equal = np.abs(fit[graph.edges[:, 0]] - fit[graph.edges[:, 1]]) < 1e-3
pieces = so.Graph.from_edges(graph.edges[equal], graph.num_nodes).num_components
print(f"weight {path.weights[level]:.3g}: {path.degrees_of_freedom[level]} degrees of freedom, {pieces} pieces")
assert abs(pieces - path.degrees_of_freedom[level]) <= 1

# %% [markdown]
# ## The noise level
#
# Some rules need $\sigma$. `noise_level` uses the median size of the differences $(\Delta^{(k+1)}y)_r$ relative to
# pure noise of standard deviation 1. A few jumps hardly change the median. If the truth bends everywhere, the
# estimate is too large, and a higher order of the differences helps. `path.noise` is the estimate at the path's order.

# %%
estimates = {order: noise_level(y, graph, order) for order in (0, 1, 2)}
print("noise: true", SIGMA, *(f"order {order}: {value:.3f}" for order, value in estimates.items()), sep="   ")
assert path.noise == estimates[0]
assert abs(path.noise / SIGMA - 1) < 0.1

# %% [markdown]
# ## Rules that look at the fit
#
# With $\text{RSS} = \|y - \hat b\|^2$ and $n$ nodes:
#
# | rule | what is minimised | needs $\sigma$ | aims at |
# |---|---|---|---|
# | SURE | $(\text{RSS} + 2\sigma^2\,\text{df})/n - \sigma^2$ | yes, estimated by default | a small error |
# | GCV | $(\text{RSS}/n)/(1 - \text{df}/n)^2$ | no | a small error |
# | AIC, corrected | $n\log(\text{RSS}/n) + 2n\,(\text{df}+1)/(n-\text{df}-2)$ | no | a small error |
# | BIC | $\text{RSS}/\sigma^2 + \log(n)\,\text{df}$ | yes | few pieces |
#
# SURE is an unbiased estimate of the mean squared error, so its curve follows the unknown one, up to noise that is
# nearly the same at neighbouring levels. AIC with a $\sigma$ is $\text{RSS}/\sigma^2 + 2\,\text{df}$, which chooses the
# same level as SURE. GCV considers only levels with $\text{df} \le n/2$, where its curve ends: closer to the data the
# quotient is not meaningful for a fit that shrinks.

# %% alt="Three criteria against the weight, each with its minimum: SURE follows the true error closely; SURE and GCV choose 0.77, BIC chooses 2.08."
losses = np.array([loss(value) for value in path.values])
chosen = {
    "GCV": so.select(path, "gcv"),
    "SURE": so.select(path, "sure"),
    "AIC": so.select(path, "aic"),
    "BIC": so.select(path, "bic", sigma=path.noise),
}
figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
for axis, rule in zip(axes, ("SURE", "GCV", "BIC"), strict=True):
    plots.plot_selection(chosen[rule], axis)
axes[0].plot(path.weights, losses, color="#333333", linestyle=":", label="true error")
_ = axes[0].legend(frameon=False, loc="upper left")
print(f"{'oracle':8} weight {path.weights[losses.argmin()]:.3g}   error {losses.min():.4f}")
for rule, selection in chosen.items():
    ratio = loss(selection.value) / losses.min()
    print(f"{rule:8} weight {selection.weight:.3g}   error {loss(selection.value):.4f}, {ratio:.2f} times the oracle's")
for rule in ("GCV", "SURE", "AIC"):
    assert loss(chosen[rule].value) < 1.1 * losses.min()
assert so.select(path, "aic", sigma=path.noise).index == chosen["SURE"].index
assert chosen["BIC"].weight > max(chosen[rule].weight for rule in ("GCV", "SURE", "AIC"))
assert path.degrees_of_freedom[chosen["BIC"].index] < path.degrees_of_freedom[chosen["SURE"].index]

# %% [markdown]
# BIC charges $\log n$ instead of 2 for a degree of freedom, so it chooses a larger weight with fewer pieces, and has a
# larger error: a weight without false pieces shrinks the true ones too much. Use BIC to find pieces (and refit them, or
# use `MCP`), not to predict.
#
# If the chosen level is the last one of the path, the path ends too early: use a smaller `ratio`. At order 2 the best
# level is often below a thousandth of $\lambda_{\max}$.

# %% [markdown]
# ## Cross-validation
#
# Hold out a fifth of the nodes, let the fit fill them in, and measure the error there; repeat for every fifth. This
# needs no degrees of freedom, assumes only that the noise is independent between nodes, and works for any penalty, also
# `MCP`. It costs one more path per fold. Its curve includes the noise of the hidden nodes and is flat near its minimum,
# so its choice varies more than with SURE.
#
# The mean over the folds has a standard error. The rule `one_se` chooses the *largest* weight whose error is within one
# standard error of the minimum: a simpler fit that is not clearly worse.

# %% alt="The held-out error against the weight, with bars of one standard error: it is smallest at 0.5 and within one standard error up to 1.8."
validated = so.cross_validate(path, folds=5, seed=0).check()
figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
plots.plot_cross_validation(validated, axis)
simple = path.values[validated.index_by("one_se")]
print(f"smallest error: weight {validated.weight:.3g}, {loss(validated.value) / losses.min():.2f} times the oracle's")
print(
    f"one standard error: weight {path.weights[validated.index_by('one_se')]:.3g}, {loss(simple) / losses.min():.2f} times"
)
assert loss(validated.value) < 1.5 * losses.min()
assert path.weights[validated.index_by("one_se")] >= validated.weight
assert path.degrees_of_freedom[validated.index_by("one_se")] <= path.degrees_of_freedom[validated.index_by("min")]

# %% [markdown]
# ## Choosing the order
#
# SURE, GCV and held-out errors are on the same scale for all orders, so they also choose the order. Here the truth has
# plateaus, and the data choose order 0.

# %% alt="The road network with three fits: SURE at order 0 has the smallest error, order 1 blurs the borders, one standard error at order 0 is in between."
sigma = noise_level(y, graph, 0)
by_order = {
    order: so.select(trend_path(y, graph, order=order, method="doge", tol=1e-3, num=30).check(), "sure", sigma)
    for order in (0, 1)
}
for order, selection in by_order.items():
    least = selection.curve[selection.index]
    print(f"order {order}: smallest SURE {least:.4f}, true error there {loss(selection.value):.4f}")
best_order = min(by_order, key=lambda order: by_order[order].curve.min())
print("the data choose order", best_order)
assert best_order == 0 == min(by_order, key=lambda order: loss(by_order[order].value))
figure, axes = plt.subplots(1, 3, figsize=(16, 4.4), layout="constrained")
shown = {
    "SURE, order 0": by_order[0].value,
    "SURE, order 1": by_order[1].value,
    "one standard error, order 0": simple,
}
for axis, (title, values) in zip(axes, shown.items(), strict=True):
    plots.plot_graph_signal(graph, places, values, axis, limits=(-1.0, 4.5), label="signal", edges=False)
    axis.set_title(f"{title}: error {loss(values):.4f}")

# %% [markdown]
# ## With scikit-learn
#
# `GraphTrendFilter` is a regressor whose samples are nodes, so scikit-learn's searches can choose weights and orders.
# `GraphTrendClassifier` is the same for labels.

# %%
nodes = np.arange(graph.num_nodes).reshape(-1, 1)
settings = {"alpha": path.weights[14:30:4], "order": [0, 1]}
search = GridSearchCV(so.GraphTrendFilter(graph=graph, tol=1e-3), settings, cv=KFold(5, shuffle=True, random_state=0))
found = search.fit(nodes, y)
alpha, order = found.best_params_["alpha"], found.best_params_["order"]
print(f"alpha {alpha:.3g}, order {order}: {loss(found.predict(nodes)) / losses.min():.2f} times the oracle's error")
assert order == 0
assert loss(found.predict(nodes)) < 1.5 * losses.min()

# %% [markdown]
# `alpha` is the weight. Shuffle the folds: blocks of consecutive nodes may be whole regions, which their neighbours
# cannot fill in. `cross_validate` does the same with warm starts and one compiled program, and distributes the folds
# evenly over the components.
#
# ## Which rule to use
#
# * **GCV**, or the **corrected AIC**, first: one path, no folds, no $\sigma$.
# * **SURE** if $\sigma$ is known or estimated from many nodes, especially if the best fit keeps more than half of the
#   degrees of freedom.
# * **Cross-validation** for penalties other than `L1`, for noise of unequal size, or if you doubt the model and have
#   the time. Its fits use fewer nodes than the final one.
# * **One standard error** or **BIC** if a simple fit is worth some error; neither is meant to predict best.
# * No rule handles *correlated* noise: all of them treat it as signal.
#
# The benchmarks show how close the rules come to the oracle on four kinds of signal and two graphs, over fifty draws of
# the noise each (`make bench-trend-selection`).
#
# Next: a weight for every difference, [learnt through the solver](07_learning_through_the_solver.ipynb).
