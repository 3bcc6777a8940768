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
# # 4. Add your own penalty
#
# A penalty is two functions, `value` and `prox`. Write them once, in fewer than twenty lines, and the penalty works
# wherever a penalty of the package works. There is no base class and no registry. This lesson adds the **log-sum
# penalty** and uses it
#
# 1. in `trend_filter`, on a grid and on another graph;
# 2. in `prune_layer`;
# 3. in an optax chain that trains a small Flax model, with SGD and with Adam;
# 4. in a config, by its dotted path.
#
# ## A bridge between L1 and L0
#
# $$p(x) \;=\; w \sum_i \log\Bigl(1 + \frac{|x_i|}{\varepsilon}\Bigr), \qquad \varepsilon = \text{scale}.$$
#
# Near zero its slope is $w/\varepsilon$, as for `L1`, so small entries vanish. Far from zero the slope fades as
# $w/(\varepsilon + |x|)$, so large entries are hardly shrunk. It is the penalty of reweighted $\ell_1$ minimisation
# (Candès, Wakin and Boyd, 2008). The package also has it, as `so.LogSum`.
#
# **The prox.** Take $x \ge 0$ and write $\ell = t w$ for the level. Where $u > 0$, the derivative of
# $\tfrac12 (u - x)^2 + \ell \log(1 + u/\varepsilon)$ vanishes if
#
# $$(u - x)(u + \varepsilon) + \ell = 0 \quad\Longrightarrow\quad
# u = \tfrac12\Bigl(x - \varepsilon + \sqrt{(x + \varepsilon)^2 - 4\ell}\Bigr).$$
#
# The larger root is the local minimum. The other candidate is $u = 0$; the prox is the one of lower cost. If the root
# is not real, the cost increases everywhere and the prox is 0. Here is the class.

# %%
from typing import Any

import jax.numpy as jnp

import sparseopt as so

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run


@so.pytree
class LogSum:
    """`weight * sum of log(1 + |x| / scale)`."""

    weight: Any
    scale: Any = 1.0
    separable = True

    def value(self, x):
        return self.weight * jnp.sum(jnp.log1p(jnp.abs(x) / self.scale))

    def prox(self, x, step):
        size, level = jnp.abs(x), jnp.asarray(step * self.weight, x.dtype)
        square = (size + self.scale) ** 2 - 4 * level
        root = jnp.maximum((size - self.scale + jnp.sqrt(jnp.maximum(square, 0))) / 2, 0)
        cost = (root - size) ** 2 / 2 + level * jnp.log1p(root / self.scale)
        return jnp.where(cost < size**2 / 2, jnp.sign(x) * root, 0)


# %% [markdown]
# * `so.pytree` makes the class a frozen dataclass and a JAX pytree. The annotated fields are leaves, so `weight` and
#   `scale` may be traced, mapped by `vmap`, and changed without a new compilation.
# * `separable = True` is a promise: the value is a sum over entries, and `prox` accepts one step for
#   each entry. `so.proximal_adam` requires it. A penalty that couples entries leaves it out.
#
# ## Check it before you use it
#
# The definition is a test: no point of a fine grid may cost less than the prox. We try steps on both sides of the point
# where the prox changes its shape: it is continuous for $\ell \le \varepsilon^2$ and discontinuous beyond.

# %%
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from scipy.spatial import Delaunay
from skimage.data import shepp_logan_phantom

from sparseopt.experiments import plots
from sparseopt.trend.images import psnr

rng = np.random.default_rng(4)


def check_prox(penalty, steps):
    """Assert that no point of a grid beats the prox, at random points, for these steps."""
    points, grid = jnp.asarray(rng.uniform(-5, 5, 400), jnp.float32), jnp.linspace(-5, 5, 4001)
    value = jax.vmap(penalty.value)
    for step in steps:
        found = penalty.prox(points, step)
        cost = (found - points) ** 2 / 2 + step * value(found)
        on_grid = (grid - points[:, None]) ** 2 / 2 + step * value(grid)
        assert jnp.all(cost <= on_grid.min(axis=1) + 1e-5), f"{penalty} fails for the step {step}"
    each = jnp.asarray(rng.uniform(min(steps), max(steps), points.size), jnp.float32)
    together, alone = penalty.prox(points, each), jax.vmap(penalty.prox)(points, each)
    assert jnp.allclose(together, alone, atol=1e-6), "an array of steps must agree with single steps"


for penalty in (LogSum(1.0), LogSum(0.5, scale=0.2), LogSum(2.0, scale=3.0)):
    check_prox(penalty, steps=(0.1, 0.5, 1.0, 4.0))
print("no grid point beats the prox of LogSum")

# %% alt="LogSum for three scales beside L1, and their proximal operators: a large scale is close to L1, a small one close to L0."
line = jnp.linspace(-4, 4, 1601)
shapes = {"L1": so.L1(1.0), "scale 2": LogSum(2.0, 2.0), "scale 0.5": LogSum(0.5, 0.5), "scale 0.05": LogSum(0.3, 0.05)}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
plots.plot_curves(
    {label: (line, jax.vmap(penalty.value)(line)) for label, penalty in shapes.items()},
    axes[0],
    xlabel="u",
    ylabel="p(u)",
)
plots.plot_curves(
    {label: (line, penalty.prox(line, 1.0)) for label, penalty in shapes.items()},
    axes[1],
    xlabel="x",
    ylabel="prox(x), step 1",
)
axes[1].plot(line, line, color="grey", linewidth=0.8, linestyle=":", zorder=0)
axes[0].set_title("a large scale is like L1, a small one like L0")
_ = axes[1].set_title("and so are the proximal operators (dotted: no change)")

# %% [markdown]
# ## 1. In a trend filter
#
# ### On a grid
#
# The phantom of a head has flat regions with sharp borders, which suits a penalty on differences. Noise of 25 grey
# levels is added. The weights were chosen by trial for both penalties.

# %% alt="The phantom of a head with noise, and the fits with L1 and with LogSum, whose regions are flatter."
clean = 255 * shepp_logan_phantom()[40:360:3, 60:340:3].astype(np.float32)
noisy = clean + rng.normal(0, 25, clean.shape).astype(np.float32)
grid = so.Graph.grid(clean.shape)
fits = {
    "L1": so.trend_filter(noisy, grid, so.L1(15.0), tol=1e-4).check(),
    "LogSum": so.trend_filter(noisy, grid, LogSum(1000.0, scale=25.0), tol=1e-4).check(),
}
pictures = {"with noise": noisy} | {label: np.asarray(solution.value) for label, solution in fits.items()}
figure, axes = plt.subplots(1, 3, figsize=(12, 5), layout="constrained")
for axis, (label, picture) in zip(axes, pictures.items(), strict=True):
    plots.plot_image(picture, axis, title=f"{label}: {psnr(picture, clean):.1f} dB", limits=(0, 255))
for label, solution in fits.items():
    print(f"{label:7s} {so.Status(int(solution.status)).name}, {int(solution.steps)} steps")
assert psnr(pictures["LogSum"], clean) > psnr(pictures["L1"], clean) + 2

# %% [markdown]
# `L1` penalises every grey level of a jump, so it lowers the contrast, and leaves noise that a larger weight would
# remove. For `LogSum` a jump of 200 costs little more than one of 100.
#
# The status is STATIONARY, not CONVERGED: the iteration has settled, but the problem is not convex, so no duality gap
# certifies the answer. (Your own penalty gets a gap by two more methods if it *is* a norm, see
# `sparseopt.core.penalties.protocols.Norm`.)
#
# ### On any other graph
#
# Sensors on a ring are joined to their neighbours, but not across the hole. The signal has four levels.

# %% alt="Sensors on a ring: the measured signal of four levels, and the errors of the best fits with L1 and LogSum. With L1 the sensors along the borders are off; with LogSum nearly none is."
count = 1500
angle, radius = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.uniform(0.2, 1, count))
places = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
sides = Delaunay(places).simplices[:, [[0, 1], [1, 2], [0, 2]]].reshape(-1, 2)
edges = np.unique(np.sort(sides, axis=1), axis=0)
lengths = np.linalg.norm(places[edges[:, 0]] - places[edges[:, 1]], axis=1)
ring = so.Graph.from_edges(edges[lengths < 0.16], count)
truth = np.select([angle < 1.5, angle < 3, angle < 4.7], [0.0, 3.0, 1.0], 4.0)
measured = truth + 0.7 * rng.normal(size=count)


def rmse(fit):
    """Root mean squared error."""
    return float(np.sqrt(np.mean((np.asarray(fit) - truth) ** 2)))


candidates = {
    "L1": [so.L1(weight) for weight in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)],
    "LogSum": [LogSum(weight, scale=0.3) for weight in (0.3, 0.4, 0.5, 0.6, 0.7, 0.9)],
}
figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
plots.plot_graph_signal(ring, places, measured, axes[0], limits=(-1, 5), label="signal", edges=True)
axes[0].set_title(f"measured: rmse {rmse(measured):.2f}")
best = {}
for axis, (label, penalties) in zip(axes[1:], candidates.items(), strict=True):
    tried = [so.trend_filter(measured, ring, penalty, tol=1e-5).check().value for penalty in penalties]
    best[label] = min(tried, key=rmse)
    drawn = axis.scatter(*places.T, s=14, c=best[label] - truth, cmap="RdBu", vmin=-0.6, vmax=0.6)
    axis.set(aspect="equal", xticks=[], yticks=[], facecolor="0.85")
    axis.set_title(f"{label}, best of {len(tried)} weights: rmse {rmse(best[label]):.3f}")
figure.colorbar(drawn, ax=axes[1:], label="fit - truth", extend="both")
assert rmse(best["LogSum"]) < rmse(best["L1"])

# %% [markdown]
# With `L1`, nodes along the borders have moved towards the level of their neighbours, and some sectors have moved as a
# whole. With `LogSum` the four levels are preserved.
#
# ## 2. In the pruner
#
# In `prune_layer` the penalty chooses which weights survive. Its field `weight` is adjusted to the requested sparsity,
# and the kept weights are refitted, so only the choice of the support differs. The layer is synthetic: random weights
# and 2,000 tokens with correlated inputs of unequal size.

# %% alt="The relative output error of a pruned layer against the scale of LogSum, with lines for Wanda, L1 and L0: LogSum is lowest at a scale of 10, slightly below L0."
outputs, inputs = 96, 64
layer = rng.standard_normal((outputs, inputs)).astype(np.float32)
mixing = np.eye(inputs) + rng.normal(size=(inputs, inputs)) / 8
tokens = rng.normal(size=(2000, inputs)) @ mixing * np.exp(0.7 * rng.normal(size=inputs))
gram = tokens.T @ tokens
scales = np.geomspace(0.01, 1000, 16)
by_scale = [so.pruning.prune_layer(layer, gram, 0.6, penalty=LogSum(1.0, float(scale))) for scale in scales]
references = {
    "Wanda": so.pruning.prune_layer(layer, gram, 0.6, method="wanda"),
    "L1": so.pruning.prune_layer(layer, gram, 0.6, penalty=so.L1(1.0)),
    "L0, the default": so.pruning.prune_layer(layer, gram, 0.6),
}
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
curve = [found.relative_error for found in by_scale]
plots.plot_curves(
    {"LogSum": (scales, curve)}, axis, xlabel="scale", ylabel="relative output error", logx=True, markers=True
)
for (label, found), colour in zip(references.items(), plots.COLOURS[1:], strict=False):
    axis.axhline(found.relative_error, color=colour, linestyle="--", label=label)
axis.set(ylim=(0, None), title="60 % of a layer pruned")
axis.legend(frameon=False, ncols=2)
assert all(found.sparsity == references["Wanda"].sparsity for found in by_scale)
assert max(curve) < references["Wanda"].relative_error

# %% [markdown]
# A small scale chooses about the same support as `L0`, a large one as `L1`. The best choice for this layer lies
# between, a little ahead of `L0`. Trying it on yours is quick, since the scale is a leaf and does not recompile.
#
# ## 3. In training
#
# `so.proximal(penalty, step)` is an optax transformation, the last of a chain. After each step of SGD it applies the
# prox, with the learning rate as its step, so training produces exact zeros. `mask` excludes biases.
#
# The model is a perceptron with 12 inputs and 32 hidden units. The target depends on three inputs; the other nine are
# irrelevant, and 400 noisy examples are few enough to overfit. `train` builds the chain inside the jitted function, so
# that one compiled program serves all weights of a penalty.

# %%
FEATURES, HIDDEN, STEPS, NOISE = 12, 32, 6000, 0.3


def examples(count):
    """Inputs and noisy targets: sin(2 x0) + x1 x2 / 1.5."""
    x = rng.uniform(-2, 2, (count, FEATURES))
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] / 1.5 + NOISE * rng.normal(size=count)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


class Perceptron(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs):
        self.first = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, 1, rngs=rngs)

    def __call__(self, x):
        """[count, features] to [count]."""
        return self.second(jnp.tanh(self.first(x)))[:, 0]


def squared_error(model, x, y):
    """The mean over examples."""
    return jnp.mean((model(x) - y) ** 2)


def kernels(params):
    """True for matrices."""
    return jax.tree.map(lambda p: p.ndim == 2, params)


def sgd(penalty):
    """Proximal SGD."""
    return optax.chain(optax.sgd(0.1), so.proximal(penalty, 0.1, mask=kernels))


def adam(penalty):
    """Adam with the prox in its metric."""
    return so.proximal_adam(penalty, 0.01, eps=0.01, mask=kernels)


seen, unseen = examples(400), examples(4000)


def half_error(model):
    """Half of the mean squared error on the training examples."""
    return squared_error(model, *seen) / 2


@nnx.jit(static_argnames="make")
def train(model, penalty, make):
    """STEPS full-batch steps, in place."""
    optimizer = nnx.Optimizer(model, make(penalty), wrt=nnx.Param)

    def body(_, carry):
        model, optimizer = carry
        optimizer.update(model, nnx.grad(half_error)(model))
        return carry

    nnx.fori_loop(0, STEPS, body, (model, optimizer))


def trained(penalty, make):
    """A trained model, its non-zero weights, and its error on unseen examples."""
    model = Perceptron(nnx.Rngs(0))
    train(model, penalty, make)
    kept = sum(int(jnp.count_nonzero(linear.kernel[...])) for linear in (model.first, model.second))
    return model, kept, float(squared_error(model, *unseen))


dense, size, dense_error = trained(so.L1(0.0), sgd)
print(f"dense: {size} weights, error {dense_error:.3f} on unseen examples; the noise alone is {NOISE**2:.3f}")

# %% [markdown]
# Six weights for each penalty, with SGD and with Adam. Adam scales every entry's step separately, so the plain prox
# after it would solve another problem. `so.proximal_adam` takes the prox in Adam's metric, entry by entry, which
# `separable = True` allows. Its `eps` bounds the longest step, `rate / eps` = 1; the prox of `LogSum` is continuous as
# long as step times weight is below scale², here 0.09.

# %% alt="The error on unseen examples against the number of weights that are not zero, for SGD and Adam: LogSum reaches lower errors with fewer weights than L1."
families = {"L1": so.L1, "LogSum, scale 0.3": lambda weight: LogSum(weight, scale=0.3)}
weights = np.geomspace(0.0008, 0.005, 6)
runs = {
    (make, label): [trained(penalty(jnp.float32(weight)), make) for weight in weights]
    for make in (sgd, adam)
    for label, penalty in families.items()
}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
for axis, make, name in zip(axes, (sgd, adam), ("SGD and so.proximal", "so.proximal_adam"), strict=True):
    curves = {label: np.array([run[1:] for run in runs[make, label]]).T for label in families}
    plots.plot_curves(
        curves, axis, xlabel="non-zero weights of 416", ylabel="squared error, unseen examples", markers=True
    )
    axis.axhline(NOISE**2, color="grey", linestyle=":", label="noise")
    axis.set(title=name, ylim=(0, 0.3))
    axis.legend(frameon=False)
lowest = {key: min(error for _, _, error in found) for key, found in runs.items()}
for make in (sgd, adam):
    assert lowest[make, "LogSum, scale 0.3"] < lowest[make, "L1"] < dense_error / 2

# %% [markdown]
# At its best weight each penalty reduces the error to a fraction of the dense model's, since it removes weights that
# only fitted noise. `LogSum` reaches a lower error with fewer weights, because the remaining ones are hardly shrunk.
# The first kernel shows where they are:

# %% alt="The first kernel of three models, 12 inputs by 32 units: the dense one is full, L1 and LogSum keep a few columns of the first three inputs."
picked = {"dense": dense} | {
    label: min(runs[adam, label], key=lambda run: run[2])[0] for label in ("L1", "LogSum, scale 0.3")
}
figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), sharey=True, layout="constrained")
for axis, (label, model) in zip(axes, picked.items(), strict=True):
    kernel = np.asarray(model.first.kernel[...])
    drawn = axis.imshow(np.where(kernel == 0, np.nan, kernel), cmap="RdBu", vmin=-1.5, vmax=1.5)
    axis.set(facecolor="0.85", xlabel="hidden unit", title=f"{label}: {np.count_nonzero(kernel)} of {kernel.size}")
axes[0].set(ylabel="input", yticks=range(0, FEATURES, 2))
_ = figure.colorbar(drawn, ax=axes, label="weight (grey: zero)", shrink=0.8)

# %% [markdown]
# ## 4. In a config
#
# An experiment names your class by its path, `module.Class`; the module may be next to the config or in the current
# folder. So we write the cell above that defines `LogSum` to a file (`In` is IPython's list of executed cells), and
# next to it a config with a sweep over two penalties.

# %%
definition = next(cell for cell in reversed(In[:-1]) if "\nclass LogSum" in cell)
Path("log_sum.py").write_text(definition)
CONFIG = """
name: log-sum
title: Your own penalty on a part of the phantom, noise 25
task: denoise
picture: {name: shepp_logan_phantom, crop: [70, 130, 128, 128]}
noise: 25
sweep:
  list:
    - {penalty: {name: l1, weight: 15}}
    - {penalty: {name: log_sum.LogSum, weight: 1000, scale: 40}}
"""
_ = Path("log-sum.yaml").write_text(CONFIG)

# %% [markdown]
# Importing a path in a config runs its module, so it has to be allowed: in a terminal the command is
# `sparseopt run log-sum.yaml --allow-code`. From here:

# %%
command = [sys.executable, "-m", "sparseopt", "run", "log-sum.yaml", "--allow-code"]
plain = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"} | {"COLUMNS": "110"}
shell = subprocess.run(command, env=plain, capture_output=True, text=True)
print(shell.stdout, shell.stderr)
shell.check_returncode()

# %% [markdown]
# Each run has a folder with the resolved config, its records and plots. A second `sparseopt run` repeats neither run,
# unless the config or the file `log_sum.py` has changed.

# %% alt="A part of the phantom, denoised in two runs: with L1 noise remains, with LogSum the regions are flat."
figure, axes = plt.subplots(1, 2, figsize=(8.5, 4.6), layout="constrained")
gains = []
for axis, folder in zip(axes, sorted(Path("runs/log-sum").glob("*/")), strict=True):
    (record,) = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    fitted = np.load(folder / "picture-repeat-0.npz")["fitted"]
    plots.plot_image(fitted, axis, title=f"{folder.name}: {record['psnr_after']:.1f} dB", limits=(0, 255))
    gains.append(record["psnr_after"] - record["psnr_before"])
    assert record["status"] in ("CONVERGED", "STATIONARY")
print(sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")))
assert gains[1] > gains[0] > 5

# %% [markdown]
# ## What to remember
#
# * Derive the prox by hand, compare all its candidates, and check it on a grid, at several steps.
# * Fields are leaves; `separable = True` only if the value is a sum over entries.
# * If the penalty is not convex, there is no certificate and the start matters. If its prox is not continuous (here:
#   `step * weight > scale²`), a small change may make the answer jump.
#
# Next: [the trend filter in scikit-learn](05_scikit_learn.ipynb).
