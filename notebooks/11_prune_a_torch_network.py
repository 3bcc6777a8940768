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
# # 11. Prune a torch network
#
# `prune_module` prunes torch networks too, on the device where they are:
#
# ```python
# from sparseopt.pruning import Recipe, masks, prune_module
#
# pruned, report = prune_module(network, batches, Recipe(sparsity=0.7))  # the network stays as it is: this is a copy
# pruned, report = prune_module(model, batches, Recipe(pattern="2:4"), call=lambda model, batch: model(**batch))
# kept = masks(pruned)  # by name of the weight, for further training: False at the zeros
# ```
#
# torch runs the network, and JAX solves for the weights. What needs gradients in JAX is for Flax networks, see
# [the lesson before](10_prune_your_own_network.ipynb): weights of output errors and training with a recipe.
#
# This lesson needs torch, `pip install -e '.[torch]' --group notebooks` in a checkout, and no GPU.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn

import sparseopt as so
from sparseopt.experiments import plots
from sparseopt.pruning import Recipe, masks, prune_module

_ = so.keep_programs()  # on disk, since compilation takes much of the time of a first run
torch.set_num_threads(1)  # the fastest for networks as small as these
_ = torch.manual_seed(0)
digits, TRAINED = load_digits(), 1200
order = np.random.default_rng(0).permutation(len(digits.target))
images = torch.tensor(digits.images[order, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target[order])
print(f"{TRAINED:,} images of 8 × 8 to train on, {len(labels) - TRAINED} held out")

# %% [markdown]
# ## A residual network
#
# Three blocks, each with an ordinary convolution, a depthwise one, and one of 1 × 1 pixels.


# %%
class Residual(nn.Module):
    """Three convolutions and what goes past them."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.conv2 = nn.Conv2d(width, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(self.depthwise(torch.relu(self.norm1(self.conv1(x)))))))


class Network(nn.Module):
    """Blocks on 4 × 4 pixels."""

    def __init__(self, width=32, depth=3):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.stem(x))).mean(dim=(2, 3)))


def train(network, epochs, rate, kept=None):
    """Train in place; with masks, zeros stay."""
    hooks = [network.get_parameter(name).register_hook(mask.mul) for name, mask in (kept or {}).items()]
    network.train()
    shuffle, batch = torch.Generator().manual_seed(0), 60
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * TRAINED // batch)
    for _ in range(epochs):
        for rows in torch.randperm(TRAINED, generator=shuffle).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def accuracy(network):
    """Per cent of the held-out images."""
    return 100 * float((network(images[TRAINED:]).argmax(dim=1) == labels[TRAINED:]).float().mean())


network = Network()
train(network, 20, 3e-3)
dense = accuracy(network)
print(f"{sum(p.numel() for p in network.parameters()):,} parameters, accuracy {dense:.1f} %")
assert dense > 95

# %% [markdown]
# ## Prune it
#
# A batch is what the network is called with, here 100 images.

# %%
batches = images[:TRAINED].split(100)
pruned, report = prune_module(network, batches, Recipe(sparsity=0.7))
print(report)
print(f"accuracy {accuracy(pruned):.1f} %, of the dense network {accuracy(network):.1f} %")

# %% [markdown]
# The report says what was left out and why. A depthwise convolution has nine inputs for each output: there is little to
# choose. The stem and the head are outside the list of blocks, as an embedding is.
#
# ## Choose what is pruned
#
# `targets` names layers: whole names, ends of names, or expressions after `re:`. A layer outside the blocks is pruned if it
# is named. `ignore` leaves layers out. A table of targets gives some layers a sparsity of their own, and all others have the
# recipe's, the stem and the head too: so they are ignored here.

# %%
_, report = prune_module(network, batches, Recipe(sparsity=0.5, targets=["conv2", "head"], ignore=["blocks.0.conv2"]))
print("named:   ", ", ".join(f"{r.layer} {100 * r.sparsity:.0f} %" for r in report.layers))
table = {"conv1": 0.8, "conv2": 0.4, "blocks.2.conv2": 0.0}
_, report = prune_module(network, batches, Recipe(targets=table, ignore=["stem", "head"]))
print("by table:", ", ".join(f"{r.layer} {100 * r.sparsity:.0f} %" for r in report.layers))

# %% [markdown]
# ## Patterns
#
# `pattern="2:4"` keeps two of every four consecutive inputs of an output, which sparse tensor cores can use. The inputs of
# a convolution are its patches, channel by channel, which is the order of a torch kernel.

# %%
fine, report = prune_module(network, batches, Recipe(pattern="2:4"))
for record in report.layers:
    weight = fine.get_submodule(record.layer).weight.detach().flatten(1)
    assert ((weight.reshape(len(weight), -1, 4) != 0).sum(dim=2) <= 2).all()
coarse, _ = prune_module(network, batches, Recipe(pattern="2:4", method="magnitude"))
print(f"2:4, effort good: accuracy {accuracy(fine):.1f} %")
print(f"2:4, magnitude:   accuracy {accuracy(coarse):.1f} %")

# %% [markdown]
# ## Train further
#
# `masks` gives a dictionary: the name of each weight, and where it may change. The loop above multiplies the gradients by
# them, in a hook for each weight:
#
# ```python
# for name, mask in masks(pruned).items():
#     pruned.get_parameter(name).register_hook(mask.mul)
# ```
#
# A new AdamW never moves a weight that is zero and has no gradient. Its weight decay only multiplies. Start the optimiser
# after pruning: a momentum from before would move the zeros.

# %%
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
recipes = {
    "magnitude": {"method": "magnitude"},
    "Wanda": {"method": "wanda"},
    "mAIHT": {"method": "maiht"},
    "effort good": {"effort": "good"},
}
as_pruned, further = {}, {}
for label, fields in recipes.items():
    as_pruned[label], further[label] = [], []
    for sparsity in SPARSITIES:
        pruned, report = prune_module(network, batches, Recipe(sparsity=sparsity, **fields))
        as_pruned[label].append(accuracy(pruned))
        train(pruned, 5, 1e-3, masks(pruned))
        further[label].append(accuracy(pruned))
        zeros = {record.layer: int((pruned.get_submodule(record.layer).weight == 0).sum()) for record in report.layers}
        assert zeros == {record.layer: record.zeros for record in report.layers}

print(f"held-out accuracy in per cent{'':3s}" + "".join(f"{100 * s:5.0f} %" for s in SPARSITIES))
for state, scores in (("as pruned", as_pruned), ("trained further", further)):
    for label, row in scores.items():
        print(f"{state:17s} {label:12s}  " + "".join(f"{score:7.1f}" for score in row))

# %% alt="Held-out accuracy against the zeros in the pruned layers, as pruned and trained further: as pruned, effort good holds longest; after training all are close until 90 %."
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
for axis, (state, scores) in zip(axes, (("as pruned", as_pruned), ("trained further", further)), strict=True):
    curves = {label: (100 * np.array(SPARSITIES), row) for label, row in scores.items()}
    plots.plot_curves(curves, axis, xlabel="zeros in the pruned layers, %", markers=True)
    axis.axhline(dense, color="grey", linewidth=0.8)
    axis.set_title(state, loc="left")
_ = axes[0].set(ylabel="held-out accuracy, %", ylim=(0, 106))

# %% [markdown]
# As pruned, mAIHT and effort `good`, which fit the kept weights again, stay far above the others at 70 and 80 %. None
# survives 90 % without training. Five epochs repair much: up to 80 % all are close to the dense network, at 90 % effort
# `good` is ahead, and at 95 % magnitude is as good as that, and better than mAIHT. The depthwise convolutions stay dense,
# which helps every method. Of 597 images one per cent is six images: small differences mean nothing.
#
# ## A model of transformers
#
# Any model will do. This one is a small BERT with random weights, made from its configuration, so that nothing is
# downloaded: its errors say nothing about a trained model. The batches are dictionaries, and `call` says what to do with
# one. They may differ in length. Padding would count as input: batches of one length each have none.

# %%
config = transformers.BertConfig(
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=64,
)
bert = transformers.BertForSequenceClassification(config)
rng = np.random.default_rng(0)
texts = [
    {"input_ids": torch.tensor(rng.integers(1000, size=(16, length))), "labels": torch.tensor(rng.integers(2, size=16))}
    for length in (24, 32, 48)
]
pruned_bert, report = prune_module(
    bert, texts, Recipe(sparsity=0.6, method="maiht"), call=lambda model, batch: model(**batch)
)
print(report)
assert all(abs(record.sparsity - 0.6) < 1e-3 for record in report.layers)

# %% [markdown]
# The result is a model of the same class: `pruned_bert.save_pretrained("bert-60")` writes it. A language model of a known
# family is better pruned from its folder, by `prune_model`, see [lesson 3](03_pruning_a_small_llm.ipynb): this needs memory
# for one block, and knows more about it.
#
# ## What to remember
#
# * `prune_module(network, batches, Recipe(...))` returns a pruned copy and a report. `inplace=True` changes the network.
# * `call` says how a batch is fed, `targets` and `ignore` what is pruned. The report lists what was left out.
# * `masks` and a hook for each weight keep the zeros in any training loop that starts a new optimiser.
# * Train a few epochs after a high sparsity: it matters as much as the method.
