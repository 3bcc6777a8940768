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
# # The guarantees in numbers
#
# Theorems about algorithms are statements that a computer can check. This page takes the guarantees of the two methods
# one by one, states each as a formula, checks it with an `assert`, and plots it. Everything is in float64, so that
# rounding does not matter. The page is a notebook that you can run: `notebooks/theory_in_numbers.py` in a checkout, as
# the tutorials.

# %%
import time
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from skimage.data import camera

import sparseopt as so
from sparseopt.core.problem.problem import Start
from sparseopt.core.solvers.admm import Admm
from sparseopt.experiments import plots

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run
jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(3)

# %% [markdown]
# ## mAIHT
#
# A linear layer with weight $W$ [out, in] and inputs $X$ [tokens, in], in scaled coordinates as the pruner uses them:
# $H$ is the Gram matrix $X^\top X$ with unit diagonal plus a small ridge, $C$ the scaled dense weight [in, out].
#
# $$F(V) = \tfrac12 \langle V - C,\; H (V - C)\rangle + \lambda \|V\|_0$$
#
# The step size $\alpha$ is below $1/L$, where $L$ is the largest eigenvalue of $H$.

# %%
inputs, outputs, tokens = 96, 48, 1000
mixing = np.eye(inputs) + rng.normal(size=(inputs, inputs)) / 3
X = rng.normal(size=(tokens, inputs)) @ mixing
gram = X.T @ X
scale = np.sqrt(np.diag(gram))
hessian = jnp.asarray(gram / np.outer(scale, scale) + 0.03 * np.eye(inputs))
center = jnp.asarray((rng.normal(size=(outputs, inputs)) * scale).T / np.sqrt(tokens))
L = float(jnp.linalg.eigvalsh(hessian)[-1])
weight, alpha = 3.0, 0.97 / L
problem = so.Problem(so.Quadratic(hessian, center), so.L0(weight))
print(f"L = {L:.2f}, step {alpha:.3f}, threshold sqrt(2 α λ) = {np.sqrt(2 * alpha * weight):.3f}")

# %% [markdown]
# ### Promise 1: every plain step descends, and by how much
#
# For the plain step $V^{+} = \operatorname{HT}\bigl(V - \alpha H(V - C)\bigr)$ with $\alpha < 1/L$,
#
# $$F(V^{+}) \;\le\; F(V) - \Bigl(\frac{1}{2\alpha} - \frac{L}{2}\Bigr) \|V^{+} - V\|^2 .$$
#
# A solver is four pure functions, so we can look at each step.

# %% alt="The observed decrease of F in each of 60 steps against the guaranteed decrease, on log axes, for two step sizes: no point lies below the line of equality."


def walk(solver, count):
    """The objectives and points of `count` steps."""
    state = solver.init(problem, center)
    step = jax.jit(solver.step)
    values, points = [float(state.objective)], [state.x]
    for _ in range(count):
        state = step(problem, state)
        values.append(float(state.objective))
        points.append(state.x)
    return np.array(values), points


figure, axis = plt.subplots(figsize=(6.6, 4.6), layout="constrained")
ends = []
for index, fraction in enumerate((0.3, 0.97)):
    values, points = walk(so.ProximalGradient(fraction / L), 60)
    moved = np.array([float(jnp.sum((b - a) ** 2)) for a, b in pairwise(points)])
    promised = (L / (2 * fraction) - L / 2) * moved
    dropped = values[:-1] - values[1:]
    assert (dropped >= promised - 1e-9).all()
    ends += [promised.min(), promised.max()]
    axis.scatter(promised, dropped, s=20, color=plots.COLOURS[index], label=f"60 steps with α = {fraction}/L")
axis.plot(
    [min(ends), max(ends)], [min(ends), max(ends)], color="black", linewidth=1, label="equality; no point may be below"
)
axis.set(xscale="log", yscale="log", xlabel="guaranteed decrease", ylabel="observed decrease of F")
_ = axis.legend(frameon=False)

# %% [markdown]
# The condition matters. With $\alpha = 3/L$ the objective increases:

# %%
too_long, _ = walk(so.ProximalGradient(3 / L), 12)
print("F with α = 3/L:", np.round(too_long).astype(int))
assert too_long[-1] > too_long[0]

# %% [markdown]
# ### Promise 2: mAIHT is accelerated and monotone
#
# Momentum alone may overshoot: plain accelerated methods are not monotone. mAIHT computes an accelerated candidate and,
# if this fails to descend, a plain step from the current point as a monitor; the better one is taken. At a fixed level
# $\lambda$, $F$ never increases.
#
# ### Promise 3: it is faster than plain IHT
#
# `ProximalGradient` with `L0` is iterative hard thresholding without acceleration. Both start at the dense weight. The
# problem is not convex, so they may stop at different points; the curves are relative to the lower of the two final
# values.

# %% alt="The objective above the lowest one, on a log axis, against the step: both curves fall without a rise, mAIHT several times faster than plain IHT."
descents = {
    "plain IHT": so.solve(problem, so.ProximalGradient(alpha), center, tol=1e-11, max_steps=8000, history=True).check(),
    "mAIHT": so.solve(problem, so.Maiht(alpha), center, tol=1e-11, max_steps=8000, history=True).check(),
}
lowest = min(float(solution.objective) for solution in descents.values())
reached = {}
for name, solution in descents.items():
    objective = np.asarray(solution.history.objective)[: int(solution.steps)]
    assert (np.diff(objective) <= 1e-12 * objective[0]).all(), name
    reached[name] = 1 + int(np.argmax(objective <= objective[-1] * (1 + 1e-5)))
    print(f"{name:9s} F = {objective[-1]:.4f}, {reached[name]:3d} steps to within 1e-5 of its final value")
assert reached["mAIHT"] < reached["plain IHT"] / 2
histories = {name: np.asarray(each.history.objective)[: int(each.steps)] for name, each in descents.items()}
above = {name: (1 + np.arange(values.size), values / lowest - 1 + 1e-9) for name, values in histories.items()}
figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
plots.plot_curves(above, axis, xlabel="step", ylabel="(F − lowest F) / lowest F", logy=True)
axis.set_xlim(0, 2 * reached["plain IHT"])
_ = axis.set_title("monotone, and accelerated")

# %% [markdown]
# ### Promise 4: the limit is L-stationary
#
# A fixed point of the plain step is **L-stationary**. With the gradient $G = H(V - C)$:
#
# $$V_i \ne 0:\quad G_i = 0 \ \text{ and }\ |V_i| \ge \sqrt{2 \alpha \lambda};
# \qquad V_i = 0:\quad |G_i| \le \sqrt{2\lambda/\alpha}.$$
#
# So a kept weight is optimal given the others and worth its cost, and no pruned weight has a gradient large enough to
# return. The larger $\alpha$, the stronger the statement. Below, the bound on the weights is tight and the bound on the
# gradients is not: the point is better than the condition requires.

# %% alt="Two histograms: the sizes of the kept weights, all above their bound, and the sizes of the gradient at the pruned weights, all far below theirs."
answer = descents["mAIHT"].value
gradient = np.asarray(problem.loss.gradient(answer))
kept = np.asarray(answer) != 0
entries, pulls = np.abs(np.asarray(answer)[kept]), np.abs(gradient[~kept])
smallest, largest = np.sqrt(2 * alpha * weight), np.sqrt(2 * weight / alpha)
assert np.abs(gradient[kept]).max() < 1e-8
assert entries.min() >= smallest
assert pulls.max() <= largest
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
axes[0].hist(entries, bins=60, color=plots.COLOURS[0])
axes[0].axvline(smallest, color="black", linestyle="--", label="√(2αλ): none may be smaller")
axes[0].set(xlabel="size of a kept weight", ylabel="number of weights", xlim=(0, None))
axes[0].set_title(f"{kept.sum():,} kept weights")
axes[1].hist(pulls, bins=60, color=plots.COLOURS[1])
axes[1].axvline(largest, color="black", linestyle="--", label="√(2λ/α): none may be larger")
axes[1].set(xlabel="size of the gradient at a pruned weight", ylabel="number of weights", xlim=(0, None))
axes[1].set_title(f"{(~kept).sum():,} pruned weights")
for axis in axes:
    axis.legend(frameon=False)

# %% [markdown]
# ## Doge-ADMM
#
# The trend filter $\min_b \tfrac12\|y - b\|^2 + \lambda\|\Delta b\|_1$ is hard because the rows of $\Delta$ overlap: a
# node belongs to several edges. A single row has a closed formula, and rows that share no node are independent. So put
# the rows into groups without common nodes, and treat each group in parallel.
#
# ### Promise 5: groups are disjoint and complete
#
# On a grid the groups follow a formula: 4 groups of edges for order 0, 5 groups of stars for order 1.

# %% alt="A grid of 10 × 10 nodes, twice: its edges in four colours, of which none meet at a node, and its nodes in five, one for each group of stars."
grid, colours = so.Graph.grid((10, 10)), np.array(plots.COLOURS)
places = np.stack(np.divmod(np.arange(100), 10), axis=1)
ends = grid.matrix(1).tocsr().indices.reshape(-1, 2)
figure, axes = plt.subplots(1, 2, figsize=(8.5, 4.4), layout="constrained")
axes[0].add_collection(LineCollection(places[ends], colors=colours[grid.groups(1)], linewidths=4))
axes[0].set_title("edges of one colour share no node")
axes[1].scatter(*places.T, color=colours[grid.groups(2)], s=90)
axes[1].set_title("a node and its neighbours have five colours")
for axis in axes:
    axis.set(aspect="equal", xlim=(-0.5, 9.5), ylim=(-0.5, 9.5), xticks=[], yticks=[])

# %% [markdown]
# On any other graph they come from a colouring. The check needs only the matrix: within a group every column (node) is
# touched by at most one row, and every row is in exactly one group. A node touched by $c$ rows needs at least $c$
# groups; the colouring comes close to this bound.

# %%
points = rng.uniform(size=(400, 2))
near = np.argwhere(np.triu(np.linalg.norm(points[:, None] - points[None], axis=2) < 0.075, 1))
graphs = {"grid 30 × 30": so.Graph.grid((30, 30)), "random geometric": so.Graph.from_edges(near, len(points))}
for name, graph in graphs.items():
    for block, rows in ((1, "edges"), (2, "stars"), (3, "pairs of stars")):
        matrix, labels = graph.matrix(block), graph.groups(block)
        assert labels.shape == (matrix.shape[0],)
        for group in range(labels.max() + 1):
            touched = matrix[labels == group].indices
            assert touched.size > 0
            assert touched.size == np.unique(touched).size, "two rows of a group share a node"
        bound = np.bincount(matrix.indices).max()
        print(f"{name:17s} {matrix.shape[0]:5d} {rows:15s} {labels.max() + 1:3d} groups, at least {bound} are needed")

# %% [markdown]
# ### Promise 6: the duality gap bounds the true error
#
# Any $u$ with $|u_r| \le \lambda$ gives the lower bound $D(u) = \tfrac12\|y\|^2 - \tfrac12\|y - \Delta^\top u\|^2$ on
# the minimum $P^\star$. Hence at every step
#
# $$\frac{P(b) - P^\star}{P^\star} \;\le\; \frac{P(b) - D(u)}{D(u)} = \text{gap}.$$
#
# $P^\star$ is unknown in practice. Here we compute it to twelve digits by a different method (ADMM with an exact linear
# solve), and then follow Doge-ADMM from its first step on: the true error stays below the gap, and the gap is tight.

# %% alt="The duality gap and the true suboptimality of Doge-ADMM against the step, on a log axis, for orders 0 and 1: the gap is always above."
y = camera()[60:124, 200:264].astype(float) + rng.normal(0, 20, (64, 64))
grid = so.Graph.grid(y.shape)
figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True, layout="constrained")
for order, axis in enumerate(axes):
    best = so.trend_filter(y, grid, so.L1(12.0), order, method="admm", tol=1e-12, max_steps=50_000).check()
    doge = so.trend_filter(y, grid, so.L1(12.0), order, so.trend.Doge(cadence=1), tol=1e-9, history=True).check()
    steps = int(doge.steps)
    objective, gap = (np.asarray(part)[:steps] for part in (doge.history.objective, doge.history.gap))
    suboptimality = objective / float(best.objective) - 1
    assert (suboptimality <= gap + 1e-11).all()
    seen = np.isfinite(gap) & (suboptimality > 1e-12)
    count = np.arange(1, steps + 1)[seen]
    curves = {"gap, known while it runs": gap[seen], "true suboptimality": suboptimality[seen]}
    plots.plot_curves(
        {label: (count, values) for label, values in curves.items()},
        axis,
        xlabel="step",
        ylabel="relative to the minimum",
        logy=True,
    )
    axis.set_title(f"Doge-ADMM, order {order}, {y.size:,} pixels")
    assert np.abs(np.asarray(doge.value) - np.asarray(best.value)).max() < 0.05

# %% [markdown]
# ### Promise 7: two forms, one iteration
#
# In the paper every group $i$ has its own copy $\alpha_i$ of the signal and its own dual $\theta_i$, and the groups run
# in parallel. This *literal* form is `method="doge_groups"`. The copies need not be stored: one number for each row of
# $\Delta$ and one array in the shape of the signal determine them all. That is the *fused* form, with one product with
# $\Delta$ and one with $\Delta^\top$ per step. In the paper's metric, where every column counts once for each group,
# both forms have the same iterates. `method="doge"` is the fused form in another metric, which weights a column by the
# sizes of its coefficients. From order 1 on it needs fewer steps.

# %%
small = y[:32, :32] - y[:32, :32].mean()
small_grid = so.Graph.grid(small.shape)
literal = so.trend_solver(small_grid, order=1, method="doge_groups").plans[0]
shape = literal.groups.shape
print(f"{shape[-1]} groups, as booleans of the shape [*rows, groups] = {list(shape)}")
problem = so.Problem(so.LeastSquares(None, jnp.asarray(small)), so.L1(jnp.asarray(12.0)), literal.split)
start = Start(problem.loss.target, jnp.zeros(literal.split.row_shape(problem.loss.target)))
forms = {"literal": literal.solver(1.0), "fused": Admm(literal.node_solve, 1.0, cadence=literal.cadence)}
for count in (10, 50, 250):
    ends = {name: so.solve(problem, solver, start, tol=1e-15, max_steps=count) for name, solver in forms.items()}
    apart = float(jnp.abs(ends["literal"].value - ends["fused"].value).max())
    print(f"after {count:3d} steps: largest difference {apart:.0e}, gap {float(ends['literal'].gap):.1e}")
    assert apart < 1e-9

# %% [markdown]
# The copies cost time, here on an image of 64 × 64 pixels:

# %%


def seconds(fit):
    """The seconds of the second call, which compiles nothing."""
    fit()
    began = time.perf_counter()
    jax.block_until_ready(fit())
    return time.perf_counter() - began


fits = {
    "literal, metric of the paper": lambda: so.trend_filter(y, grid, so.L1(12.0), 1, method="doge_groups", tol=1e-5),
    "fused, own metric": lambda: so.trend_filter(y, grid, so.L1(12.0), 1, method="doge", tol=1e-5),
}
spent = {name: seconds(fit) for name, fit in fits.items()}
for name, fit in fits.items():
    print(f"{name:28s} {int(fit().steps)} steps to a gap of 1e-5, {1e3 * spent[name]:.0f} ms")
assert spent["fused, own metric"] < spent["literal, metric of the paper"]

# %% [markdown]
# Use the fused form to fit signals. Use the literal form to study the published method, to check a result of the paper,
# or to try a new step inside a group.
#
# ### The effect of $\rho$ and of over-relaxation
#
# ADMM converges for every $\rho > 0$ and every relaxation in $(0, 2)$; the theory does not promise how fast. Here we
# fix $\rho$ (`Admm(..., changes=0)`), and count the steps to a gap of $10^{-5}$. Solvers are pytrees, so `vmap` runs
# all values of $\rho$ at once.

# %% alt="The steps to a gap of 1e-5 against a fixed ρ, for three relaxations and two orders: valleys, with the automatic choice as a dashed line near their bottom."
most = 2000
rhos = jnp.geomspace(0.1, 20, 10)
figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True, layout="constrained")
for order, axis in enumerate(axes):
    plan = so.trend_solver(small_grid, order, method="doge").plans[0]
    problem = so.Problem(so.LeastSquares(None, jnp.asarray(small)), so.L1(jnp.asarray(12.0)), plan.split)
    start = Start(problem.loss.target, jnp.zeros(plan.split.row_shape(problem.loss.target)))

    @jax.jit
    def steps_needed(rhos, relaxation, problem=problem, plan=plan, start=start):
        """The steps to a gap of 1e-5 for each fixed rho, NaN for more than `most`."""

        def one(rho):
            solver = Admm(plan.node_solve, rho, relaxation=relaxation, changes=0)
            found = so.solve(problem, solver, start, tol=1e-5, max_steps=most)
            return jnp.where(found.status == so.Status.CONVERGED, found.steps, jnp.nan)

        return jax.vmap(one)(rhos)

    curves = {f"relaxation {r}": (rhos, steps_needed(rhos, r)) for r in (1.0, 1.4, 1.8)}
    plots.plot_curves(
        curves, axis, xlabel="ρ, fixed", ylabel="steps to a gap of 1e-5", logx=True, logy=True, markers=True
    )
    chosen = so.trend_filter(small, small_grid, so.L1(12.0), order, method="doge", tol=1e-5).check()
    axis.axhline(int(chosen.steps), color="black", linestyle="--", linewidth=1.2, label="ρ chosen by trend_filter")
    axis.legend(frameon=False)
    axis.set_title(f"order {order}")
    best = {label: float(jnp.nanmin(steps)) for label, (_, steps) in curves.items()}
    print(f"order {order}: best ρ {best}, automatic ρ {int(chosen.steps)} steps")
    assert best["relaxation 1.8"] < best["relaxation 1.0"]

# %% [markdown]
# A $\rho$ ten times too small costs seven to twelve times the steps, and one ten times too large four to five times. So
# the package chooses it: it starts from an estimate of the noise, balances the sizes of the primal and the dual at
# steps 10, 20, 40, ..., and then keeps it fixed, so that the theory of a fixed $\rho$ applies from there on.
# Over-relaxation is on by default (1.7).
#
# ## What to remember
#
# | promise | holds because |
# |---|---|
# | plain steps descend | $\alpha < 1/L$ |
# | mAIHT descends | the monitor |
# | the limit is L-stationary | a fixed point of the prox step |
# | groups are disjoint and complete | checked whenever they are made |
# | gap ≥ suboptimality | weak duality |
# | both forms have the same iterates | the copies differ only along their group's rows |
