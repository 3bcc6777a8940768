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
# # 13. A path of a lasso, and what it costs
#
# A lasso fits a linear model with few coefficients that are not zero,
#
# $$\min_{x,\,c}\; \tfrac12 \|A x + c - b\|^2 + \lambda\,\|x\|_1 .$$
#
# Few people know their $\lambda$. The usual way out is a **path**: solve for many levels of $\lambda$, from the one
# at which every coefficient is zero downwards, and choose afterwards.
#
# ```python
# path = so.path(so.Problem(so.LeastSquares(A, b, intercept=True), so.L1(1.0)))
# so.select(path, "bic").value
# ```
#
# This lesson draws a path, chooses a level with four rules, checks the certificates, and measures what a hundred levels
# cost.

# %%
import functools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures, scale
from threadpoolctl import threadpool_limits

import sparseopt as so
from sparseopt.experiments import plots

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run
_ = threadpool_limits(1)  # small systems gain nothing from more threads, and times vary less

# %% [markdown]
# ## The data
#
# The diabetes data of scikit-learn: ten measurements of 442 patients, and the progress of the disease a year later.
# With the squares of the measurements and the products of every two of them, the model can bend. Sex has two values, so
# its square says nothing new and is left out. All columns get the mean 0 and the standard deviation 1, since the
# penalty compares coefficients. This is the design of Efron, Hastie, Johnstone and Tibshirani, "Least angle regression"
# (2004).

# %%
data = load_diabetes(scaled=False)
bends = PolynomialFeatures(degree=2, include_bias=False)
A, b = scale(bends.fit_transform(scale(data.data))), data.target
names = bends.get_feature_names_out(data.feature_names)
A, names = A[:, names != "sex^2"], [name.replace(" ", " × ").replace("^2", "²") for name in names if name != "sex^2"]
print(f"{A.shape[0]} patients, {A.shape[1]} columns:", ", ".join(names[:12]), "...")

# %% [markdown]
# ## A hundred levels
#
# `so.path` finds the first level itself. The others are evenly spaced in the logarithm, down to a thousandth of it; with
# fewer rows than columns, to a hundredth. Every level starts at the answer of the one before. The answers are one SciPy
# sparse array with a row for each level; the last entry of a row is the intercept. `check` raises an error if a level
# did not converge.

# %%
problem = so.Problem(so.LeastSquares(A, b, intercept=True), so.L1(1.0))
path = so.path(problem).check()
coefficients = path.values.toarray()[:, :-1]
used = np.count_nonzero(coefficients, axis=1)
explained = 1 - path.deviances / path.deviances[0]
print(f"{len(path)} levels from {path.levels[0]:.0f} to {path.levels[-1]:.1f}, up to {used.max()} coefficients")
for i in (1, 20, 40, 99):
    print(f"level {path.levels[i]:7.1f}: {used[i]:2} coefficients, {explained[i]:.2f} of the deviance explained")
assert (path.gaps <= 1e-6).all()

# %% [markdown]
# ## Choose a level
#
# The deviance falls with every level, so it cannot choose. `so.select` adds a price for each degree of freedom, 2 for
# AIC and $\log 442 = 6.1$ for BIC. The degrees of freedom of a lasso are the coefficients that are not zero, and one for
# the intercept. `so.cross_validate` instead predicts patients that were held out, here a tenth at a time. Its rules are
# the smallest error, and the largest level whose error is within one standard error of the smallest. In the figure, the
# six largest coefficients of that level have colours.

# %%
held_out = so.cross_validate(path, folds=10)
chosen = {
    "AIC": so.select(path, "aic").index,
    "BIC": so.select(path, "bic").index,
    "smallest error": held_out.index_by("min"),
    "one standard error": held_out.index_by("one_se"),
}
for rule, i in chosen.items():
    print(f"{rule:18}  level {path.levels[i]:6.0f}  {used[i]:2} coefficients  held-out error {held_out.errors[i]:.0f}")
simple = chosen["one standard error"]
print("within one standard error:", ", ".join(names[j] for j in np.flatnonzero(coefficients[simple])))
assert used[chosen["BIC"]] <= used[chosen["AIC"]]
assert held_out.errors[simple] <= (held_out.errors + held_out.standard_errors)[chosen["smallest error"]]

# %% alt="Left, the coefficients against the level: all are zero on the right, bmi and s5 enter first, and dozens follow on the left. Right, the held-out error with bars: it is flat between the marked levels and rises on both sides."
figure, axes = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
strongest = np.argsort(-np.abs(coefficients[simple]))[:6]
axes[0].plot(path.levels, coefficients, color="0.75", linewidth=0.8)
for colour, j in zip(plots.COLOURS, strongest, strict=True):
    axes[0].plot(path.levels, coefficients[:, j], color=colour, linewidth=1.8, label=names[j])
axes[0].set(ylabel="coefficient", title="the path, to be read from right to left")
axes[1].errorbar(path.levels, held_out.errors, held_out.standard_errors, color=plots.COLOURS[0], elinewidth=0.6)
axes[1].set(ylabel="mean squared error, held out", title="ten folds")
for axis in axes:
    for (rule, i), dash in zip(chosen.items(), (":", "--", "-.", "-"), strict=True):
        label = rule if axis is axes[1] else None
        axis.axvline(path.levels[i], color="black", linewidth=1, linestyle=dash, label=label)
    axis.set(xscale="log", xlabel="level")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)

# %% [markdown]
# ## A certificate for every level
#
# `path.gaps` bounds the relative distance of each objective from its optimum. The bound follows from a dual point, so it
# holds however the solver came to its answer. The tolerance was $10^{-6}$; the last step of a level usually ends far
# below it.

# %% alt="Three curves against the level: the degrees of freedom fall from 57 to 2 and the explained deviance from 0.6 to 0; the certified gaps of all levels are far below the tolerance of 1e-6."
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
axes[0].step(path.levels, path.degrees_of_freedom, where="mid", color=plots.COLOURS[0])
axes[1].plot(path.levels, explained, color=plots.COLOURS[0])
axes[2].plot(path.levels, path.gaps, ".", color=plots.COLOURS[0], label="certified gap")
axes[2].axhline(1e-6, color=plots.COLOURS[5], linestyle="--", label="tolerance")
axes[2].set(yscale="log", ylim=(1e-17, 1e-5))
axes[2].legend(frameon=False, loc="center right")
for axis, title in zip(axes, ("degrees of freedom", "explained deviance", "relative duality gap"), strict=True):
    axis.set(xscale="log", xlabel="level", title=title)
    axis.grid(alpha=0.25)
print(f"largest gap of the path {path.gaps.max():.1e}")

# %% [markdown]
# ## What it costs
#
# The solver works in rounds. A round multiplies the residual by all columns once, which gives the gap and the columns
# to look at. Then it solves the problem on these few columns. A level of a path usually needs one round, since the level
# before has found most of its columns.
#
# Below are the rounds and seconds of the path, of the chosen level alone and of the last level alone. The second problem
# is wider: 10,000 columns, ten of which matter.


# %%
def seconds(run):
    """The shorter of two times: the first one may include compilation."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        found = run()
        times.append(time.perf_counter() - start)
    return min(times), found


def costs(title, problem, index):
    """Print the cost of a path and of two of its levels."""
    time_of_path, path = seconds(lambda: so.path(problem))
    print(f"{title}: up to {np.diff(path.values.indptr).max() - 1} coefficients in use")
    print(f"    path of 100 levels  {time_of_path:6.3f} s  {path.steps.sum():3} rounds")
    assert path.check().steps.sum() < 200
    for i in (index, 99):
        one = so.Problem(problem.loss, so.L1(path.levels[i]))
        alone, found = seconds(functools.partial(so.solve, one))
        print(f"    level {i} alone      {alone:6.3f} s  {int(found.steps):3} rounds")
        assert np.isclose(float(found.objective), path.objectives[i], rtol=1e-5)


costs("442 × 64", problem, simple)
rng = np.random.default_rng(13)
wide = rng.standard_normal((200, 10_000))
target = wide[:, :10] @ rng.uniform(1, 2, 10) + rng.standard_normal(200)
costs("200 × 10,000", so.Problem(so.LeastSquares(wide, target, intercept=True), so.L1(1.0)), 50)

# %% [markdown]
# Small levels are the expensive ones, since many columns are in use. A path comes to them in small steps, so its hundred
# levels need fewer than two hundred rounds. If you need one sparse level, solve it alone; if you need the last ones only
# for a picture, end the path earlier, with `ratio=0.01`.
#
# ## Another penalty
#
# A path needs a penalty with a weight, and only one line changes. `so.ElasticNet(0.9, 0.1)` adds a ridge, which keeps
# correlated columns together; its degrees of freedom are fewer than its coefficients. `so.Nonnegative(1.0)` allows no
# coefficient below zero.

# %% alt="The coefficients against the level for the elastic net, which has many small ones, and for the nonnegative lasso, which has few, none of them below zero."
figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained", sharey=True)
for axis, penalty in zip(axes, (so.ElasticNet(0.9, 0.1), so.Nonnegative(1.0)), strict=True):
    other = so.path(so.Problem(problem.loss, penalty)).check()
    best = so.select(other, "bic")
    lines = other.values.toarray()[:, :-1]
    axis.plot(other.levels, lines, color="0.75", linewidth=0.8)
    for colour, j in zip(plots.COLOURS, strongest, strict=True):
        axis.plot(other.levels, lines[:, j], color=colour, linewidth=1.8, label=names[j])
    axis.axvline(best.level, color="black", linewidth=1, linestyle="--", label="BIC")
    axis.set(xscale="log", xlabel="level", title=type(penalty).__name__)
    axis.grid(alpha=0.25)
    freedom, count = other.degrees_of_freedom[best.index], np.count_nonzero(best.value[:-1])
    print(
        f"{type(penalty).__name__:11}  BIC: {count} coefficients, {freedom:.1f} degrees of freedom with the intercept"
    )
axes[0].set(ylabel="coefficient")
axes[1].legend(frameon=False, ncols=2, loc="lower left")
assert lines.min() >= 0

# %% [markdown]
# ## A derivative by the level
#
# A path runs on the host and chooses from a grid. Inside your own JAX program use `so.solve`: its answer has a
# derivative by the weight, and by everything else in the problem. Here the error of the first fold is a function of the
# logarithm of the weight. Its derivative agrees with a difference of two solutions.

# %%
inside, outside = held_out.folds != 0, held_out.folds == 0
loss = so.LeastSquares(A[inside], b[inside], intercept=True)


def error(log_weight):
    """The mean squared error of the patients of the first fold."""
    x = so.solve(so.Problem(loss, so.L1(jnp.exp(log_weight)))).value
    return jnp.mean((A[outside] @ x[:-1] + x[-1] - b[outside]) ** 2)


slope = jax.jit(jax.grad(error))
for weight in (1000.0, 5000.0):
    at = np.log(weight)
    difference = (error(at + 0.001) - error(at - 0.001)) / 0.002
    print(f"weight {weight:.0f}: derivative {slope(at):.1f}, difference {difference:.1f}")
    assert abs(slope(at) - difference) < 0.02 * abs(difference)

# %% [markdown]
# The derivative is exact while the same coefficients stay in use, that is, between the corners of the lines in the first
# figure. With it, gradient descent can choose the weight, or one weight for each column, as in
# [Learn weights through the solver](07_learning_through_the_solver.ipynb).
