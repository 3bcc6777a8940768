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
# # 14. A time series with dates, a season and jumps
#
# A series of months has three parts that people ask for: the **season**, which comes back every year; the **trend**
# beside it; and the dates at which the trend **jumps** or bends. The usual way is one tool for each: a decomposition,
# then a smoother, then a search for change points, each with a setting of its own.
#
# Here trend and season are one problem with one certificate,
#
# $$\min_{t,\,s}\; \tfrac12 \|y - t - s\|^2 + \lambda\,\|\Delta^{(k+1)} t\|_1, \qquad s \text{ periodic with the sum } 0,$$
#
# and `so.trend.jumps` finds the dates without a setting. Beside them stand STL of statsmodels and PELT of ruptures.

# %%
import matplotlib.pyplot as plt
import numpy as np
import ruptures
from statsmodels.datasets import elec_equip
from statsmodels.tsa.seasonal import STL

import sparseopt as so
from sparseopt.experiments import plots

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run

# %% [markdown]
# ## The data
#
# The turnover of makers of electrical equipment in the euro area, by month from 1995 to May 2016, as an index. It is
# inside statsmodels (`pip install statsmodels ruptures`).

# %%
table = elec_equip.load().data
dates, y = table.index.to_numpy(), table.iloc[:, 0].to_numpy(float)
n = len(y)
chain = so.Graph.chain(n)
print(f"{n} months, from {str(dates[0])[:7]} to {str(dates[-1])[:7]}")

# %% [markdown]
# ## Trend and season
#
# `season=12` counts rows, so every month needs one; a month that was not observed is a NaN with `missing="nan"`. Order 1
# makes the trend a chain of straight lines. `choose_weight` chooses $\lambda$ by generalised cross-validation, with the
# season taken out.

# %% alt="The index with its fit, the trend of straight lines with a deep fall in 2008 and 2009, and the season of twelve bars."
weight = so.trend.choose_weight(y, chain, order=1, season=12).weight
fit = so.trend_filter(y, chain, so.L1(weight), order=1, season=12).check()
print(f"weight {weight:.3g}, {len(fit.knots())} bends, relative duality gap {fit.gap:.1e}")
print("largest months:", np.argsort(-fit.season[:12])[:2] + 1, "smallest:", np.argmin(fit.season[:12]) + 1)

figure, axes = plt.subplots(3, 1, figsize=(9, 8), layout="constrained", height_ratios=(3, 3, 2))
axes[0].plot(dates, y, ".", color="0.55", label="observed")
axes[0].plot(dates, fit.fitted, color=plots.COLOURS[1], label="trend and season")
axes[1].plot(dates, y - fit.season, ".", color="0.55", label="observed, without the season")
axes[1].plot(dates, fit.value, color=plots.COLOURS[1], label="trend")
axes[2].bar(np.arange(1, 13), fit.season[:12], color=plots.COLOURS[0])
axes[2].set(xlabel="month", ylabel="season", xticks=np.arange(1, 13))
for axis in axes[:2]:
    axis.set_ylabel("index")
    axis.legend(frameon=False)

# %% [markdown]
# August is the month of holidays, and the last month of a quarter has the most turnover.
#
# ## What is it worth? Months that nobody saw
#
# A decomposition is judged by what it says of months that it has not seen. We hide a tenth of the months, ten times. Our
# fit takes them as missing. STL needs a value in every month, so it gets a straight line between the neighbours, as
# pandas' `interpolate` does, with its own defaults; the prediction is its trend with its season.


# %%
def errors(hidden):
    """The root mean squared errors in hidden months, of our fit, of STL, and of the line between neighbours."""
    seen = np.where(hidden, np.nan, y)
    chosen = so.trend.choose_weight(seen, chain, order=1, season=12, missing="nan").weight
    ours = so.trend_filter(seen, chain, so.L1(chosen), order=1, season=12, missing="nan").check().fitted
    filled = np.interp(np.arange(n), np.flatnonzero(~hidden), y[~hidden])
    theirs = STL(filled, period=12).fit()
    return [np.sqrt(np.mean((y - each)[hidden] ** 2)) for each in (ours, theirs.trend + theirs.seasonal, filled)]


rng = np.random.default_rng(0)
drawn = np.array([errors(rng.permutation(n) < n // 10) for _ in range(10)])
for name, values in zip(("here", "STL", "a line between neighbours"), drawn.T, strict=True):
    print(f"{name:26} {values.mean():.2f} ± {values.std() / 10**0.5:.2f}")
assert drawn.mean(axis=0).argmin() == 0

# %% [markdown]
# STL pays for the filled values: it mistakes them for observations. In turn its season may change over the years, which
# ours does not: where the habits of a year change slowly and all months are there, STL's season fits better.
#
# ## Jumps and bends
#
# When did the trend change? `jumps` fits constants or lines without shrinkage, and chooses their number by a criterion
# that survives noise that is correlated. A **jump** is a step, a **bend** a place where two lines meet.

# %% alt="The index without its season, with lines and vertical marks at six dates; the fall of 2008 stands out."
found = so.trend.jumps(y - fit.season)
for row in found.table([str(date)[:7] for date in dates]):
    print({name: value if isinstance(value, str) else np.round(value, 2).tolist() for name, value in row.items()})
axis = plt.subplots(figsize=(9, 4), layout="constrained")[1]
axis.plot(dates, y - fit.season, ".", color="0.55", label="observed, without the season")
axis.plot(dates, found.fit, color=plots.COLOURS[1], label="lines between jumps and bends")
for place in found.places:
    axis.axvline(dates[place], color=plots.COLOURS[0], linewidth=0.8, linestyle="--")
axis.set_ylabel("index")
axis.legend(frameon=False)

# %% [markdown]
# The lines turn where the crash of the dot-coms began, where the market recovered in 2003, and around the crisis of 2008,
# which took 28 points of the index at once.
#
# PELT needs a penalty; its users take 3 log n for a series of variance 1. Its model of the mean has constants only, and
# so puts a step wherever a slope has gone far enough:

# %%
level = (y - fit.season) / np.std(y - fit.season)
steps = ruptures.Pelt(model="l2").fit(level).predict(pen=3 * np.log(n))[:-1]
print("PELT:", [str(dates[place])[:7] for place in steps])
print("here:", [str(dates[place])[:7] for place in found.places])

# %% [markdown]
# ## With p-values
#
# The intervals above are approximate: the jumps were found in the same months in which their sizes are measured. Where
# the law of the noise is known, **data thinning** splits every value into two independent parts. Jumps are found in one
# and tested in the other, so the p-values are honest. For independent Gaussian noise of the deviation that the residuals
# have:

# %%
noise = float(np.std(y - fit.fitted))
thinned = so.trend.jumps(y - fit.season, thin=so.trend.Thinning("gaussian", noise=noise))
for fact in thinned.facts([str(date)[:7] for date in dates]):
    print(fact)

# %% [markdown]
# ## What to remember
#
# * `season=` and `covariates=` go into `trend_filter`, `choose_weight` and the estimators; the fit has `value`, `season`,
#   `beta` and `fitted`, one gap for all, and values at missing months.
# * `jumps` needs no setting; take the season out first.
# * In the shell: `sparseopt trend --signal FILE.csv --order 1 --season 12 --output FIT.csv`, with dates from a column
#   `date`, and `sparseopt trend --signal FILE.csv --output FIT.csv` for the jumps.
