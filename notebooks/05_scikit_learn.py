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
# # 5. scikit-learn in ten minutes
#
# `so.GraphTrendFilter` is a scikit-learn regressor, and `so.GraphTrendClassifier` a classifier. They follow its
# conventions: `fit`, `predict`, `score`, `clone`, pipelines and searches work as usual. A sample is
#
# * an observation of a node, if you give a graph: `X` holds node numbers, `[samples, 1]`;
# * a point, if you give none: `X` holds features, and near points are joined.

# %%
import matplotlib.pyplot as plt
import numpy as np
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_sample_image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

import sparseopt as so

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run
rng = np.random.default_rng(0)

# %% [markdown]
# ## A map with holes
#
# A photograph that comes with scikit-learn stands for a map: brightness on a grid of 53 × 80 places. Only 2,000 of the
# 4,240 places were measured, with noise of standard deviation 0.2. The task is to know the others.

# %%
truth = load_sample_image("flower.jpg").mean(axis=2)[:424:8, ::8] / 255
graph = so.Graph.grid(truth.shape)
X = rng.choice(truth.size, 2000, replace=False).reshape(-1, 1)  # node numbers
y = truth.ravel()[X[:, 0]] + 0.2 * rng.normal(size=len(X))
everywhere = np.arange(truth.size).reshape(-1, 1)
unseen = np.setdiff1d(everywhere, X).reshape(-1, 1)
print(graph, f"{len(X):,} measured, {len(unseen):,} unseen")

# %% [markdown]
# ## Fit, predict, score
#
# `alpha` is the weight of the penalty. Order 0 fits a piecewise constant signal. In a notebook, a fitted model shows its
# parameters and how the fit ended. The row `gap` bounds the relative distance to the optimum.

# %%
model = so.GraphTrendFilter(order=0, alpha=0.1, graph=graph).fit(X, y)
model

# %%
pieces = model.solution_.pieces()
print(f"R² on the measured places {model.score(X, y):.3f}, relative gap {model.gap_:.0e}")
print(f"three unseen places: {model.predict(unseen[:3]).round(3)}, truth {truth.ravel()[unseen[:3, 0]].round(3)}")
print(f"{pieces.max() + 1} pieces, the largest of {np.bincount(pieces).max()} places")

# %% [markdown]
# The R² on the measured places says little, since the noise is in it and was seen by the fit.
#
# ## Choose alpha and the order
#
# Cross-validation hides a fifth of the measured places at a time; the fit fills them in. Shuffle the folds: blocks of
# consecutive nodes would be whole regions, which no neighbour can fill in. A graph that is given is the same in all
# folds, so one compiled program serves the search.

# %%
folds = KFold(5, shuffle=True, random_state=0)
settings = {"alpha": [0.02, 0.04, 0.08, 0.16, 0.32], "order": [0, 1]}
search = GridSearchCV(so.GraphTrendFilter(graph=graph, tol=1e-3), settings, cv=folds).fit(X, y)
print("chosen:", search.best_params_)
for order in settings["order"]:
    scores = search.cv_results_["mean_test_score"][search.cv_results_["param_order"] == order]
    print(f"order {order}: R² of the hidden places {scores.round(3)}")

# %% [markdown]
# ## Against nearest neighbours
#
# The usual smoother of scattered values is the mean of the nearest neighbours, equal or weighted by 1 / distance. It
# needs coordinates instead of node numbers: a pipeline translates. Its number of neighbours is chosen on the same
# folds. Then all are scored on new folds, and on the unseen places, whose truth we know.

# %%
places = np.indices(truth.shape).reshape(2, -1).T
to_places = FunctionTransformer(lambda nodes: places[nodes[:, 0].astype(int)])
best = {"trend filter": search.best_estimator_}
for weights in ("uniform", "distance"):
    means = make_pipeline(to_places, KNeighborsRegressor(weights=weights))
    numbers = {"kneighborsregressor__n_neighbors": [3, 5, 8, 12, 20, 30]}
    best[f"neighbours, {weights}"] = GridSearchCV(means, numbers, cv=folds).fit(X, y).best_estimator_
print(f"{'':22}{'R², hidden places':>18}{'rmse, unseen places':>24}")
errors = {}
for name, found in best.items():
    scores = cross_val_score(clone(found), X, y, cv=KFold(5, shuffle=True, random_state=1))
    errors[name] = np.sqrt(np.mean((found.predict(unseen) - truth.ravel()[unseen[:, 0]]) ** 2))
    print(f"{name:22}{scores.mean():10.3f} ± {scores.std():.3f}{errors[name]:24.4f}")
assert errors["trend filter"] == min(errors.values())

# %% alt="Four maps of a flower: the truth, the measured half with noise, the equal mean of the nearest neighbours, which is blurred, and the trend filter, with sharper borders."
measured = np.full(truth.size, np.nan)
measured[X[:, 0]] = y
panels = {"truth": truth.ravel(), "measured (white: not)": measured} | {
    f"{name}: rmse {errors[name]:.3f}": best[name].predict(everywhere)
    for name in ("neighbours, uniform", "trend filter")
}
figure, axes = plt.subplots(1, 4, figsize=(15, 3), layout="constrained")
for axis, (title, values) in zip(axes, panels.items(), strict=True):
    drawn = axis.imshow(values.reshape(truth.shape), vmin=0, vmax=1, interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])
_ = figure.colorbar(drawn, ax=axes, label="brightness", extend="both", shrink=0.8)

# %% [markdown]
# The lead is small beside the spread over the folds. What the trend filter adds is pieces with borders, and a
# certificate. For a smooth field neighbours are as good, and faster.
#
# ## Points and labels, in a pipeline
#
# Without a graph the nodes are the samples, each joined to its `n_neighbors` nearest. Distances need comparable
# features, so scale them first. Breast tumours with 30 measurements, benign or malignant:

# %%
features, labels = load_breast_cancer(return_X_y=True)
candidates = {
    "trend classifier": (so.GraphTrendClassifier(tol=1e-3), {"graphtrendclassifier__alpha": [0.02, 0.05, 0.1, 0.2]}),
    "neighbours": (KNeighborsClassifier(), {"kneighborsclassifier__n_neighbors": [3, 5, 10, 20]}),
    "logistic regression": (LogisticRegression(), {"logisticregression__C": [0.01, 0.1, 1, 10]}),
}
for name, (classifier, settings) in candidates.items():
    found = GridSearchCV(make_pipeline(StandardScaler(), classifier), settings, cv=folds).fit(features, labels)
    spread = found.cv_results_["std_test_score"][found.best_index_]
    (value,) = found.best_params_.values()
    print(f"{name:20} accuracy {found.best_score_:.3f} ± {spread:.3f} at {value}")

# %% [markdown]
# With many features and nearly linear classes a linear model is better. A trend filter is for samples that lie on a
# graph, a map or a line, and whose target jumps or bends in few places.
#
# ## What to remember
#
# * Samples are nodes (`graph=`) or points (`graph=None`). `alpha` is the weight, `order` the shape.
# * After `fit`: `predict`, `score`, `gap_`, `fitted_values_`, and `solution_.pieces()` at order 0.
# * Shuffle the folds. `so.cross_validate` does the same faster, with warm starts.
# * `loss="poisson"`, `"huber"` and others are for counts and outliers.
#
# Next: [all rules that choose a weight](06_choosing_the_level.ipynb).
