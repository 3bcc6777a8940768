"""Models in few bits in llama.cpp: `make bench-bits DATA=folder` with the WikiText-2 parquet files.

    python benchmarks/bench_bits.py --data FOLDER [--source MODEL] [--python INTERPRETER] [--only NAME,...]

One JSON line for each model. Its value is the perplexity on the first 8 x 1024 test tokens, computed by sparseopt from
the very file. Fields:

    llama_perplexity   the same by llama.cpp
    megabytes          of the file
    decode_tokens      a second, one thread, after 512 tokens; median of three rounds in which the models take turns
    prefill_tokens     a second, of the first 512 tokens
    grid, rounded      mean relative error that the grid adds to a linear, and that plain rounding would have added

The dense model is in 16 bits. Those of llama.cpp are made by its own quantisation of that file, with embedding and head
in q8_0 as in ours; its importance matrix is of the calibration tokens that ours see. INTERPRETER has llama.cpp.
"""

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from bench_runtime import EVALUATION, PROMPT, WORKER, in_turn, runtime_options, scored, token_file, workers_on
from common import emit, environment, run_program, say, selection
from pruned import about, judged, model_and_text, text_options

from sparseopt.models import open_model, open_source
from sparseopt.models.files.gguf.architectures import architecture_of
from sparseopt.pruning import PruneReport, Recipe, ShrinkRecipe, perplexity, prune_model
from sparseopt.pruning.base.activations import Batches, Stream, embed_windows
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.text.windows import begin_windows, text_windows

CALIBRATION: dict[str, Any] = {"window_choice": "first", "windows": 32, "score": "none"}
DENSE = "dense, 16 bits"
# Of llama.cpp: the type, and whether it has an importance matrix.
THEIRS = {
    "llama.cpp q8_0": ("Q8_0", False),
    "llama.cpp q4_0": ("Q4_0", False),
    "llama.cpp q4_0, importance matrix": ("Q4_0", True),
}
OURS: dict[str, Any] = {
    "q4_0": Recipe(sparsity=0.0, bits="q4_0"),
    "half zeros": Recipe(sparsity=0.5),
    "half zeros, q8_0": Recipe(sparsity=0.5, bits="q8_0"),
    "half zeros, q4_0": Recipe(sparsity=0.5, bits="q4_0"),
    "0.75 of the channels, q4_0": ShrinkRecipe(channels=0.75, bits="q4_0"),
}
# What the perplexity is to be at most, as a multiple of another's.
BOUNDS = {
    "q4_0": ("llama.cpp q4_0, importance matrix", 1.0),
    "half zeros, q8_0": ("half zeros", 1.005),
    "half zeros, q4_0": ("half zeros", 1.04),
}


def file_of(place: Path, name: str) -> Path:
    return place / name.replace(" ", "-").replace(",", "") / "model.gguf"


def importance(dense: Path, data: str, file: Path) -> None:
    """The mean square of every input of every linear on the calibration tokens, by the name of its tensor in GGUF."""
    model, count = open_model(dense), CALIBRATION["windows"]
    architecture = architecture_of(model.source.config)[1]
    ids, bos = text_windows(model.source, data, "calibration", count, 512, choice="first")
    (embedded,), runner, found = embed_windows(model, Batches(), begin_windows(ids, bos)), BlockRunner(), {}
    stream = Stream(embedded, Batches())
    for index in range(model.num_blocks):
        block = model.block(index)
        grams = runner.grams(block, stream.calibration, "uniform", None, "routed")
        for name, tap in block.linears.items():
            squares = np.diagonal(np.asarray(grams[tap].gram)) / grams.tokens(tap)
            found[architecture.gguf_name(model.weight_key(index, name))] = squares.astype(np.float32)
        stream = runner.through(block, stream)
    np.savez(file, allow_pickle=False, **found)


def make_models(source: Path, data: str, place: Path, python: Path, names: list[str]) -> dict[str, PruneReport]:
    """Make the files of these names, those that are there excepted; reports of ours."""
    dense, folder = file_of(place, DENSE), place / "folder"
    nothing: dict[str, Any] = {"sparsity": 0.0, "method": "magnitude", "heldout_windows": 0, "score": "none"}
    nothing |= {"calibration": data, "windows": 1, "seqlen": 64}
    prune_model(source, folder, Recipe(**nothing, dtype="float16"))
    prune_model(folder, dense, Recipe(**nothing))
    for name in [name for name in THEIRS if name in names]:
        kind, weighted = THEIRS[name]
        file, matrix = file_of(place, name), place / "importance.npz"
        file.parent.mkdir(exist_ok=True)
        if not file.is_file():
            if weighted and not matrix.is_file():
                importance(dense, data, matrix)
            program = [python, WORKER, "quantise", dense, file, kind]
            run_program([*program, *([matrix] if weighted else [])])
    asked = {name: recipe for name, recipe in OURS.items() if name in names}
    recipes = {name: recipe.model_copy(update=CALIBRATION | {"calibration": data}) for name, recipe in asked.items()}

    def told(event: Any, done: int, total: int) -> None:
        if isinstance(event, str):
            say(f"{event} {done} of {total}")

    return {name: prune_model(folder, file_of(place, name), recipe, observer=told) for name, recipe in recipes.items()}


def measure(files: dict[str, Path], python: Path, tokens: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """What llama.cpp makes of each file: speed, with all in turn, and perplexity."""
    found, runtime = dict[str, dict[str, Any]](), "llama.cpp float32"
    with workers_on(runtime, [file.parent for file in files.values()], python, tokens) as workers:
        times = in_turn(runtime, workers, rounds)
        for i, (name, worker) in enumerate(zip(files, workers, strict=True)):
            step, prefill = (statistics.median(row[i][key] for row in times) for key in ("step", "prefill"))
            rates = {"decode_tokens": 1 / step, "prefill_tokens": PROMPT / prefill}
            found[name] = {"llama_perplexity": scored(worker), **rates, **worker.about}
    return found


def main() -> None:
    parser = text_options(__doc__)
    runtime_options(parser, "bits")
    selection(parser, "--only", [DENSE, *THEIRS, *OURS])
    given = parser.parse_args()
    source, data = model_and_text(given, "bench_bits")
    probe = [given.python, "-c", "import llama_cpp_py_sync"]
    if subprocess.run(probe, check=False, capture_output=True).returncode:
        sys.exit(f"SKIPPED: {given.python} has no llama.cpp: pip install llama-cpp-py-sync")
    place = given.folder / source.name
    reports = make_models(source, data, place, given.python, given.only)
    files = {name: file_of(place, name) for name in given.only}
    with token_file(open_source(file_of(place, DENSE)), data) as (tokens, ids, bos):
        theirs = measure(files, given.python, tokens, given.rounds)
    scores = {}
    for name, file in files.items():
        say(f"perplexity of {name}")
        scores[name] = perplexity(open_model(file), ids, bos=bos)
        other, times = BOUNDS.get(name, (None, 1.0))
        bound = None if other not in scores else times * scores[other]
        grids = [] if name not in reports else reports[name].grids
        errors = {"grid": float(np.mean([r.relative_error for r in grids]))} if grids else {}
        errors |= {"rounded": float(np.mean([r.rounded_error for r in grids]))} if grids else {}
        emit(
            f"few bits, {name}", value=scores[name], unit="perplexity", bits_of=name, **judged(scores[name], bound),
            megabytes=file.stat().st_size / 1e6, evaluation=EVALUATION, **errors,
            **theirs[name], **about(source, False), **environment(),
        )  # fmt: skip


if __name__ == "__main__":
    main()
