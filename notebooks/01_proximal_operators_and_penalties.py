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
# # 1. Use proximal operators and penalties
#
# Sparse optimisation asks for a point that fits data *and* has many exact zeros: in its entries, in its groups, or in
# its differences along a graph. Everything in `sparseopt` rests on one small building block that makes the zeros, the
# **proximal operator** of a penalty $p$ with a step $t > 0$:
#
# $$\operatorname{prox}_{t p}(x) \;=\; \arg\min_u\; \tfrac12 \|u - x\|^2 + t\,p(u).$$
#
# It moves $x$ to a nearby point with a smaller penalty. This lesson shows its effect for each penalty of the package,
# and ends with regression and tomography, solved by `so.solve`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import sparse

import sparseopt as so
from sparseopt.experiments import plots

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run

# %% [markdown]
# ## A prox is a small minimisation
#
# For one number, $u \mapsto \tfrac12 (u - x)^2 + t\,p(u)$ can be drawn. Below, $x = 1.2$ and $t = 1$. The penalty
# $|u|$ has a kink at zero that pulls the minimum in from $x$ by exactly $t$; the penalty $[u \ne 0]$ has a jump at zero
# and is flat elsewhere, so the minimum is either at $x$, unmoved, or at 0.

# %% alt="The cost of u for L1 and for L0, with x = 1.2: the minimum of L1 is at 0.2, the one of L0 is an isolated point at 0."
x, step = 1.2, 1.0
u = jnp.linspace(-1.0, 2.5, 701)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
for axis, penalty in zip(axes, (so.L1(1.0), so.L0(1.0)), strict=True):
    cost = 0.5 * (u - x) ** 2 + step * jax.vmap(penalty.value)(u)
    cost = jnp.where(jnp.abs(u) < 1e-3, jnp.nan, cost)  # leave a gap at 0, where L0 jumps
    plots.plot_curves({"½(u - x)² + t p(u)": (u, cost)}, axis, xlabel="u", ylabel="cost")
    chosen = penalty.prox(jnp.float32(x), step)
    best = 0.5 * (chosen - x) ** 2 + step * penalty.value(chosen)
    axis.plot(chosen, best, "o", color="black", label=f"minimum at prox(x) = {float(chosen):.1f}")
    axis.vlines(x, 0, 2.7, color="grey", linestyle=":", label=f"x = {x}")
    axis.set(title=type(penalty).__name__, ylim=(0, 4))
    axis.legend(frameon=False, loc="upper center")

# %% [markdown]
# With `L0`, the isolated dot at $u = 0$ costs $x^2/2 = 0.72$, while any other $u$ costs at least $t = 1$.
#
# ## Four penalties on one number
#
# | penalty | value for one entry | prox |
# |---|---|---|
# | `L1(w)` | $w\lvert u\rvert$ | soft threshold: towards zero by $tw$ |
# | `L0(w)` | $w\,[u \neq 0]$ | hard threshold: keep $\lvert x\rvert \ge \sqrt{2tw}$ |
# | `MCP(w, gamma)` | $w\lvert u\rvert - u^2/(2\gamma)$ up to $\gamma w$, then flat | soft near 0, identity far out |
# | `SCAD(w, a)` | $w\lvert u\rvert$ up to $w$, a parabola up to $aw$, then flat | as MCP, with three pieces |
#
# The threshold of `L0` is $\sqrt{2tw}$, not $tw$: a weight is a price, and a threshold is a length.
#
# `L1` is convex but biased: it shrinks every entry that survives. `L0` is unbiased but discontinuous: a tiny change of
# $x$ can move the answer by the whole threshold. `MCP` and `SCAD` lie between: continuous for small steps, unbiased for
# large entries, but not convex.

# %% alt="Four penalties, L1, L0, MCP and SCAD, and their proximal operators: L1 shrinks all entries, L0 keeps or removes them, MCP and SCAD leave large ones unchanged."
grid = jnp.linspace(-4, 4, 801)
penalties = {"L1": so.L1(1.0), "L0": so.L0(1.0), "MCP, γ = 3": so.MCP(1.0, 3.0), "SCAD, a = 3.7": so.SCAD(1.0, 3.7)}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
values = {label: jax.vmap(penalty.value)(grid) for label, penalty in penalties.items()}
values["L0"] = jnp.where(jnp.abs(grid) < 1e-3, jnp.nan, values["L0"])  # its jump is drawn as a dot
plots.plot_curves(
    {label: (grid, value) for label, value in values.items()}, axes[0], xlabel="u", ylabel="p(u), weight 1"
)
axes[0].plot(0, 0, "o", color=plots.COLOURS[1], zorder=5)
plots.plot_curves(
    {label: (grid, penalty.prox(grid, 1.0)) for label, penalty in penalties.items()},
    axes[1],
    xlabel="x",
    ylabel="prox(x), step 1",
)
axes[1].plot(grid, grid, color="grey", linewidth=0.8, linestyle=":", zorder=0)
axes[0].set_title("penalties (dot: L0 is 0 at 0 only)")
_ = axes[1].set_title("their proximal operators (dotted: no change)")
# %% [markdown]
# It is easy to be wrong by a factor of two, and a plot does not show it. The definition itself is a test: *no point of
# a fine grid may cost less than the prox.* We check it at random points, for steps on both sides of $\gamma = 3$, where
# the prox of `MCP` changes its shape.

# %%
rng = np.random.default_rng(0)
points = jnp.asarray(rng.uniform(-5, 5, 300), jnp.float32)
candidates = jnp.linspace(-5, 5, 4001)
for label, penalty in penalties.items():
    value = jax.vmap(penalty.value)
    for step in (0.3, 1.0, 5.0):
        found = penalty.prox(points, step)
        cost = 0.5 * (found - points) ** 2 + step * value(found)
        on_grid = 0.5 * (candidates - points[:, None]) ** 2 + step * value(candidates)
        assert jnp.all(cost <= on_grid.min(axis=1) + 1e-5), (label, step)
print(f"no grid point beats the prox: {', '.join(penalties)}")

# %% [markdown]
# ## Penalties on many numbers
#
# A penalty may also be a constraint: its value is 0 if the constraint holds and $+\infty$ otherwise. Its prox is the
# projection onto the constraint set, whatever the step.
#
# * `TopK(k)`: at most $k$ non-zeros in total;
# * `NM(n, m)`: at most $n$ non-zeros in every $m$ consecutive entries, the pattern of sparse tensor cores;
# * `Support(mask)`: zeros outside a given mask.
#
# `GroupL2(w)` is a norm, $w \sum_g \|x_g\|_2$: the entries of a group vanish together or not at all. In the example,
# every second row is small: `TopK` puts most of its zeros there, `NM` the same number in each row, and `GroupL2`
# removes whole rows.

# %% alt="A matrix of 12 × 24 entries and three projections with half of the entries zero: TopK anywhere, NM in every group of four, GroupL2 whole rows."
matrix = jnp.asarray(rng.normal(size=(12, 24)) * np.tile([[0.6], [1.4]], (6, 1)), jnp.float32)
shown = {
    "given": matrix,
    "TopK(144)": so.TopK(144).prox(matrix, 1.0),
    "NM(2, 4) along rows": so.NM(2, 4, axis=1).prox(matrix, 1.0),
    "GroupL2(4), groups = rows": so.GroupL2(4.0, axis=1).prox(matrix, 1.0),
}
figure, axes = plt.subplots(2, 2, figsize=(10, 5.6), layout="constrained")
for axis, (title, values) in zip(axes.flat, shown.items(), strict=True):
    zeros = float(jnp.mean(values == 0))
    axis.imshow(np.where(values == 0, np.nan, values), cmap="RdBu", vmin=-2.5, vmax=2.5, interpolation="nearest")
    axis.set(title=f"{title}: {zeros:.0%} zeros", xticks=range(-1, 24, 4), yticks=[], facecolor="0.85")
    axis.set_xticklabels(range(0, 25, 4))
_ = figure.colorbar(axes[0, 0].images[0], ax=axes, label="entry (grey: exactly zero)", shrink=0.7)
# %% [markdown]
# ## Denoising a sparse vector
#
# Let $y = s + \text{noise}$ with a sparse $s$. The estimate $\arg\min_u \tfrac12\|u - y\|^2 + p(u)$ is a single prox,
# and the weight decides how much is treated as noise. Below, 40 of 1,000 entries are nonzero, with sizes between 2 and
# 6; the noise has standard deviation 0.5. To compare penalties fairly, each is plotted against its threshold.

# %% alt="Left, the error of the estimate against the threshold for L1, L0 and MCP: L0 and MCP reach about half of the smallest error of L1. Right, estimated against true entries: the ones of L1 are too small."
signal = np.zeros(1000, np.float32)
signal[rng.choice(1000, 40, replace=False)] = rng.choice([-1, 1], 40) * rng.uniform(2, 6, 40)
noisy = jnp.asarray(signal + 0.5 * rng.normal(size=1000).astype(np.float32))
thresholds = jnp.linspace(0.02, 4.0, 200)
families = {
    "L1": lambda threshold: so.L1(threshold),
    "L0": lambda threshold: so.L0(threshold**2 / 2),
    "MCP, γ = 3": lambda threshold: so.MCP(threshold, 3.0),
}


def error(make, threshold):
    """Root mean squared error of the estimate."""
    return jnp.sqrt(jnp.mean((make(threshold).prox(noisy, 1.0) - signal) ** 2))


errors = {label: jax.vmap(lambda t, make=make: error(make, t))(thresholds) for label, make in families.items()}
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plots.plot_curves(
    {label: (thresholds, curve) for label, curve in errors.items()},
    axes[0],
    xlabel="threshold",
    ylabel="root mean squared error",
)
axes[0].axhline(float(jnp.sqrt(jnp.mean((noisy - signal) ** 2))), color="grey", linestyle=":")
axes[0].set_title("dotted: the noisy vector itself")
true_entries = np.flatnonzero(signal)
for label, colour in (("L1", plots.COLOURS[0]), ("L0", plots.COLOURS[1])):
    best = thresholds[jnp.argmin(errors[label])]
    estimate = families[label](best).prox(noisy, 1.0)
    axes[1].scatter(signal[true_entries], estimate[true_entries], s=22, color=colour, label=f"{label}, best threshold")
axes[1].plot([-6, 6], [-6, 6], color="grey", linestyle=":")
axes[1].set(xlabel="true entry", ylabel="estimated entry", title="L1 shrinks what it keeps")
axes[1].legend(frameon=False)
best_error = {label: float(curve.min()) for label, curve in errors.items()}
print({label: round(value, 3) for label, value in best_error.items()})
assert best_error["L1"] > 1.5 * best_error["L0"]

# %% [markdown]
# ## Regression: a prox inside an iteration
#
# With a matrix, one prox is not enough. For $b \approx A x$ with more unknowns than equations, the loss is
# `so.LeastSquares(A, b)`, $\tfrac12\|A x - b\|^2$. Solvers alternate a gradient step on the loss and a prox:
#
# $$x \leftarrow \operatorname{prox}_{t p}\bigl(x - t\, A^\top (A x - b)\bigr).$$
#
# `so.solve` has the loop and the stopping rule, and chooses the solver, here an accelerated form of this iteration.

# %%
rows, columns, nonzeros = 120, 400, 12
A = rng.normal(size=(rows, columns)) / np.sqrt(rows)
truth = np.zeros(columns)
truth[rng.choice(columns, nonzeros, replace=False)] = rng.choice([-1, 1], nonzeros) * rng.uniform(1, 3, nonzeros)
b = A @ truth + 0.1 * rng.normal(size=rows)

loss = so.LeastSquares(A.astype(np.float32), b.astype(np.float32))
problem = so.Problem(loss, so.L1(0.1))
lasso = so.solve(problem, tol=1e-5).check()
print(type(so.chosen_solver(problem).solver).__name__, "since it is", so.chosen_solver(problem).why)
print(f"lasso: {jnp.count_nonzero(lasso.value)} non-zeros, {int(lasso.steps)} steps, gap {float(lasso.gap):.0e}")

# %% [markdown]
# The **gap** bounds the relative distance of the objective to its minimum, so the lasso is certified to 1e-5. `.check()`
# raises an error that says what to try if the tolerance was not reached.
#
# ### A whole path at once
#
# Solvers, penalties and problems are JAX pytrees, and a weight is a leaf. So `vmap` over weights solves forty lassos in
# one compiled program; each lane stops on its own.

# %% alt="The lasso path: the coefficients against the weight, on a log axis. The 12 true ones stay apart from zero and shrink as the weight grows; the other 388 lie near zero."
weights = jnp.geomspace(0.02, 1.5, 40)


@jax.jit
@jax.vmap
def solve_path(weight):
    """The lasso for one weight."""
    return so.solve(so.Problem(loss, so.L1(weight)), tol=1e-4)


path = solve_path(weights).check()
figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
for column in np.flatnonzero(truth == 0):
    axis.plot(weights, path.value[:, column], color="0.8", linewidth=0.6)
for column in np.flatnonzero(truth):
    (line,) = axis.plot(weights, path.value[:, column], color=plots.COLOURS[0], linewidth=1.4)
    axis.plot(weights[0], truth[column], "o", color="black", markersize=4)
axis.set(xscale="log", xlabel="weight of L1", ylabel="coefficient")
_ = axis.set_title("lasso path: true coefficients (blue, dots: truth) and the other 388 (grey)")
# %% [markdown]
# ### Hard thresholding
#
# With `L0` the problem is not convex: the iteration ends at a point where no small move helps. There is no certificate,
# the status is STATIONARY, and the point may depend on the start. So compare starts, and keep the lowest objective.

# %%
problem = so.Problem(loss, so.L0(0.1))
starts = {"zero": jnp.zeros(columns), "lasso": lasso.value}
l0 = {name: so.solve(problem, start=start, tol=1e-5).check() for name, start in starts.items()}
support = truth != 0
for name, solution in l0.items():
    kept = np.asarray(solution.value != 0)
    print(
        f"from {name:6s} objective {float(solution.objective):.4f}, {kept.sum():2d} non-zeros, "
        f"{(kept & support).sum():2d} of {nonzeros} true ones"
    )

# %% [markdown]
# `L0` does not shrink what it keeps. The lasso does; a least-squares fit on its support, with the penalty
# `so.Support(mask)`, removes the bias, but then its false entries fit the noise, and the error grows.

# %% alt="The coefficients of three estimates, with dots for the truth: the lasso and the lasso refitted have many small false entries, L0 has the true ones and one more."


def refit(start):
    """The least-squares fit on the support of a start."""
    return so.solve(so.Problem(loss, so.Support(start != 0)), tol=1e-4).check().value


estimates = {
    "lasso": lasso.value,
    "lasso, refitted": refit(lasso.value),
    "L0": l0["lasso"].value,
}
figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
for axis, (name, estimate) in zip(axes, estimates.items(), strict=True):
    estimate = np.asarray(estimate)
    distance = np.linalg.norm(estimate - truth) / np.linalg.norm(truth)
    axis.vlines(np.flatnonzero(estimate), 0, estimate[estimate != 0], color=plots.COLOURS[0])
    axis.plot(np.flatnonzero(support), truth[support], "o", color="black", markersize=4)
    axis.set(xlabel="coefficient number", title=f"{name}\n{(estimate != 0).sum()} non-zeros, error {distance:.1%}")
_ = axes[0].set_ylabel("coefficient (dots: truth)")

# %% [markdown]
# ## Any problem
#
# `so.solve` accepts every problem $\min_x \text{loss}(x) + p(K x)$, with a matrix in the loss *and* a linear map $K$ in
# the penalty, and chooses the solver. An example is tomography: of an image of $32 \times 32$ pixels only sums along
# rays are known, from twelve directions. That is half as many equations as unknowns. A prior replaces the missing ones:
# the image is flat nearly everywhere, so its *differences* are sparse.

# %%
size = 32
centers = (np.arange(size) + 0.5) / size - 0.5
across, down = np.meshgrid(centers, centers)
phantom = 1.0 * (np.hypot(across, down) < 0.45)
phantom += 1.0 * (np.hypot(across + 0.15, down + 0.1) < 0.12) - 0.7 * (np.hypot(across - 0.17, down) < 0.14)
phantom += 0.5 * ((np.abs(across) < 0.2) & (np.abs(down - 0.25) < 0.06))
pixels = np.arange(size**2)
views = size + 16  # rays of one direction, some of which miss the picture


def rays(angles):
    """`[rays, pixels]`: every pixel is shared between the two rays nearest to its center."""
    blocks = []
    for angle in angles:
        place = size * (across.ravel() * np.cos(angle) + down.ravel() * np.sin(angle)) + views / 2 - 0.5
        first = np.floor(place).astype(int)
        shares = np.concatenate([1 - (place - first), place - first])
        where = (np.concatenate([first, first + 1]), np.concatenate([pixels, pixels]))
        blocks.append(sparse.coo_array((shares, where), shape=(views, size**2)))
    return sparse.vstack(blocks).tocsr().astype(np.float32)


def measured(rays):
    """The sums along the rays, with noise."""
    return (rays @ phantom.ravel() + 0.5 * rng.normal(size=rays.shape[0])).astype(np.float32)


scanner = rays(np.pi * np.arange(12) / 12)
scan = measured(scanner)
differences = so.Graph.grid((size, size)).matrix(1).astype(np.float32)
loss = so.LeastSquares(scanner, scan)
problem = so.Problem(loss, so.L1(1.0), differences)
fit = so.solve(problem, so.PrimalDual(), tol=1e-3).check()
print(f"chosen: {type(so.chosen_solver(problem).solver).__name__}")
print(f"tomography: {so.Status(int(fit.status)).name} after {int(fit.steps)} steps, gap {float(fit.gap):.0e}")
assert fit.gap <= 1e-3

# %% [markdown]
# The matrices are SciPy's. `so.chosen_solver` chooses `so.PrimalDual` here, which needs only products with the two
# matrices. The **gap** is a certificate: no image has an objective that is lower by more than this fraction.
#
# ### Choose the weight by its gradient
#
# How large should the weight be? We hold out three further directions. The error there is a function of the weight,
# through the solution of a minimisation problem, and `jax.grad` differentiates it by one linear system from the
# optimality conditions, without unrolling the iterations. `vmap` computes the whole curve for comparison.

# %%
checker = rays(np.pi * np.array([1.5, 5.5, 9.5]) / 12)
check = measured(checker)
dense_checker = jnp.asarray(checker.toarray())


def held_out(log_weight):
    """The mean squared error on the rays that the fit has not seen."""
    weighted = so.Problem(loss, so.L1(jnp.exp(log_weight)), differences)
    return jnp.mean((dense_checker @ so.solve(weighted, so.PrimalDual(), tol=1e-4).value - check) ** 2)


log_weights = jnp.linspace(np.log(0.2), np.log(20), 16)
curve = jax.jit(jax.vmap(held_out))(log_weights)
slope = jax.jit(jax.value_and_grad(held_out))
log_weight, steps = jnp.log(15.0), []
for _ in range(8):
    mean_error, gradient = slope(log_weight)
    steps.append((float(jnp.exp(log_weight)), float(mean_error)))
    log_weight = log_weight - jnp.clip(4 * gradient, -0.7, 0.7)
print(f"weight by gradient: {steps[-1][0]:.1f}, held-out error {steps[-1][1]:.3f}; best of the curve {curve.min():.3f}")
assert steps[-1][1] < 1.05 * curve.min()

# %% alt="Tomography: the true image, the blurred and noisy least-squares fit, the sharp fit with sparse differences, and the held-out error against the weight with the gradient steps at its minimum."
chosen = so.solve(so.Problem(loss, so.L1(steps[-1][0]), differences), so.PrimalDual(), tol=1e-4).value
# The minimum-norm solution, without the weakest directions.
least = np.linalg.lstsq(scanner.toarray(), scan, rcond=0.02)[0]
figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
for axis, (title, values) in zip(
    axes, {"truth": phantom, "least squares": least, "sparse differences": chosen}.items(), strict=False
):
    distance = np.sqrt(np.mean((np.ravel(values) - phantom.ravel()) ** 2))
    axis.imshow(np.reshape(values, (size, size)), cmap="gray", vmin=-0.2, vmax=2.2, interpolation="nearest")
    axis.set(title=title if title == "truth" else f"{title}\nerror {distance:.2f}", xticks=[], yticks=[])
axes[3].plot(jnp.exp(log_weights), curve, color=plots.COLOURS[0], label="vmap")
axes[3].plot(*zip(*steps, strict=True), "o-", color=plots.COLOURS[1], markersize=5, linewidth=1, label="gradient steps")
axes[3].set(xscale="log", xlabel="weight", ylabel="held-out error", title="choosing the weight")
axes[3].legend(frameon=False)

# %% [markdown]
# ## What to remember
#
# * A penalty is two functions, `value(x)` and `prox(x, step)`; the prox makes exact zeros.
# * `L1` is convex and biased; `L0` is unbiased and depends on its start; `MCP` and `SCAD` lie between.
# * `so.solve(so.Problem(loss, penalty, operator))` chooses a solver, certifies the solution if the penalty is convex,
#   and has derivatives.
#
# Next: penalties on the *differences* of a signal, in [trend filtering](02_trend_filtering.ipynb).
