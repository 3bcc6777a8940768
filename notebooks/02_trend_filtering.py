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
# # 2. Smooth signals, pictures and graphs
#
# A **trend filter** fits a signal $b$ to noisy values $y$ on the nodes of a graph. It trades closeness against the
# *differences* of $b$ along the edges:
#
# $$\min_b\; \tfrac12 \sum_j w_j\,(y_j - b_j)^2 \;+\; p\bigl(\Delta^{(k+1)} b\bigr).$$
#
# The penalty $p$ makes most differences exactly zero. Where they vanish the fit is a trend of order $k$; where they do
# not, it has a jump or a kink. With $D$ the difference along every edge ($(Db)_{ij} = b_i - b_j$) and $L = D^\top D$
# the graph Laplacian:
#
# | order $k$ | $\Delta^{(k+1)}$ | where the differences vanish, the fit is |
# |---|---|---|
# | 0 | $D$ | constant (total variation, the fused lasso) |
# | 1 | $L$ | linear |
# | 2 | $D L$ | quadratic |
#
# `so.trend_filter(y, graph, penalty, order)` solves it on any graph and certifies the answer.

# %%
import matplotlib.pyplot as plt
import numpy as np
from scipy.spatial import Delaunay
from skimage.data import camera

import sparseopt as so
from sparseopt.experiments import plots
from sparseopt.trend.images import psnr

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run
rng = np.random.default_rng(1)


def rmse(fit, truth):
    """Root mean squared error."""
    return float(np.sqrt(np.mean((np.asarray(fit) - truth) ** 2)))


# %% [markdown]
# ## The order is the shape that you expect
#
# Three signals on a chain of 400 nodes, the same noise on each, and the trend filter of the matching order.

# %%
n = 400
t = np.linspace(0, 1, n)
truths = [
    np.select([t < 0.2, t < 0.5, t < 0.75], [1.0, 3.0, 0.5], 2.0),
    np.interp(t, [0, 0.25, 0.45, 0.8, 1], [0, 3, 1.5, 2.5, 0]),
    np.where(t < 0.4, 25 * (t - 0.2) ** 2, 3 - 22 * (t - 0.7) ** 2),
]
weights = (2.0, 30.0, 100.0)
chain = so.Graph.chain(n, ends="graph")  # with the differences of the table
observed = [truth + 0.3 * rng.normal(size=n) for truth in truths]
fits = [
    so.trend_filter(y, chain, so.L1(weight), order).check()
    for order, (y, weight) in enumerate(zip(observed, weights, strict=True))
]
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
for order, axis in enumerate(axes):
    plots.plot_chain(observed[order], fits[order].value, axis, truth=truths[order])
    error = rmse(fits[order].value, truths[order])
    axis.set_title(f"order {order}, weight {weights[order]:g}: rmse {error:.3f}")

# %% [markdown]
# The weights differ by orders of magnitude because the differences do: on a fine chain, second differences of a smooth
# signal are far smaller than first differences. At every order a weight has the unit of the signal, since
# $y - b = \Delta^\top u$ with $|u| \le$ weight.
#
# ## How good is the answer? The duality gap
#
# For `L1` (and `GroupL2`) every $u$ with $|u_r| \le$ weight gives a lower bound $D(u)$ on the minimum. The solver
# maintains such a $u$ and stops when
#
# $$\text{gap} = \frac{P(b) - D(u)}{D(u)} \le \text{tol},$$
#
# so `solution.gap` bounds the relative distance of the objective $P(b)$ to the true minimum. No reference solution is
# needed. `method="auto"` chooses the solver by graph, order and weight: on chains the exact fused
# lasso at order 0 and the interior point method at higher orders when smoothing is strong (without PIQP, or with a
# history as below, an ADMM around the fused lasso); on images and other graphs mostly Doge-ADMM, which treats the
# differences in groups that share no node.

# %%
histories = {
    f"order {order}": so.trend_filter(
        y, chain, so.L1(weight), order, so.trend.FastAdmm(cadence=1), tol=1e-9, history=True
    )
    for order, (y, weight) in enumerate(zip(observed, weights, strict=True))
}
figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
plots.plot_history(histories, "gap", axis)
for label, solution in histories.items():
    print(f"{label}: {int(solution.steps)} steps to a gap of {float(solution.gap):.1e}")

# %% [markdown]
# ## L1 shrinks jumps, MCP does not
#
# `L1` penalises the size of every jump, so it shrinks them: plateaus move towards their neighbours. A smaller weight
# shrinks less but keeps false steps, as the ends of the plateaus show. `MCP` does not penalise a jump further beyond
# $\gamma \cdot$ weight. The problem is no longer convex, so there is no duality gap (`gap` is NaN) and the status is
# STATIONARY: converged, without a certificate.
#
# $\gamma \cdot$ weight is compared with a difference. Choose it about as large as the jumps that should be preserved.
# If it is far larger, `MCP` is `L1`; if it is far smaller, the problem has many poor local minima.

# %%
noisy = observed[0]
compared = {
    "L1, weight 2": so.trend_filter(noisy, chain, so.L1(2.0)).check(),
    "L1, weight 8": so.trend_filter(noisy, chain, so.L1(8.0)).check(),
    "MCP, weight 2, γ = 1": so.trend_filter(noisy, chain, so.MCP(2.0, gamma=1.0)).check(),
}
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), sharey=True, layout="constrained")
for axis, (label, solution) in zip(axes, compared.items(), strict=True):
    plots.plot_chain(noisy, solution.value, axis, truth=truths[0])
    axis.set_title(f"{label}: rmse {rmse(solution.value, truths[0]):.3f}")
    print(f"{label}: {so.Status(int(solution.status)).name}, gap {float(solution.gap):.1e}")

# %% [markdown]
# ## Choosing the weight: a path
#
# A small weight follows the noise, a large one flattens the signal. Solve for a sequence of weights, each started from
# the previous solution (`start`), and compare. The method is named here because the
# interior point method, which "auto" may choose, takes no start.

# %%
path_weights = np.geomspace(0.1, 60, 16)
path, solution = [], None
for weight in path_weights:
    solution = so.trend_filter(noisy, chain, so.L1(weight), method="doge", tol=1e-6, start=solution).check()
    path.append(np.asarray(solution.value))
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), sharey=True, layout="constrained")
for axis, index, words in zip(axes, (3, 8, 14), ("too small", "about right", "too large"), strict=True):
    plots.plot_chain(noisy, path[index], axis, truth=truths[0])
    pieces = 1 + np.count_nonzero(np.abs(np.diff(path[index])) > 1e-6)
    axis.set_title(f"weight {path_weights[index]:.2g}, {words}: {pieces} pieces")

# %% [markdown]
# Single nodes along the path, from a separate value for nearly every node to one value for all. Nodes that have merged
# stay together.

# %%
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
plots.plot_path(path_weights, np.stack(path)[:, ::16], axis)
_ = axis.set(xlabel="weight of L1", ylabel="fitted value (every 16th node)")

# %% [markdown]
# ## An image
#
# The pixels of an image are the nodes of a grid. The noise has a standard deviation of 20 grey levels. PSNR is
# $10\log_{10}(255^2/\text{mean squared error})$ in decibels; 3 dB more is half the squared error.

# %%
clean = camera()[60:220, 180:340].astype(np.float32)
grid = so.Graph.grid(clean.shape)
image = clean + rng.normal(0, 20, clean.shape).astype(np.float32)
denoised = {order: so.trend_filter(image, grid, so.L1(12.0 - 2 * order), order, tol=1e-4).check() for order in (0, 1)}
shown = {"with noise": image} | {f"order {order}": solution.value for order, solution in denoised.items()}
figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
for axis, (label, picture) in zip(axes, shown.items(), strict=True):
    plots.plot_image(np.asarray(picture), axis, title=f"{label}: {psnr(picture, clean):.1f} dB", limits=(0, 255))

# %% [markdown]
# Order 0 makes flat patches with sharp edges; order 1 follows slopes and softens edges.
#
# ### The weight without the truth: hold pixels out
#
# In practice the clean image is unknown. But a trend filter can *fill in* nodes that were not observed (node weight 0).
# So hide a tenth of the pixels, fit the rest for each weight, and score the fit on the hidden pixels. The held-out
# error includes the noise of the hidden pixels, so it is larger and flatter, but its minimum is near that of the true
# error.

# %%
hidden = rng.uniform(size=clean.shape) < 0.1
image_weights = np.geomspace(3, 40, 9)
held_out, true_error, solution = [], [], None
for weight in image_weights:
    solution = so.trend_filter(
        image, grid, so.L1(weight), tol=1e-3, node_weights=1.0 - hidden.reshape(-1), start=solution
    ).check()
    fit = np.asarray(solution.value)
    held_out.append(rmse(fit[hidden], image[hidden]))
    true_error.append(rmse(fit, clean))
curves = {
    "hidden pixels, against their noisy values": held_out,
    "all pixels, against the clean image (unknown in practice)": true_error,
}
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for axis, (title, curve) in zip(axes, curves.items(), strict=True):
    curve_and_axes = {"xlabel": "weight of L1", "ylabel": "rmse (grey levels)", "logx": True, "markers": True}
    plots.plot_curves({"rmse": (image_weights, curve)}, axis, **curve_and_axes)
    axis.set_title(title)
    axis.set_xticks([3, 5, 10, 20, 40], ["3", "5", "10", "20", "40"], minor=False)
    axis.minorticks_off()
    axis.get_legend().remove()
chosen = image_weights[int(np.argmin(held_out))]
print(f"held-out pixels choose {chosen:.1f}, the truth would choose {image_weights[int(np.argmin(true_error))]:.1f}")

# %% [markdown]
# ## Missing values
#
# The same mechanism repairs images. `missing="nan"` treats NaN as unobserved; such nodes are filled in from their
# neighbours. Half of the pixels and a scratch are missing, and the rest is noisy.

# %%
damaged = image.copy()
damaged[rng.uniform(size=clean.shape) < 0.5] = np.nan
damaged[70:76] = np.nan
repaired = so.trend_filter(damaged, grid, so.L1(10.0), tol=1e-4, missing="nan").check()
figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
plots.plot_image(np.nan_to_num(damaged, nan=255), axes[0], title="observed (white: missing)", limits=(0, 255))
plots.plot_image(
    np.asarray(repaired.value), axes[1], title=f"repaired: {psnr(repaired.value, clean):.1f} dB", limits=(0, 255)
)
plots.plot_image(clean, axes[2], title="clean", limits=(0, 255))
print(f"{np.isnan(damaged).mean():.0%} missing, {int(repaired.steps)} steps, gap {float(repaired.gap):.1e}")

# %% [markdown]
# ## Any graph
#
# Two thousand sensors at random places, joined to their neighbours by a Delaunay triangulation. The field that they
# measure has three regions with sharp borders, and a gentle slope inside each.

# %%
places = rng.uniform(size=(2000, 2))
corners = Delaunay(places).simplices
pairs = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [0, 2]]])
edges = np.unique(np.sort(pairs, axis=1), axis=0)
lengths = np.linalg.norm(places[edges[:, 0]] - places[edges[:, 1]], axis=1)
graph = so.Graph.from_edges(edges[lengths < 0.1], len(places))
east, north = places.T
field = np.where(
    (east - 0.35) ** 2 + (north - 0.6) ** 2 < 0.06,
    2 + east,
    np.where(north < 0.35 + 0.3 * np.sin(3 * east), -1 - 0.5 * north, 0.5 + 0.5 * north),
)
measured = field + 0.4 * rng.normal(size=len(places))
fits = {
    "L1, order 0": so.trend_filter(measured, graph, so.L1(0.2), 0, tol=1e-4).check(),
    "MCP, order 0": so.trend_filter(measured, graph, so.MCP(0.3, gamma=5.0), 0, tol=1e-4).check(),
    "L1, order 1": so.trend_filter(measured, graph, so.L1(0.1), 1, tol=1e-4).check(),
}
figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
limits = (-1.5, 3.0)
for axis, (label, values) in zip(axes[0], {"true field": field, "measured": measured}.items(), strict=False):
    plots.plot_graph_signal(graph, places, values, axis, limits=limits, label="field", edges=False)
    axis.set_title(label)
plots.plot_graph_signal(graph, places, field, axes[0, 2], limits=limits, label="field", edges=True)
axes[0, 2].set(xlim=(0.3, 0.6), ylim=(0.3, 0.6), title="the graph, a closer look")
for axis, (label, solution) in zip(axes[1], fits.items(), strict=True):
    plots.plot_graph_signal(graph, places, np.asarray(solution.value), axis, limits=limits, label="field", edges=False)
    axis.set_title(f"{label}: rmse {rmse(solution.value, field):.3f}")
errors = {label: rmse(solution.value, field) for label, solution in fits.items()}
assert errors["MCP, order 0"] < errors["L1, order 0"] < rmse(measured, field)

# %% [markdown]
# The borders here are jumps, so order 0 finds them, and `MCP` keeps their height. Order 1, also at its best weight,
# penalises a jump twice, once on each side: it either keeps noise or smooths across.
#
# ## What to remember
#
# * The order is the expected shape; the weight is how much is noise. Compare weights along a path, or hold nodes out.
# * With `L1` read `solution.gap`; with `MCP` read `solution.status` and compare starts.
# * Missing nodes: `missing="nan"` or `node_weights`; channels: `y` of shape `[n, channels]`, coupled by `GroupL2`.
#
# Next: the same solver core on [the weights of a language model](03_pruning_a_small_llm.ipynb).
