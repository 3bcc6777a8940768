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
# # 7. Learn weights through the solver
#
# A total-variation denoiser has one weight for the whole image. It could be larger on a wall and should be smaller on
# a brick texture. `L1` takes a weight for every difference, so a small network can choose them from the noisy image:
#
# $$\hat b(y; \theta) = \arg\min_b\; \tfrac12 \|y - b\|^2 + \sum_e w_e(y; \theta)\, |(Db)_e|,
# \qquad w_e(y; \theta) = \exp\bigl(\text{network}_\theta(\text{features of } y \text{ near } e)\bigr).$$
#
# The parameters $\theta$ are learnt by gradient descent on the error of the *fit*, so the gradient passes through the
# minimisation. This lesson trains the network on crops of six images, tests it on four others, and compares it with
# the best single weight.
#
# It is a small version of Kofler and others, "Learning regularization parameter-maps for variational image
# reconstruction using deep neural networks and algorithm unrolling" (2023). They differentiate through the iterations;
# we do not.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from skimage import data
from skimage.color import rgb2gray

import sparseopt as so
from sparseopt.experiments import plots

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run

# %% [markdown]
# ## Images
#
# All images come with scikit-image. None of the four test images is used in training, and the crops are at random
# positions. The noise has a standard deviation of 20 grey levels, which we assume to be known.

# %%
noise = 20.0
training_pictures = ["brick", "camera", "chelsea", "coins", "immunohistochemistry", "text"]
test_pictures = ["astronaut", "coffee", "page", "rocket"]
rng = np.random.default_rng(7)


def crops(names, size, count):
    """Clean and noisy crops, `[len(names) * count, size, size]` each."""
    clean = []
    for name in names:
        picture = getattr(data, name)()
        picture = picture if picture.ndim == 2 else 255 * rgb2gray(picture)
        corners = rng.integers(0, np.array(picture.shape) - size + 1, (count, 2))
        clean += [picture[top : top + size, left : left + size] for top, left in corners]
    clean = np.stack(clean).astype(np.float32)
    return jnp.asarray(clean), jnp.asarray(clean + noise * rng.normal(size=clean.shape), jnp.float32)


def psnr(pictures, clean):
    """The PSNR of each picture, in decibels."""
    return 10 * jnp.log10(255**2 / jnp.mean((pictures - clean) ** 2, axis=(-2, -1)))


training_size, test_size, per_test_picture = 32, 96, 3
clean, noisy = crops(training_pictures, training_size, 20)
test_clean, test_noisy = crops(test_pictures, test_size, per_test_picture)

# %% [markdown]
# ## The solver
#
# `so.trend_solver` does the host work once: the tables of the grid and the choice of a method. It returns a pure
# function of the signal and the penalty, which can be compiled, batched and differentiated. One solver is for the small
# training crops and one for the larger test crops. The weight may be one number or one for each row of
# `graph.matrix(1)`.

# %%


def denoiser(size):
    """A function of a noisy picture and its weights, and the two pixels of each difference."""
    grid = so.Graph.grid((size, size))
    solver = so.trend_solver(grid, order=0)
    ends = grid.matrix(1).indices.reshape(-1, 2).T  # a row of the matrix holds -1 and 1
    return lambda y, weights: solver(y, so.L1(weights), tol=1e-3).value, ends


denoise, ends = denoiser(training_size)
denoise_test, test_ends = denoiser(test_size)

# %% [markdown]
# ## The baseline: one weight
#
# We try 17 weights on all crops. The best weight for the training crops is what one would use in practice. The best
# weight for the *test* crops needs their clean images. No single weight can do better, so this is our baseline.

# %%
weights = noise * jnp.geomspace(0.2, 2, 17)


def curve(denoise, noisy, clean):
    """PSNR of every weight on every crop, `[weights, crops]`."""
    return jax.lax.map(lambda weight: psnr(jax.vmap(lambda y: denoise(y, weight))(noisy), clean), weights)


training_curve = jax.jit(curve, static_argnums=0)(denoise, noisy, clean)
test_curve = jax.jit(curve, static_argnums=0)(denoise_test, test_noisy, test_clean)
best = {"training": jnp.argmax(training_curve.mean(axis=1)), "test": jnp.argmax(test_curve.mean(axis=1))}
for name, index in best.items():
    print(f"best single weight for the {name} crops: {weights[index]:.1f}, on test {test_curve[index].mean():.2f} dB")

# %% [markdown]
# ## Features
#
# Ten numbers describe the two pixels of each difference and their surroundings:
#
# * at four blurs, two of the noisy image and two of a pilot fit with a single weight: the size of the difference, and
#   the mean squared slope nearby;
# * the mean squared residual of the pilot nearby, at two scales. If it is larger than the noise, the pilot has removed
#   some of the signal.
#
# Nothing here needs the clean image. All are logarithms of squares in units of the noise.

# %%


def blurred(picture, width):
    """The picture blurred by a Gaussian with this standard deviation in pixels."""
    reach = round(3 * width)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * width**2))
    along_rows = jax.vmap(lambda row: jnp.convolve(row, kernel / kernel.sum(), "valid"))
    return along_rows(along_rows(jnp.pad(picture, reach, mode="symmetric")).T).T


def features(y, denoise, ends):
    """The features of each difference, `[differences, 10]`."""
    pilot = denoise(y, 0.6 * noise) / noise
    y = y / noise

    def at_ends(values):
        return values.ravel()[ends]

    found = []
    for picture, nearby in ((blurred(y, 1), 1), (blurred(y, 2), 2), (pilot, 1), (blurred(pilot, 2), 2)):
        down, across = jnp.gradient(picture)
        slope = blurred(down**2 + across**2, nearby)
        first, second = at_ends(picture)
        found += [jnp.log(0.02 + (first - second) ** 2), at_ends(jnp.log(0.02 + slope)).mean(axis=0)]
    for nearby in (1, 3):
        found.append(at_ends(jnp.log(0.1 + blurred((y - pilot) ** 2, nearby))).mean(axis=0))
    return jnp.stack(found, axis=-1)


seen = jax.jit(jax.vmap(lambda y: features(y, denoise, ends)))(noisy)
test_seen = jax.jit(jax.vmap(lambda y: features(y, denoise_test, test_ends)))(test_noisy)
center, spread = seen.mean(axis=(0, 1)), seen.std(axis=(0, 1))  # of the training crops
seen, test_seen = (seen - center) / spread, (test_seen - center) / spread

# %% [markdown]
# ## The network
#
# One hidden layer of eight units, 97 parameters, shared by all differences. Its last layer starts at zero, so training
# starts from the single weight of the pilot.

# %%
hidden = 8
parameters = {
    "inward": jnp.asarray(rng.normal(size=(seen.shape[-1], hidden)) / np.sqrt(seen.shape[-1]), jnp.float32),
    "shift": jnp.zeros(hidden),
    "outward": jnp.zeros(hidden),
    "level": jnp.log(0.6),
}
print(f"{sum(leaf.size for leaf in jax.tree.leaves(parameters))} parameters for {ends.shape[1]:,} weights per crop")


def row_weights(parameters, seen):
    """The weights of the differences, `[..., differences]`."""
    units = jnp.tanh(seen @ parameters["inward"] + parameters["shift"])
    return noise * jnp.exp(units @ parameters["outward"] + parameters["level"])


# %% [markdown]
# ## Training
#
# The loss is minus the mean PSNR of a batch of fits. `jax.vmap` solves the batch, and `jax.value_and_grad` works
# directly, since the solver defines its own derivative. At a solution of `L1` it is known which differences are zero,
# and small changes of the weights do not alter this. Linear equations remain, so **the gradient costs one linear
# solve**, however many iterations the fit took, and no memory for them.

# %%


def loss(parameters, seen, noisy, clean):
    """Minus the mean PSNR."""
    fits = jax.vmap(denoise)(noisy, row_weights(parameters, seen))
    return -jnp.mean(psnr(fits, clean))


steps, batch = 150, 12
optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))


@jax.jit
def step(parameters, state, chosen):
    """One step of Adam on the crops chosen."""
    value, slope = jax.value_and_grad(loss)(parameters, seen[chosen], noisy[chosen], clean[chosen])
    updates, state = optimizer.update(slope, state)
    return optax.apply_updates(parameters, updates), state, value


state, gains = optimizer.init(parameters), []
for _ in range(steps):
    chosen = jnp.asarray(rng.choice(len(clean), batch, replace=False))
    parameters, state, value = step(parameters, state, chosen)
    gains.append(float(-value - training_curve[best["training"], chosen].mean()))


def seconds(function):
    """The seconds of the fastest of ten calls; the first one compiles."""
    spent = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(function())
        spent.append(time.perf_counter() - began)
    return min(spent)


given = (parameters, seen[chosen], noisy[chosen], clean[chosen])
forward, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
alone, with_gradient = seconds(lambda: forward(*given)), seconds(lambda: both(*given))
print(f"{batch} fits: {1e3 * alone:.0f} ms, with the gradient {1e3 * with_gradient:.0f} ms")

# %% [markdown]
# The gradient costs one linear solve for each fit.

# %% [markdown]
# ## Held-out images

# %%


@jax.jit
def learnt(parameters):
    """The weights and the fits of the test crops."""
    weights = row_weights(parameters, test_seen)
    return weights, jax.vmap(denoise_test)(test_noisy, weights)


learnt_weights, learnt_fits = learnt(parameters)
scores = {
    "noisy": psnr(test_noisy, test_clean),
    "one weight, best for training": test_curve[best["training"]],
    "one weight, best for test": test_curve[best["test"]],
    "best weight of each crop": test_curve.max(axis=0),
    "learnt weights": psnr(learnt_fits, test_clean),
}
print(f"{'PSNR in dB':30s}" + "".join(f"{name:>11s}" for name in [*test_pictures, "mean"]))
for name, score in scores.items():
    by_picture = score.reshape(-1, per_test_picture).mean(axis=1)
    print(f"{name:30s}" + "".join(f"{value:11.2f}" for value in [*by_picture, score.mean()]))
gain = scores["learnt weights"] - scores["one weight, best for test"]
print(
    f"learnt weights gain {gain.mean():.2f} dB over the best single weight, on {(gain > 0).sum()} of {gain.size} crops"
)
assert gain.mean() > 0.3

# %% alt="Left, the PSNR of held-out crops against a single weight, with the learnt weights as a line 1 dB above its maximum. Right, the gain on training crops grows during training."
figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
axes[0].plot(weights, test_curve.mean(axis=1), "o-", color=plots.COLOURS[0], label="one weight")
axes[0].axhline(scores["learnt weights"].mean(), color=plots.COLOURS[1], label="learnt weights")
axes[0].set(xscale="log", xlabel="weight", ylabel="mean PSNR (dB)", title="held-out crops")
axes[0].set_xticks([4, 10, 20, 40], ["4", "10", "20", "40"])
axes[0].minorticks_off()
axes[0].legend(frameon=False)
smoothed = np.convolve(gains, np.ones(15) / 15, "valid")
axes[1].plot(gains, color="0.8", label="single batches")
axes[1].plot(np.arange(7, 7 + len(smoothed)), smoothed, color=plots.COLOURS[1], label="mean of 15 batches")
axes[1].set(xlabel="step of Adam", ylabel="gain over the best single weight (dB)", title="training crops")
_ = axes[1].legend(frameon=False)

# %% [markdown]
# The learnt weights beat even the best weight of each crop, which no rule could know. The gain depends on the images:
# with two other splits of these ten into training and test, it was 0.4 and 0.9 dB.
#
# Below is the first crop of each test image. The map shows the mean weight of the differences at each pixel: low on
# texture and edges, high on flat areas.

# %% alt="Four rows, one for each test image: the clean crop, the noisy one, the best single weight, the map of learnt weights, low on edges and texture, and the learnt fit."
single_fits = jax.jit(jax.vmap(lambda y: denoise_test(y, weights[best["test"]])))(test_noisy)
touching = np.bincount(test_ends.ravel(), minlength=test_size**2)
figure, axes = plt.subplots(4, 5, figsize=(14, 11), layout="constrained")
for row, index in enumerate(range(0, len(test_clean), per_test_picture)):
    on_pixels = np.bincount(test_ends.ravel(), np.tile(learnt_weights[index], 2)) / touching
    shown = {
        test_pictures[row]: test_clean[index],
        f"noisy: {scores['noisy'][index]:.1f} dB": test_noisy[index],
        f"best single weight: {scores['one weight, best for test'][index]:.1f} dB": single_fits[index],
        "learnt weights": on_pixels.reshape(test_size, test_size),
        f"learnt fit: {scores['learnt weights'][index]:.1f} dB": learnt_fits[index],
    }
    for axis, (title, values) in zip(axes[row], shown.items(), strict=True):
        if title == "learnt weights":
            drawn = axis.imshow(values, cmap="viridis", norm="log", vmin=4, vmax=60, interpolation="nearest")
            axis.set(title=title, xticks=[], yticks=[])
        else:
            plots.plot_image(np.asarray(values), axis, title=title, limits=(0, 255))
scale = figure.colorbar(drawn, ax=axes, location="right", shrink=0.6, label="weight")
scale.minorticks_off()
scale.set_ticks([4, 10, 20, 50], labels=["4", "10", "20", "50"])

# %% [markdown]
# ## Are the derivatives right?
#
# We compare with central differences, in float64. Here the solver is for a chain at order 1, and a function of its
# fit is differentiated in all arguments of a call: the signal, a weight for each row, and the node weights.

# %%
jax.config.update("jax_enable_x64", True)
nodes = 60
chain = so.Graph.chain(nodes, ends="graph")
solver = so.trend_solver(chain, order=1)
t = np.linspace(0, 1, nodes)
signal = jnp.asarray(np.abs(t - 0.4) + 0.05 * rng.normal(size=nodes))
direction = jnp.asarray(rng.normal(size=nodes))


def measured(y, row_weights, node_weights):
    """A number that depends on the whole fit."""
    return jnp.vdot(direction, solver(y, so.L1(row_weights), node_weights, tol=1e-13).value)


point = (signal, jnp.full(chain.matrix(2).shape[0], 0.3), jnp.ones(nodes))
slopes = jax.jit(jax.grad(measured, argnums=(0, 1, 2)))(*point)
measured = jax.jit(measured)
for index, (name, slope) in enumerate(zip(("signal", "row weights", "node weights"), slopes, strict=True)):
    change = jnp.asarray(rng.normal(size=slope.size))
    above, below = (
        measured(*point[:index], point[index] + size * change, *point[index + 1 :]) for size in (1e-5, -1e-5)
    )
    difference = float((above - below) / 2e-5)
    error = abs(difference - float(slope @ change)) / abs(difference)
    print(
        f"{name:13s} gradient {slope @ change:10.6f}, central difference {difference:10.6f}, relative error {error:.0e}"
    )
    assert error < 1e-5

# %% [markdown]
# And `vmap` over 64 signals gives the results of 64 calls, in one compiled program:

# %%
signals = signal + 0.05 * jnp.asarray(rng.normal(size=(64, nodes)))
fit = jax.jit(lambda y: solver(y, so.L1(0.3)).value)
together, one_by_one = jax.jit(jax.vmap(fit))(signals), jnp.stack([fit(y) for y in signals])
print(f"64 signals together and one by one: largest difference {jnp.abs(together - one_by_one).max():.0e}")
assert jnp.allclose(together, one_by_one, atol=1e-10)

# %% [markdown]
# ## What to remember
#
# * Plan once: `solver = so.trend_solver(graph, order)`. Then `solver(y, penalty)` works under `jit`, `vmap` and `grad`.
# * A gradient through the fit costs one linear solve. The iterations are not unrolled, so their number costs no memory.
# * Weights that are a function of the noisy image transfer to images of other content and size. A free weight for
#   each difference would not.
