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
# # 8. Volumes, surfaces and counts
#
# Three real problems from other fields: a scan of a head, which has three axes; the surface of a brain, which is a mesh;
# and deaths in the streets of a city, which are counts. All are trend filters,
#
# $$\min_b\; \sum_j f(b_j; y_j) + \lambda\,\text{penalty}(\Delta^{(k+1)} b) ,$$
#
# and in each the data choose the weight $\lambda$.
#
# The data are inside pip packages: `pip install 'sparseopt[volumes]'` and `pip install --no-deps nilearn libpysal pyshp`.

# %%
import importlib.util
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np
import shapefile
from matplotlib.collections import LineCollection
from scipy import sparse
from scipy.sparse.linalg import spsolve
from scipy.spatial import KDTree

import sparseopt as so
from sparseopt.experiments import plots
from sparseopt.experiments.datasets import Picture
from sparseopt.trend import denoise, noise_level
from sparseopt.trend.images import psnr

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run
rng = np.random.default_rng(8)
SIGMA = 15.0

# %% [markdown]
# ## A volume
#
# The template of the brain in nilearn is an average of 152 scans with voxels of 1 mm (ICBM 152; copyright Louis Collins,
# McConnell Brain Imaging Centre, Montreal Neurological Institute). Here are 12 of its slices, with white noise.

# %%
brain = Picture(name="brain", crop=(26, 27, 72, 145, 181, 12))
clean = brain.load()
noisy = clean + SIGMA * rng.normal(size=clean.shape)
print(f"{clean.shape[0]} × {clean.shape[1]} × {clean.shape[2]} voxels, {psnr(noisy, clean):.1f} dB")

# %% [markdown]
# ## The weight
#
# The weight belongs to the noise and to the kind of content, not to the size of the volume. So a part of it is enough
# to choose one.
#
# *Anisotropic* total variation penalises $|d_1| + |d_2| + |d_3|$, the differences along the three axes. It prefers
# surfaces that follow the axes. *Isotropic* total variation penalises the length $\sqrt{d_1^2 + d_2^2 + d_3^2}$ and has
# no such preference.
#
# SURE needs the noise level. The estimate from differences of neighbours also sees the folds of the cortex; an
# estimate from differences of a higher order hardly does.

# %% alt="SURE and the true error against the weight, for anisotropic and isotropic total variation: both curves have their minimum at the same weight."
part = (slice(40, 88), slice(40, 88))
corner, grid = noisy[part], so.Graph.grid(noisy[part].shape)
estimates = [noise_level(corner, grid, order) for order in (0, 1, 2)]
print("noise: true", SIGMA, *(f"order {order}: {value:.1f}" for order, value in enumerate(estimates)), sep="   ")
penalties = {"anisotropic": so.L1(1.0), "isotropic": so.GroupL2(1.0, axis=0)}
levels = np.geomspace(16, 4, 9)
figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
chosen = {}
for axis, (name, penalty) in zip(axes, penalties.items(), strict=True):
    path = so.trend.trend_path(corner, grid, penalty, weights=levels, dtype=np.float32).check()
    chosen[name] = so.select(path, "sure", sigma=estimates[2])
    errors = np.mean((path.values - clean[part]) ** 2, axis=(1, 2, 3))
    plots.plot_selection(chosen[name], axis)
    axis.plot(path.weights, errors, color="#333333", linestyle=":", label="true error")
    axis.legend(frameon=False)
    axis.set_title(f"{name}: weight {chosen[name].weight:.1f}")
    assert errors[chosen[name].index] < 1.1 * errors.min()

# %% [markdown]
# The estimate (SURE) follows the true error, which it does not know. Now the whole volume, and for comparison each slice
# alone, at the best weight for single slices.

# %% alt="A slice of the brain five times: truth, noise, slices denoised alone, and the volume with anisotropic and isotropic total variation, which keep more folds."
fits = {
    name: denoise(noisy, chosen[name].weight, isotropic=name == "isotropic", volume=True)
    for name in ("anisotropic", "isotropic")
}
alone = [denoise(noisy[:, :, place], 11.0, isotropic=True).image for place in range(noisy.shape[2])]
results = {
    "noise": noisy,
    "slices alone": np.stack(alone, axis=2),
    "anisotropic": fits["anisotropic"].image,
    "isotropic": fits["isotropic"].image,
}
decibels = {name: psnr(values, clean) for name, values in results.items()}
for name, value in decibels.items():
    print(f"{name:12} {value:.2f} dB")
assert all(fit.solution.gap <= 1e-4 for fit in fits.values())
assert decibels["isotropic"] > decibels["slices alone"] + 0.5 > decibels["noise"] + 6
figure, axes = plt.subplots(1, 5, figsize=(16, 4.4), layout="constrained")
for axis, (name, values) in zip(axes, {"truth": clean, **results}.items(), strict=True):
    title = name if name == "truth" else f"{name}: {decibels[name]:.1f} dB"
    plots.plot_image(brain.shown(values), axis, title=title, limits=(0, 255))

# %% [markdown]
# Enlarged, the back of the left ventricle. In slices alone the folds of the cortex blur into patches; with the slices
# above and below, more of them survive at the same noise. Both kinds of total variation do equally well here.

# %% alt="The same five images, enlarged at the left ventricle."
figure, axes = plt.subplots(1, 5, figsize=(16, 3.6), layout="constrained")
for axis, (name, values) in zip(axes, {"truth": clean, **results}.items(), strict=True):
    plots.plot_image(brain.shown(values[25:85, 15:75]), axis, title=name, limits=(0, 255))

# %% [markdown]
# ## Thick slices
#
# Scans often have thicker slices than pixels. Take every third slice of the template: neighbours across slices are then
# 3 mm apart, and 1 mm within a slice. `spacing` says so; then the differences are slopes per millimetre, and a step
# between two slices costs a third. Each fit has its own best weight among five.

# %%
thick = Picture(name="brain", crop=(26, 27, 60, 145, 181, 36)).load()[:, :, ::3]
scan = thick + SIGMA * rng.normal(size=thick.shape)
best = {}
for name, spacing in {"equal spacing": None, "spacing (1, 1, 3)": (1, 1, 3)}.items():
    tried = [denoise(scan, w, isotropic=True, volume=True, spacing=spacing).image for w in (6.0, 7.5, 9.0, 10.5, 12.0)]
    best[name] = max(psnr(image, thick) for image in tried)
    print(f"{name:18} {best[name]:.2f} dB")
assert best["spacing (1, 1, 3)"] > best["equal spacing"] + 0.7

# %% [markdown]
# ## A surface
#
# The cortex is a folded sheet. FreeSurfer's average brain, in nilearn (fsaverage5; Fischl, Sereno, Tootell, Dale, Human
# Brain Mapping 8, 1999), has its left half as a mesh of 10,242 points and 20,480 triangles, and at each point the depth of
# the folds. The edges of the triangles are a graph. We add noise with the standard deviation of the depth itself.


# %%
def folder_of(package):
    """The folder of an installed package, which is not imported."""
    return Path(importlib.util.find_spec(package).origin).parent


folder = folder_of("nilearn") / "datasets" / "data" / "fsaverage5"


def stored(name):
    """The arrays of a GIFTI file."""
    return [array.data for array in nibabel.load(folder / f"{name}.gii.gz").darrays]


points, triangles = stored("infl_left")
depth = stored("sulc_left")[0].astype(float)
edges = np.unique(np.sort(triangles[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1), axis=0)
surface = so.Graph.from_edges(edges, len(points))
scatter = depth.std()
measured = depth + scatter * rng.normal(size=len(points))
print(surface, f"noise {scatter:.2f}")

# %% [markdown]
# Order 1 penalises the bends of the depth along the surface. SURE chooses the weight, with the noise level that is
# estimated from the data.

# %% alt="The left half of a brain, coloured by the depth of its folds: truth, with noise, and the fit of order 1, which is close to the truth."
estimated = noise_level(measured, surface, 2)
weights = np.geomspace(4, 0.25, 9) * estimated
bends = so.trend.trend_path(measured, surface, order=1, weights=weights, dtype=np.float32).check()
picked = so.select(bends, "sure", sigma=estimated)
errors = np.sqrt(np.mean((bends.values - depth) ** 2, axis=1))
print(f"noise: true {scatter:.2f}, estimated {estimated:.2f}; weight {picked.weight:.2f}")
print(f"error {errors[picked.index]:.3f}, at the best of the nine weights {errors.min():.3f}")
# The usual smoothing on meshes has the square of the differences as its penalty. Here it has its best weight.
laplacian, identity = sparse.csc_array(surface.matrix(2)), sparse.eye_array(len(points))
smoothed = [spsolve(sparse.csc_array(identity + w * laplacian), measured) for w in (0.5, 0.7, 1.0, 1.4)]
usual = min(np.sqrt(np.mean((values - depth) ** 2)) for values in smoothed)
print(f"error of quadratic smoothing at the best of four weights {usual:.3f}")
assert errors[picked.index] < 0.95 * usual
figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), subplot_kw={"projection": "3d"}, layout="constrained")
for axis, (name, values) in zip(
    axes, {"truth": depth, "noise": measured, "order 1": picked.value}.items(), strict=True
):
    sheet = axis.plot_trisurf(*points.T, triangles=triangles, linewidth=0, antialiased=False, cmap="cividis")
    sheet.set_array(values[triangles].mean(axis=1))
    sheet.set_clim(depth.min(), depth.max())
    axis.view_init(0, 180)
    axis.set_box_aspect(np.ptp(points, axis=0), zoom=1.3)
    axis.set_axis_off()
    axis.set_title(name)
figure.colorbar(sheet, ax=axes, shrink=0.7, label="depth of the folds")

# %% [markdown]
# ## Counts
#
# In 1854 cholera killed hundreds of people in Soho, London. John Snow marked the deaths on a map, and showed that they
# gathered around the water pump in Broad Street. libpysal has his map as data: streets, deaths by house, and pumps.
#
# We cut the streets into pieces of about 20 m. They are the nodes of the graph; pieces that meet or cross are joined: some
# two of their points are at most 1 m apart. Each piece has the number of deaths nearest to it. The map is in the Mercator
# projection of the web, which stretches all lengths near a latitude by the same factor.

# %%
PIECE, REACH, RADIUS = 20.0, 1.0, 6_378_137.0  # metres; the radius of the projection
maps = folder_of("libpysal") / "examples" / "snow_maps"


def read(name):
    """The shapes of a map, and what is said of them."""
    with shapefile.Reader(str(maps / f"{name}.shp")) as file:
        return [np.asarray(shape.points, float) for shape in file.shapes()], file.records()


def along(line):
    """Distances from the first point of a line to each of its points, along the line."""
    return np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])


def at(line, stops):
    """The places at these distances from the first point of a line, along the line."""
    return np.stack([np.interp(stops, along(line), axis) for axis in line.T], axis=1)


def cut(line):
    """Equal pieces of about `PIECE`."""
    points = along(line)
    ends = np.linspace(0, points[-1], max(round(points[-1] / PIECE), 1) + 1)
    return [at(line, np.array([a, *points[(points > a) & (points < b)], b])) for a, b in pairwise(ends)]


def degrees(places):
    """Longitude and latitude."""
    x, y = places.T / (metres * RADIUS)
    return np.rad2deg(np.stack([x, np.arctan(np.sinh(y))], axis=1))


(streets, _), (houses, deaths), (pumps, _) = read("Soho_Network"), read("SohoPeople"), read("SohoWater")
metres = 1 / np.cosh(np.mean(np.concatenate(houses)[:, 1]) / RADIUS)
pieces = [piece for street in streets for piece in cut(metres * street)]
lengths = [along(piece)[-1] for piece in pieces]
points = [at(piece, np.linspace(0, m, int(m / REACH) + 2)) for piece, m in zip(pieces, lengths, strict=True)]
owner = np.repeat(np.arange(len(pieces)), [len(part) for part in points])
tree = KDTree(np.concatenate(points))
pairs = np.sort(owner[tree.query_pairs(REACH, output_type="ndarray")], axis=1)
graph = so.Graph.from_edges(np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0), len(pieces))
nearest = owner[tree.query(metres * np.concatenate(houses))[1]]
counts = np.bincount(nearest, [house["Count"] for house in deaths], len(pieces))
middles = degrees(np.concatenate([at(piece, [m / 2]) for piece, m in zip(pieces, lengths, strict=True)]))
lines, pumps = [degrees(piece) for piece in pieces], degrees(metres * np.concatenate(pumps))
print(f"{graph.num_nodes} pieces of street, {graph.num_edges} edges, {counts.sum():.0f} deaths")
print(f"{np.mean(counts == 0):.0%} of the pieces have none, one has {counts.max():.0f}")

# %% [markdown]
# Counts are not values with noise of one size: a piece where 10 deaths are expected varies more than one where 0.1 is.
# `loss="poisson"` says so. The fit $b$ is then the logarithm of the rate, and the rate is positive.
#
# Deaths came by household, up to 18 in one house, so they vary more than independent ones do. A criterion that relies
# on the Poisson distribution, such as AIC, mistakes such a house for signal and chooses a small weight. Cross-validation
# does not: it predicts each piece from the others.

# %% alt="The held-out deviance against the weight, with bars of one standard error: it is smallest at 1.25."
path = so.trend.trend_path(counts, graph, loss="poisson", num=20, ratio=1e-2)
validated = so.cross_validate(path).check()
by_aic = so.select(path, "aic")
for rule, index in {"AIC": by_aic.index, "cross-validation": validated.index}.items():
    print(f"{rule:16} weight {path.weights[index]:.2f}, {path.degrees_of_freedom[index]} pieces of equal rate")
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
plots.plot_cross_validation(validated, axis)
assert 0 < validated.index < len(path) - 1
assert by_aic.weight < validated.weight

# %% [markdown]
# Order 0 gives rates that are equal along a street and jump; order 1 lets them decay from the centre.

# %% alt="Street maps of Soho: deaths, and the rates of order 0 and 1. Both rates are highest around one pump in the middle."
lines_of_rates = so.trend.trend_path(counts, graph, order=1, loss="poisson", weights=np.geomspace(40, 2, 8), tol=1e-3)
smooth = so.cross_validate(lines_of_rates).check()
rates = {0: np.exp(validated.value), 1: np.exp(smooth.value)}
panels = {"deaths": counts, "rate, order 0": rates[0], "rate, order 1": rates[1]}
figure, axes = plt.subplots(1, 3, figsize=(17, 5.2), layout="constrained")
for axis, (title, values) in zip(axes, panels.items(), strict=True):
    order = np.argsort(values, kind="stable")  # where lines meet, the highest covers the others
    drawn = LineCollection([lines[place] for place in order], array=values[order], cmap="viridis", clim=(0, 8))
    drawn.set(linewidths=3, capstyle="round")
    axis.add_collection(drawn)
    axis.plot(*pumps.T, "^", color=plots.COLOURS[5], markersize=8, markeredgecolor="white")
    axis.set(title=title, aspect=1 / np.cos(np.deg2rad(51.5)), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
figure.colorbar(drawn, ax=axes, label="deaths on 20 m of street", extend="max")

# %% [markdown]
# The triangles are the pumps. Both fits find one centre. How far is it from a pump?

# %%
METRES = 111_195 * np.array([np.cos(np.deg2rad(51.5)), 1])
for order, rate in rates.items():
    centre = middles[rate.argmax()]
    apart = np.linalg.norm((pumps - centre) * METRES, axis=1)
    print(f"order {order}: highest rate {rate.max():.1f} deaths on 20 m, {apart.min():.0f} m from a pump")
    assert apart.min() < 60
    assert np.isclose(rate.sum(), counts.sum(), rtol=1e-2)

# %% [markdown]
# It is the pump in Broad Street. Snow had its handle removed.
#
# ## What to remember
#
# * `denoise(volume=True)` accepts three axes; `isotropic=True` has no preferred direction; `spacing` is for thick slices.
# * Choose the weight on a part of a large volume. If the content is rich, estimate the noise from differences of a
#   higher order.
# * Any mesh is a graph: the sorted, distinct edges of its triangles.
# * `loss="poisson"` is for counts, and paths, criteria and cross-validation take it too. If counts come in clusters,
#   cross-validate.
#
# The volume as an experiment with a config: `sparseopt run denoise-volume`. Signals in your own files: `sparseopt trend`, or
# the task `trend` in a config.
