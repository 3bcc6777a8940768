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
# # 15. Counts on a map with exposure
#
# Four homicides in a county: is that many? It depends on how many people live there. A rate, deaths per person and year,
# answers that, but the rate of a small county is mostly chance. Neighbours often have like rates, so a fit that shares
# strength between them says more:
#
# $$\min_b\; \sum_j \bigl( E_j\, e^{b_j} - d_j\, b_j \bigr) + \lambda \sum_{i \sim j} |b_i - b_j|$$
#
# for the deaths $d_j$, the **exposure** $E_j$ (person-years) and the logarithm $b_j$ of the rate. Counties of one rate
# make a region.

# %%
import importlib.util
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import shapefile
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm
from scipy.special import xlogy

import sparseopt as so

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run

# %% [markdown]
# ## The data
#
# Homicides in 78 counties around St. Louis, in 1979 to 1984, 1984 to 1988 and 1988 to 1993, with the person-years of each
# (Messner, Anselin, Baller, Hawkins, Deane and Tolnay, 1999). They are inside libpysal
# (`pip install --no-deps libpysal pyshp`). Counties that share a corner are neighbours.

# %%
folder = Path(importlib.util.find_spec("libpysal").origin).parent / "examples" / "stl"
with shapefile.Reader(str(folder / "stl_hom.shp")) as file:
    outlines, records = [np.array(shape.points) for shape in file.shapes()], file.records()
corners = {}
for county, outline in enumerate(outlines):
    for corner in {tuple(point) for point in outline.round(6)}:
        corners.setdefault(corner, []).append(county)
pairs = {(i, j) for met in corners.values() for i in met for j in met if i < j}
graph = so.Graph.from_edges(sorted(pairs), len(outlines))
periods = ("7984", "8488", "8893")
deaths = {period: np.array([record[f"HC{period}"] for record in records], float) for period in periods}
people = {period: np.array([record[f"PO{period}"] for record in records]) / 1e5 for period in periods}
print(f"{graph.num_nodes} counties, {graph.num_edges} pairs of neighbours")
print(f"deaths: {[int(deaths[period].sum()) for period in periods]}, the median county {np.median(deaths['7984']):.0f}")

# %% [markdown]
# ## Exposure is a node weight
#
# With the rate $y_j = d_j / E_j$ as the signal and $E_j$ as its weight, the Poisson loss of the trend filter is
# $E_j (e^{b_j} - y_j b_j)$: that of the problem above. A path and a criterion choose $\lambda$.

# %%
first = periods[0]
crude = deaths[first] / people[first]
path = so.trend.trend_path(crude, graph, loss="poisson", node_weights=people[first], tol=1e-6)
chosen = so.select(path, "aic")
validated = so.cross_validate(path)
rate = np.exp(chosen.value)
print(f"AIC: weight {chosen.weight:.2g}, {path.degrees_of_freedom[chosen.index]} regions")
print(f"cross-validation: weight {validated.weight:.2g}, {path.degrees_of_freedom[validated.index]} regions")

# %% [markdown]
# They differ much, and here AIC is right. Cross-validation predicts a county from its neighbours, and the city of
# St. Louis has five times the rate of the counties around it: no smoothness predicts it, so held out, it asks for more
# smoothing everywhere. AIC does not hold anything out. It trusts that deaths are independent given the rate; where they
# come in clusters, as in [lesson 8](08_volumes_and_counts.ipynb), cross-validation is the better one.

# %% alt="Two maps of 78 counties in colours of a logarithmic scale: crude rates that vary from county to county, and the fit, with large regions of one rate and a dark city in the middle."
figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
panels = {"deaths per 100,000 person-years": crude, "fit": rate}
for axis, (title, values) in zip(axes, panels.items(), strict=True):
    drawn = PolyCollection(outlines, array=values, cmap="viridis", norm=LogNorm(0.8, 50, clip=True))
    drawn.set(edgecolor="white", linewidth=0.4)
    axis.add_collection(drawn)
    axis.autoscale_view()
    axis.set(title=title, aspect=1 / np.cos(np.deg2rad(38.8)), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
_ = figure.colorbar(drawn, ax=axes, extend="both")

# %% [markdown]
# ## Which rate holds in later years?
#
# The deviance of later deaths says how well a rate predicts them; the total is scaled to that of the period. Beside the
# fit stand the crude rates, one rate for all, and rates that are pulled to the mean as if every county had had one more
# death at the mean rate: the simplest estimate that shares strength, from all counties instead of neighbours.


# %%
def deviance(period, values):
    """Of the deaths of a period, from rates that have their total."""
    expected = people[period] * np.maximum(values, 1e-3)
    expected *= deaths[period].sum() / expected.sum()
    return 2 * np.sum(xlogy(deaths[period], deaths[period] / expected))


mean = deaths[first].sum() / people[first].sum()
rates = {
    "one rate": np.full(len(crude), mean),
    "crude rates": crude,
    "pulled to the mean": (deaths[first] + 1) / (people[first] + 1 / mean),
    "cross-validation": np.exp(validated.value),
    "AIC": rate,
}
later = {name: [deviance(period, values) for period in periods[1:]] for name, values in rates.items()}
for name, found in later.items():
    print(f"{name:20}" + "".join(f"{value:8.0f}" for value in found))
assert later["AIC"][1] == min(found[1] for found in later.values())

# %% [markdown]
# For the next years the fit halves the deviance of the crude rates. Pulling to the mean does as well at first; nine years
# later the regions predict best.
#
# ## What explains the rates?
#
# `covariates=` puts a coefficient beside the map: here resource deprivation in 1980, an index of poverty, income and
# family structure. The rate is $e^{b_j + x_j \beta}$, and $b$ has what the index does not explain.

# %%
poverty = np.array([record["RDAC80"] for record in records])
options = {"loss": "poisson", "node_weights": people[first]}
beside = so.trend_filter(crude, graph, so.L1(chosen.weight), covariates=poverty, **options).check()
plain = so.trend_filter(crude, graph, so.L1(chosen.weight), **options).check()
print(f"coefficient {beside.beta[0]:.2f}: one unit more is a rate {np.exp(beside.beta[0]):.1f} times as high")
print(f"regions: {plain.pieces().max() + 1} without it, {beside.pieces().max() + 1} with it; gap {beside.gap:.0e}")
print("later:", [round(deviance(period, np.exp(beside.fitted))) for period in periods[1:]])

# %% [markdown]
# ## What to remember
#
# * Rates with exposure: the signal is deaths over exposure, `node_weights` the exposure, `loss="poisson"`.
# * Look at what a rule assumes. Cross-validation needs neighbours that predict a node; AIC needs independent counts.
# * `covariates=` is for what is known of every node. Beside counts no rule chooses the weight, so give one.
# * In the shell: `sparseopt trend --signal rates.csv --graph edges.csv --loss poisson --covariates NAME --weight 1`,
#   without exposure.
