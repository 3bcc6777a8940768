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
# # 10. Prune your own Flax network
#
# `prune_module` prunes any Flax network that you hold in memory. It needs the network and a few batches:
#
# ```python
# from sparseopt.pruning import Recipe, masks, prune_module
#
# pruned, report = prune_module(network, batches, Recipe(sparsity=0.8))
# print(report)                # the linear layers, their zeros and errors, and what was left out
# kept = masks(pruned)         # for further training: False at the zeros
# ```
#
# This lesson trains a small vision transformer and a small convolutional network on the 1,797 digits that scikit-learn
# contains. It prunes both to five sparsities by five methods, and trains the results further without losing the zeros.

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import sparseopt as so
from sparseopt.experiments.plots import style
from sparseopt.pruning import Recipe, masks, prune_module

_ = so.keep_programs()  # on disk, since compilation takes much of the time of a first run
digits, TRAINED = load_digits(), 1200
order = np.random.default_rng(0).permutation(len(digits.target))
images = (digits.images[order, :, :, None] / 16).astype(np.float32)
labels = digits.target[order].astype(np.int32)
print(f"{TRAINED:,} images of 8 × 8 to train on, {len(labels) - TRAINED} held out")

# %% [markdown]
# ## Two networks
#
# Nothing in them knows about pruning. Each has a list of blocks, and `prune_module` prunes one block after the other. What
# is outside the blocks, here the first layer and the head, stays as it is unless `targets` names it.


# %%
class Block(nnx.Module):
    """Attention and an MLP."""

    def __init__(self, width, heads, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class VisionTransformer(nnx.Module):
    """Sixteen patches of 2 × 2 pixels are the tokens."""

    def __init__(self, rngs, width=48, depth=2, heads=4):
        self.patches = nnx.Conv(1, width, (2, 2), strides=(2, 2), rngs=rngs)
        self.positions = nnx.Param(0.5 * jax.random.normal(rngs.params(), (16, width)))
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), 16, -1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


class Residual(nnx.Module):
    """Two convolutions and what goes past them."""

    def __init__(self, width, rngs):
        self.conv1, self.conv2 = (nnx.Conv(width, width, (3, 3), rngs=rngs) for _ in range(2))
        self.norm1, self.norm2 = (nnx.BatchNorm(width, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return nnx.relu(x + self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x))))))


class ConvolutionalNetwork(nnx.Module):
    """Three residual blocks on 4 × 4 pixels."""

    def __init__(self, rngs, width=32, depth=3):
        self.stem = nnx.Conv(1, width, (3, 3), strides=(2, 2), rngs=rngs)
        self.blocks = nnx.List([Residual(width, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


# %% [markdown]
# The training loop is an ordinary one, except for `kept`. These masks multiply the gradients, so that Adam never moves a
# weight that is zero. They are an argument of the compiled step: other masks need no other program.

# %%
BATCH, EPOCHS, AGAIN = 60, 30, 5
STEPS = TRAINED // BATCH
first = optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-3, 100, EPOCHS * STEPS), weight_decay=0.1)
again = optax.adamw(optax.cosine_decay_schedule(1e-3, AGAIN * STEPS), weight_decay=0.1)


def loss(logits, batch):
    """Cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


@nnx.jit
def step(network, optimizer, batch, kept):
    """One step of the optimiser; zeros stay where the masks are False."""
    gradients = nnx.grad(lambda network: loss(network(batch[0]), batch))(network)
    if kept is not None:
        gradients = jax.tree.map(jnp.multiply, gradients, kept)
    optimizer.update(network, gradients)


def train(network, transformation, epochs, kept=None):
    """Train in place."""
    network.train()
    optimizer = nnx.Optimizer(network, transformation, wrt=nnx.Param)
    cached, rng = nnx.cached_partial(step, network, optimizer), np.random.default_rng(0)
    for _ in range(epochs):
        for rows in rng.permutation(TRAINED).reshape(-1, BATCH):
            cached((images[rows], labels[rows]), kept)
    network.eval()


@nnx.jit
def predict(network, x):
    """The most likely digit."""
    return network(x).argmax(axis=-1)


def accuracy(network):
    """Per cent of the held-out images."""
    return 100 * float(np.mean(np.asarray(predict(network, images[TRAINED:])) == labels[TRAINED:]))


networks = {
    "vision transformer": VisionTransformer(nnx.Rngs(0)),
    "convolutional network": ConvolutionalNetwork(nnx.Rngs(0)),
}
dense = {}
for name, network in networks.items():
    train(network, first, EPOCHS)
    dense[name] = accuracy(network)
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
    print(f"{name:22s} {size:7,} parameters, accuracy {dense[name]:.1f} %")
    assert dense[name] > 95

# %% [markdown]
# ## From a trained network to a pruned one
#
# A batch is a pair here, so `call` says how the network is called with it. `loss` is optional: efforts `good` and `most` use
# its gradient to find which outputs matter. A method by itself has no use for it.

# %%
batches = [(images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, TRAINED, BATCH)]


def call(network, batch):
    """The images alone."""
    return network(batch[0])


pruned, report = prune_module(networks["vision transformer"], batches, Recipe(sparsity=0.8), call=call, loss=loss)
print(report)
before = accuracy(pruned)
train(pruned, again, AGAIN, masks(pruned))
print(f"accuracy {before:.1f} %, trained further {accuracy(pruned):.1f} %")

# %% [markdown]
# The error is the fraction of a layer's output energy that is lost, on the inputs that the pruned network gives to it.
#
# ## Five methods, five sparsities
#
# * `magnitude` keeps the largest weights of each layer. It does not look at the images.
# * `wanda` keeps the largest products of weight and input norm in each row.
# * `maiht` keeps the weights that together reproduce the layer's outputs best, and fits them again.
# * `effort="good"` solves the same problem more carefully, weights the outputs by the gradient of the loss, and corrects
#   some of the error of the layers before. This is the default.
# * `effort="most"` also trains each block, and then the whole network, on what the dense network gives. It needs no labels
#   for that.
#
# Each result is then trained further for five epochs on the labels, with the same masks, learning rate and order of images
# for all.

# %%
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
recipes = {
    "magnitude": {"method": "magnitude"},
    "Wanda": {"method": "wanda"},
    "mAIHT": {"method": "maiht"},
    "effort good": {"effort": "good"},
    "effort most": {"effort": "most"},
}


def zeros_in(network):
    """The number of zeros in the linear layers, the entries that may not change."""
    return sum(int((~leaf).sum()) for leaf in jax.tree.leaves(masks(network)))


def prune(network, label, sparsity):
    """The pruned network, and the report."""
    use = loss if "effort" in recipes[label] else None
    return prune_module(network, batches, Recipe(sparsity=sparsity, **recipes[label]), call=call, loss=use)


as_pruned, further, seconds = {}, {}, {}
for name, network in networks.items():
    for label in recipes:
        pairs = [prune(network, label, sparsity) for sparsity in SPARSITIES]
        seconds[name, label] = min(report.seconds for _, report in pairs)
        as_pruned[name, label] = [accuracy(found) for found, _ in pairs]
        for found, report in pairs:
            train(found, again, AGAIN, masks(found))
            assert zeros_in(found) == sum(record.zeros for record in report.layers)
        further[name, label] = [accuracy(found) for found, _ in pairs]

print(f"held-out accuracy in per cent{'':24s}" + "".join(f"{100 * s:6.0f} %" for s in SPARSITIES) + "   seconds")
for (name, label), scores in as_pruned.items():
    for state, row in (("as pruned", scores), ("trained further", further[name, label])):
        time_of = f"{seconds[name, label]:10.1f}" if row is scores else ""
        print(f"{name:22s} {label:12s} {state:16s} " + "".join(f"{score:8.1f}" for score in row) + time_of)

# %% [markdown]
# Seconds are for one pruning, the fastest of five: the first one also compiles.

# %% alt="Held-out accuracy against the fraction of zeros, for two networks, as pruned and trained further: magnitude and Wanda fall first, then mAIHT and effort good; effort most stays highest."
kept_shares = [100 * (1 - s) for s in SPARSITIES]


def apart(values, gap=6.5, top=103):
    """Heights of labels, as close to the values as they may be."""
    places, order = np.array(values, float), np.argsort(values, kind="stable")
    for low, high in itertools.pairwise(order):
        places[high] = max(places[high], places[low] + gap)
    places[order[-1]] = min(places[order[-1]], top)
    for high, low in itertools.pairwise(order[::-1]):
        places[low] = min(places[low], places[high] - gap)
    return places


figure, axes = plt.subplots(2, 2, figsize=(11.5, 7.2), sharex=True, sharey=True, layout="constrained")
for column, name in zip(axes.T, networks, strict=True):
    for axis, (state, scores) in zip(column, (("as pruned", as_pruned), ("trained further", further)), strict=True):
        for index, label in enumerate(recipes):
            axis.plot(kept_shares, scores[name, label], **style.line_style(index, markers=True))
        axis.axhline(dense[name], color="grey", linewidth=0.8)
        axis.annotate("dense", (48, dense[name]), xytext=(0, 3), textcoords="offset points", color="grey", fontsize=9)
        for place, label, colour in zip(
            apart([scores[name, label][-1] for label in recipes]), recipes, style.COLOURS, strict=False
        ):
            axis.text(1.02, place, label, transform=axis.get_yaxis_transform(), color=colour, va="center", fontsize=9)
        style.tidy(axis)
        axis.set_title(f"{name}, {state}", fontsize=11, loc="left")
axes[0, 0].set(xscale="log", xlim=(54, 4.7), ylim=(0, 106))
axes[0, 0].set_xticks(kept_shares, [f"{100 * s:.0f} %" for s in SPARSITIES])
axes[0, 0].minorticks_off()
for axis in axes[1]:
    axis.set_xlabel("fraction of zeros in the blocks")
for axis in axes[:, 0]:
    axis.set_ylabel("held-out accuracy, %")

# %% [markdown]
# What the figure says:
#
# * **Magnitude and Wanda lose.** As pruned, they lose accuracy already at half zeros: both networks are small, and what
#   goes is not corrected. From 80 % on five epochs do not repair them. Wanda was made for large language models, and is
#   no better than magnitude here.
# * **Fitting the kept weights again wins.** As pruned, mAIHT and effort `good` are close to the dense network at half
#   zeros, and effort `good` is ahead of mAIHT from 80 % on.
# * **Effort `most` is best from 80 % on.** It costs the most time, and trains for up to eight epochs of its own, so the
#   lower row compares it with methods that were trained less.
# * Up to 70 %, after training, the methods that refit weights hardly differ: use the cheapest.
# * At 95 % all lose. These networks have no weights to spare for that.
#
# ## Does more training replace a better method?
#
# The same at 90 % zeros, with 20 epochs instead of five:

# %%
LONGER = 20
longer = optax.adamw(optax.cosine_decay_schedule(1e-3, LONGER * STEPS), weight_decay=0.1)
place = SPARSITIES.index(0.9)
print(f"held-out accuracy in per cent at 90 % zeros   0 epochs   {AGAIN} epochs  {LONGER} epochs")
for name, network in networks.items():
    for label in ("magnitude", "effort good", "effort most"):
        found, _ = prune(network, label, 0.9)
        train(found, longer, LONGER, masks(found))
        row = as_pruned[name, label][place], further[name, label][place], accuracy(found)
        print(f"{name:22s} {label:20s} " + " ".join(f"{score:10.1f}" for score in row))

# %% [markdown]
# To a large part. With 20 epochs magnitude recovers most of its accuracy, but it stays behind: more for the transformer than
# for the convolutional network. Of the difference between the two efforts hardly anything is left. So where labels and time
# for training are plenty, the cheaper effort will do. Where they are not, the method decides.
#
# ## What to remember
#
# * `prune_module(network, batches, Recipe(sparsity=...))` needs no change of the network and returns a pruned copy.
# * Give a few hundred examples, and `loss` if there is one. Prune with effort `good` or `most`.
# * `masks` keeps the zeros in your own training loop. Give them to the compiled step as an argument.
# * Judge on held-out data, after the training that you will really do.
#
# See "Prune a network that you hold in Python" and the page after it in the guides. Torch networks are
# [the next lesson](11_prune_a_torch_network.ipynb).
