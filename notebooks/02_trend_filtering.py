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
# # 2. Smooth signals, images and graphs
#
# A **trend filter** fits a signal $b$ to noisy values $y$ on the nodes of a graph. It trades closeness against the
# *differences* of $b$ along the edges:
#
# $$\min_b\; \tfrac12 \sum_j w_j\,(y_j - b_j)^2 \;+\; \lambda\,\|\Delta^{(k+1)} b\|_1 .$$
#
# The penalty makes most differences exactly zero. Where they are zero, the fit is a trend of **order** $k$: constant,
# linear or quadratic. Where they are not, it has a jump or a kink. With $D$ the difference along every edge
# ($(Db)_{ij} = b_i - b_j$) and $L = D^\top D$ the graph Laplacian:
#
# | order $k$ | differences $\Delta^{(k+1)}$ | pieces of the fit |
# |---|---|---|
# | 0 | $D$ | constant (total variation, the fused lasso) |
# | 1 | $L$ | linear |
# | 2 | $D L$ | quadratic |
#
# On a chain the default differences are the usual ones of a line, which also leave the slopes at both ends free.

# %%
import matplotlib.pyplot as plt
import numpy as np
from scipy.spatial import Delaunay
from skimage.data import camera

import sparseopt as so
from sparseopt.experiments import plots
from sparseopt.trend import denoise, trend_path
from sparseopt.trend.images import psnr

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run
rng = np.random.default_rng(1)


def rmse(fit, truth):
    """Root mean squared error."""
    return float(np.sqrt(np.mean((np.asarray(fit) - truth) ** 2)))


# %% [markdown]
# ## The order is the shape that you expect
#
# Three signals on a chain of 400 nodes, with the same noise on each. `trend_path` fits 50 weights $\lambda$, from the
# one that leaves only a polynomial down to one that nearly reproduces the signal, and `select` chooses among them.

# %% alt="Three noisy signals with their truth and the fit: steps with order 0, straight lines with order 1, parabolas with order 2. Each fit follows its truth closely."
n = 400
t = np.linspace(0, 1, n)
truths = [
    np.select([t < 0.2, t < 0.5, t < 0.75], [1.0, 3.0, 0.5], 2.0),
    np.interp(t, [0, 0.25, 0.45, 0.8, 1], [0, 3, 1.5, 2.5, 0]),
    np.where(t < 0.4, 25 * (t - 0.2) ** 2, 3 - 22 * (t - 0.7) ** 2),
]
chain = so.Graph.chain(n)
observed = [truth + 0.3 * rng.normal(size=n) for truth in truths]
paths = [trend_path(y, chain, order=order, tol=1e-3).check() for order, y in enumerate(observed)]
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
for order, (axis, path) in enumerate(zip(axes, paths, strict=True)):
    chosen = so.select(path, "gcv")
    plots.plot_chain(observed[order], chosen.value, axis, truth=truths[order])
    axis.set_title(f"order {order}, weight {chosen.weight:.3g}: rmse {rmse(chosen.value, truths[order]):.3f}")
    assert rmse(chosen.value, truths[order]) < 0.12

# %% [markdown]
# The weights differ by orders of magnitude because the differences do: on a fine chain, second differences of a smooth
# signal are far smaller than first differences. So do not guess a weight for a new order or graph; let a path find it.
#
# ## How good is the answer?
#
# One fit with one weight is `trend_filter`. Besides the fit it finds a lower bound on the objective, and
# stops when the two agree to `tol`. `solution.gap` is this relative **duality gap**: the objective is at most so much
# above its minimum. `check()` raises an error if the tolerance was not reached. On a chain at order 0 the method is
# exact, so the gap is tiny; elsewhere it is just below `tol`.

# %%
steps = so.trend_filter(observed[0], chain, so.L1(2.0), order=0).check()
print(f"{steps.pieces().max() + 1} pieces, gap {float(steps.gap):.0e}")
assert steps.gap <= 1e-4
steps

# %% [markdown]
# ## The weight: a path, and a choice
#
# A small weight follows the noise, a large one flattens the signal. Below, every 16th node of the signal with steps is
# a line along the path, coloured by its true step. On the way to larger weights, nodes merge into pieces. Nodes that
# have merged stay together, and in the end one value is left.

# %% alt="The fitted values of single nodes against the weight, on a log axis, in four colours for the four true steps. At small weights the lines scatter; at the weights chosen by GCV and by cross-validation, marked by vertical lines, they lie on four levels; at large weights on one."
path = paths[0]
validated = so.cross_validate(trend_path(observed[0], chain, order=0), folds=5, seed=0).check()
rules = {"GCV": so.select(path, "gcv"), "cross-validation": validated}
figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
for level, colour in zip(np.unique(truths[0]), plots.COLOURS, strict=False):
    nodes = np.flatnonzero(truths[0] == level)[::16]
    axis.plot(path.weights, path.values[:, nodes], color=colour, linewidth=1, label=["_"] * len(nodes))
    axis.plot([], [], color=colour, label=f"truth {level:g}")
for (rule, chosen), dash in zip(rules.items(), ("--", ":"), strict=True):
    axis.axvline(chosen.weight, color="black", linestyle=dash, label=f"{rule}: {chosen.weight:.2g}")
    print(f"{rule}: weight {chosen.weight:.2f}, rmse {rmse(chosen.value, truths[0]):.3f}")
axis.set(xscale="log", xlabel="weight", ylabel="fitted value", ylim=(0, 4), title="every 16th node along the path")
axis.spines[["top", "right"]].set_visible(False)
_ = axis.legend(frameon=False, loc="upper right", ncols=2)
best = min(rmse(value, truths[0]) for value in path.values)
print(f"best of the path: rmse {best:.3f}")
assert all(rmse(chosen.value, truths[0]) < 1.3 * best for chosen in rules.values())

# %% [markdown]
# Both rules come close to the best weight of the path without the truth. `select` needs one path and counts the
# degrees of freedom; `cross_validate` hides a fifth of the nodes at a time and needs a path for each fifth.
# [Lesson 6](06_choosing_the_level.ipynb) compares the rules.
#
# ## Images, and missing values
#
# The pixels of an image are the nodes of a grid. `denoise` makes the grid and chooses the weight, unless you give one.
# The noise has a standard deviation of 20 grey levels. PSNR is $10\log_{10}(255^2/\text{mean squared error})$ in
# decibels; 3 dB more is half the squared error.
#
# A node that was not observed has $w_j = 0$, and the fit fills it in from its neighbours. With `missing="nan"` these are
# the pixels that are NaN: here half of them, and a scratch.

# %% alt="Five images of a man with a camera: clean; with noise; denoised; with half of the pixels and a strip missing; repaired, where the strip is filled in."
clean = camera()[60:220, 180:340].astype(np.float32)
image = clean + rng.normal(0, 20, clean.shape).astype(np.float32)
damaged = image.copy()
damaged[rng.uniform(size=clean.shape) < 0.5] = np.nan
damaged[70:76] = np.nan
denoised = denoise(image, isotropic=True)
repaired = denoise(damaged, isotropic=True, missing="nan")
shown = {
    "clean": clean,
    f"noise: {psnr(image, clean):.1f} dB": image,
    f"denoised: {psnr(denoised.image, clean):.1f} dB": denoised.image,
    "missing (white)": np.nan_to_num(damaged, nan=255),
    f"repaired: {psnr(repaired.image, clean):.1f} dB": repaired.image,
}
figure, axes = plt.subplots(1, 5, figsize=(15, 3.4), layout="constrained")
for axis, (title, picture) in zip(axes, shown.items(), strict=True):
    plots.plot_image(picture, axis, title=title, limits=(0, 255))
for label, found in {"denoised": denoised, "repaired": repaired}.items():
    print(f"{label}: weight {found.weight:.1f}, gap {float(found.solution.gap):.1e}")
assert psnr(denoised.image, clean) > psnr(image, clean) + 5

# %% [markdown]
# ## Any graph
#
# A Delaunay triangulation joins 2,000 sensors at random places. They measure two fields: one has regions with sharp
# borders, the other bends smoothly. Again the order is the expected shape, and SURE chooses each weight.

# %% alt="Maps of 2,000 sensors in two rows, for a field with regions and for a smooth field: the truth, the measurement, and the fits of order 0 and 1. For the regions order 0 has the smaller error, for the smooth field order 1."
places = rng.uniform(size=(2000, 2))
sides = Delaunay(places).simplices[:, [[0, 1], [1, 2], [0, 2]]].reshape(-1, 2)
edges = np.unique(np.sort(sides, axis=1), axis=0)
lengths = np.linalg.norm(places[edges[:, 0]] - places[edges[:, 1]], axis=1)
graph = so.Graph.from_edges(edges[lengths < 0.1], len(places))
east, north = places.T
fields = {
    "regions": np.select(
        [np.hypot(east - 0.35, north - 0.6) < 0.25, north < 0.35 + 0.3 * np.sin(3 * east)], [3, -1], 1
    ),
    "smooth": 1 + 2 * np.sin(4 * east) * np.cos(4 * north),
}
figure, axes = plt.subplots(2, 4, figsize=(14, 6.8), layout="constrained")
errors = {}
for row, (name, field) in zip(axes, fields.items(), strict=True):
    measured = field + 0.5 * rng.normal(size=len(places))
    panels = {f"{name}: truth": field, f"measured: rmse {rmse(measured, field):.2f}": measured}
    for order in (0, 1):
        chosen = so.select(trend_path(measured, graph, order=order, num=25, tol=1e-3).check(), "sure")
        errors[name, order] = rmse(chosen.value, field)
        panels[f"order {order}, weight {chosen.weight:.2f}: rmse {errors[name, order]:.3f}"] = chosen.value
    for axis, (title, values) in zip(row, panels.items(), strict=True):
        drawn = axis.scatter(east, north, s=16, c=values, vmin=-1.5, vmax=3.5)
        axis.set(title=title, xticks=[], yticks=[], aspect="equal")
_ = figure.colorbar(drawn, ax=axes, label="field", extend="both", shrink=0.7)
print({f"{name}, order {order}": round(error, 3) for (name, order), error in errors.items()})
assert errors["regions", 0] < errors["regions", 1]
assert errors["smooth", 1] < errors["smooth", 0]

# %% [markdown]
# Order 0 keeps the borders, and draws steps where the field is smooth. Order 1 follows slopes, and blurs the borders.
#
# ## What to remember
#
# * `so.trend_filter(y, graph, so.L1(weight), order)` is one fit; read `gap`, or call `check()`.
# * The order is the expected shape; the weight is how much is noise. `trend_path` with `select`, or `cross_validate`,
#   chooses it.
# * Images: `denoise`. Missing values: `missing="nan"` or `node_weights`.
#
# Next: the same solver core on [the weights of a language model](03_pruning_a_small_llm.ipynb).
