"""Pruning figures as JSON lines: `make bench-prune DATA=folder` with the WikiText-2 parquet files.

    dense perplexity; layer errors of both presets with the Gram matrices of the dense model; for a whole model, pruned
    in a separate process: solver time, compilations, forward rate against the machine's matmul rate, and peak memory

Every line gives the run, machine, versions, target, and whether the target was met.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from common import emit, model_and_text, text_parser

from sparseopt.models import open_model
from sparseopt.pruning import perplexity, prune_layer
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.text.windows import begin_windows, text_windows

DENSE_PERPLEXITY = 29.197
# Relative errors of the published procedure at 50 % on these layers.
PAPER_ERRORS = {"0.mlp.gate_proj": 0.01733, "9.self_attn.o_proj": 0.02159, "20.mlp.down_proj": 0.01828}
METHODS_RUN = (("maiht", "paper"), ("maiht", "tuned"), ("wanda", None), ("magnitude", None))
MATMUL = 2048


def bench_perplexity(source: Path, data: str) -> None:
    """Dense perplexity, test split, first 8 windows of 1024 tokens."""
    model = open_model(source)
    ids, bos = text_windows(model.source, data, "evaluation", 8, 1024)
    start = time.perf_counter()
    score = perplexity(model, ids, bos=bos)
    off = abs(score / DENSE_PERPLEXITY - 1)
    emit(
        "dense perplexity", score, "perplexity", f"{DENSE_PERPLEXITY} within 0.1 %", off <= 1e-3,
        seconds=time.perf_counter() - start, tokens=ids.size,
    )  # fmt: skip


def bench_layers(source: Path, data: str) -> None:
    """Both presets on the named layers at 50 %, Gram matrices of the dense model on 24 x 512 validation tokens."""
    model = open_model(source)
    ids = begin_windows(*text_windows(model.source, data, "calibration", 48, 512))
    batches = make_batches(model.embedding()(jnp.asarray(ids[:24])))
    heldout = make_batches(model.embedding()(jnp.asarray(ids[24:])))
    runner = BlockRunner()
    wanted = {name.split(".", 1)[1]: None for name in PAPER_ERRORS}
    for index in range(max(int(name.split(".")[0]) for name in PAPER_ERRORS) + 1):
        block = model.block(index)
        for name in wanted:
            layer = f"{index}.{name}"
            if layer not in PAPER_ERRORS:
                continue
            gram = runner.grams(block, batches)[block.linears[name]].gram
            test_gram = runner.grams(block, heldout)[block.linears[name]].gram
            weight = np.asarray(block.read(f"{name}.weight"))
            for preset, factor in (("paper", 1.02), ("tuned", 0.80)):
                result = prune_layer(weight, gram, 0.5, preset=preset, test_gram=test_gram)
                bound = factor * PAPER_ERRORS[layer]
                emit(
                    f"layer error, {preset}, {layer}", result.relative_error, "relative error",
                    f"at most {factor} x {PAPER_ERRORS[layer]}", result.relative_error <= bound,
                    ratio=result.relative_error / PAPER_ERRORS[layer], heldout_error=result.test_error,
                    steps=result.steps, seconds=result.seconds, sparsity=result.sparsity,
                )  # fmt: skip
        batches, heldout = runner.forward(block, batches), runner.forward(block, heldout)


def bench_model(source: Path, data: str, method: str, preset: str | None) -> None:
    """A whole model at 50 %, 16 x 512 tokens, by the command in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pruned"
        command = [
            sys.executable, "-m", "sparseopt", "prune", str(source), "--output", str(output), "--method", method,
            *(() if preset is None else ("--preset", preset)),
            "--calibration", data, "--windows", "16", "--seqlen", "512", "--window-choice", "first",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((output / "summary.json").read_text())
        records = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
        records = [record for record in records if record["kind"] == "layer"]
        evaluated = subprocess.run(
            [sys.executable, "-m", "sparseopt", "eval", str(output), "--text", data, "--json"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    run = f"{method} {preset}" if preset else method
    run = f"{run}, whole model at 50 %"
    score = json.loads(evaluated.stdout)
    limit = "at most 60 s" if preset == "paper" and method == "maiht" else "none"
    seconds = summary["solver_seconds"]
    emit(
        f"solver time, {run}", seconds, "s", limit, seconds <= 60 if limit != "none" else None,
        compile_seconds=summary["compile_seconds"], whole_run_seconds=summary["seconds"],
    )  # fmt: skip
    shapes = len({tuple(r["shape"]) for r in records})
    compiled = summary["layer_compilations"]
    emit(f"layer compilations, {run}", compiled, "programs", f"at most {shapes}, the shapes", compiled <= shapes)
    peak = summary["peak_memory_bytes"] / 1e9
    emit(f"peak memory, {run}", peak, "GB", "under 2.5", peak < 2.5)
    emit(
        f"perplexity, {run}", score["perplexity"], "perplexity", "none", None, sparsity=score["sparsity"],
        mean_relative_error=summary["mean_relative_error"], mean_heldout_error=summary["mean_heldout_error"],
    )  # fmt: skip


def main() -> None:
    """Run all."""
    source, data = model_and_text(text_parser(__doc__).parse_args(), "bench_prune")
    bench_perplexity(source, data)
    bench_layers(source, data)
    for method, preset in METHODS_RUN:
        bench_model(source, data, method, preset)


if __name__ == "__main__":
    main()
