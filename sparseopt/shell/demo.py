"""The demo: two photographs denoised, then a real language model pruned with effort fast and with Wanda.

noisy photographs -> fits of order 0 and 1 -> table, before/after pictures of the better order
dense model -> prune with each method -> perplexity on held-out text -> table, bar chart, samples
"""

import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.experiments.plots import plot_layer_errors, save_figure
from sparseopt.experiments.plots.signals import before_and_after
from sparseopt.models import bundled_model, encode_text, generate, load_decoder, load_tokenizer, open_model
from sparseopt.pruning import Recipe, perplexity, prune_model
from sparseopt.pruning.base.records import mean_errors
from sparseopt.pruning.run.facts import model_facts, run_facts
from sparseopt.pruning.text.windows import text_windows
from sparseopt.shell import console
from sparseopt.shell.prune_progress import PruneProgress
from sparseopt.system.machine import environment, peak_memory_bytes
from sparseopt.system.report import Fact, Figure, Report, Table, html_page
from sparseopt.system.run_folder import PAGE
from sparseopt.trend.images import denoise, psnr

RECIPES: tuple[tuple[str, dict[str, Any]], ...] = (("fast", {"effort": "fast"}), ("Wanda", {"method": "wanda"}))
EVALUATION = (8, 1024)  # windows, tokens a window
PROMPT = "The ocean is important because"
NEW_TOKENS = 40
NOISE = 20
# Parts of scikit-image's photographs: sharp edges suit order 0, soft shading suits order 1.
PHOTOGRAPHS = {"camera": np.s_[60:316, 120:376], "cell": np.s_[246:502, 294:550]}


def run_demo(output: Path | None, source: str | None, calibration: str, sparsity: float) -> None:
    """Denoise, prune, evaluate, compare, plot; everything shown is also written to `output`."""
    start, say = time.perf_counter(), console.say
    path = Path(source) if source else bundled_model()
    model = open_model(path)
    tokenizer = load_tokenizer(model.source)
    ids, bos = text_windows(model.source, calibration, "evaluation", *EVALUATION)
    prompt = np.append([] if bos is None else [bos], encode_text(tokenizer, PROMPT)).astype(np.int32)
    if output is None:
        wanted = (Path("demo-output" if n == 1 else f"demo-output-{n}") for n in itertools.count(1))
        output = next(folder for folder in wanted if not folder.exists())
    output.mkdir(parents=True, exist_ok=False)
    console.stop.words = functools.partial(console.left_in, output, time.time())
    photographs, shown = _denoise_photographs(output)
    say(f"\nmodel: {path.name}, {model.num_blocks} blocks of width {model.config.hidden_size}; results in {output}/")

    headings = ("model", "perplexity", "sparsity", "layer error", "held-out error", "solver seconds")
    rows, samples, layers = [], {}, {}

    def judge(label: str, folder: Path, *figures: str) -> None:
        with console.block_progress(f"{label}: perplexity") as progress:
            score = perplexity(folder, ids, bos=bos, observer=progress)
        say(f"{label}: perplexity {score:.2f} on {ids.size:,} held-out tokens")
        rows.append((label, f"{score:.2f}", *(figures or ("-",) * 4)))
        samples[label] = PROMPT + tokenizer.decode(generate(load_decoder(folder), prompt, NEW_TOKENS).tolist())

    judge("dense", path)
    for label, chosen in RECIPES:
        folder = output / label.lower()
        # The demo scores the models itself.
        recipe = Recipe(sparsity=sparsity, calibration=calibration, score="none", **chosen)
        with PruneProgress(f"{label} {sparsity:.0%}") as progress:
            report = prune_model(path, folder, recipe, observer=progress)
        for fact in (*model_facts(report), *run_facts(report)):
            say(f"{label}: {fact}")
        error, heldout = mean_errors(report.layers)
        held = "-" if heldout is None else f"{heldout:.5f}"
        judge(label, folder, f"{report.sparsity:.4f}", f"{error:.5f}", held, f"{report.solver_seconds:.1f}")
        layers[label] = report.layers

    table = Table(f"{'SmolLM2' if source is None else path.name} pruned to {sparsity:.0%}", headings, rows)
    console.console.print(console.comparison_table(table.title, headings, rows))
    caption = f"Error of each layer's output after pruning to {sparsity:.0%} (calibration tokens, log scale)"
    picture = save_figure(plot_layer_errors(layers), output / "layer-errors.png", caption)
    text = "\n\n".join(f"{label}:\n{sample}" for label, sample in samples.items())
    say(f"\nA sample, {NEW_TOKENS} likeliest tokens after the prompt:\n\n{text}\n")
    seconds = time.perf_counter() - start
    summary = {
        "photographs": photographs,
        "models": [dict(zip(headings, row, strict=True)) | {"sample": samples[row[0]]} for row in rows],
        "evaluation_tokens": int(ids.size),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        **environment(),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    say(f"picture: {picture}; models: {', '.join(str(output / label.lower()) for label in layers)}")
    say(f"{seconds:.0f} s in all, peak memory {peak_memory_bytes() / 2**30:.2f} GiB")
    facts = [Fact(f"{label} writes", sample) for label, sample in samples.items()]
    parts = [shown, Report(table, facts, [Figure(picture, caption)])]
    steps = [Fact("sparseopt prune MODEL --output FOLDER", "prunes a model of yours")]
    steps += [Fact("sparseopt denoise PHOTO.png --output CALM.png", "denoises a picture of yours")]
    console.write_page(output / PAGE, lambda command: html_page("sparseopt demo", parts, command, summary, steps))


def _denoise_photographs(output: Path) -> tuple[list[dict[str, Any]], Report]:
    """Fit photographs with noise; returns a row of figures for each photograph and order, and what is shown."""
    from skimage import data

    rows, figures = [], []
    for name, part in PHOTOGRAPHS.items():
        clean = np.asarray(getattr(data, name)()[part], np.float32)
        noisy = clean + np.asarray(np.random.default_rng(0).normal(0, NOISE, clean.shape), np.float32)
        start = psnr(noisy, clean)
        console.say(f"{name}: {clean.shape[0]} x {clean.shape[1]} pixels, noise sigma {NOISE}, PSNR {start:.2f} dB")
        fits = []
        for order in (0, 1):
            began = time.perf_counter()
            found = denoise(noisy, None, order)
            row = {
                "photograph": name,
                "order": order,
                "weight": found.weight,
                "psnr": psnr(found.image, clean),
                "relative_duality_gap": float(found.solution.check().gap),
                "steps": int(found.solution.steps),
                "seconds": time.perf_counter() - began,
            }
            fits.append((row, found.image))
        rows += [row for row, _ in fits]
        best, image = max(fits, key=lambda fit: fit[0]["psnr"])
        captions = (
            f"{name}, noise sigma {NOISE}: {start:.1f} dB",
            f"trend filter of order {best['order']}, weight {best['weight']:.1f}: {best['psnr']:.1f} dB",
        )
        picture = output / f"{name}.png"
        before_and_after(_as_grey(noisy), _as_grey(image), picture, captions)
        figures.append(Figure(picture, f"{captions[0]}, and {captions[1]}"))
    formats = ("{}", "{:d}", "{:.1f}", "{:.2f}", "{:.1e}", "{:d}", "{:.2f}")
    cells = [[form.format(value) for form, value in zip(formats, row.values(), strict=True)] for row in rows]
    headings = ("photograph", "order", "weight", "PSNR dB", "gap", "steps", "seconds")
    table = Table("Photographs denoised by trend filtering, weights chosen by SURE", headings, cells)
    console.console.print(console.comparison_table(table.title, table.headings, cells))
    console.say(f"pictures of the better order: {', '.join(str(figure.picture) for figure in figures)}")
    return rows, Report(table, figures=figures)


def _as_grey(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
