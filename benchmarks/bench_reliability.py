"""Reliability and memory of pruning: killed runs and budgets. JSON lines.

    python benchmarks/bench_reliability.py [--only memory,kills,budget] [--kills 30] [--memory 1180MiB]

memory   peak memory against the number of blocks, for mAIHT
kills    a pruning run that receives thirty SIGKILLs: what was lost, and whether the final result is identical; of a
         folder, and of a GGUF file as llama.cpp converts it, into another
budget   a checkpoint of three times the memory budget

Models are random Llamas, pruned on random tokens in processes of their own.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from common import emit, environment, options, say, selection

from sparseopt.models import find_family
from sparseopt.models.files.gguf.header import read_header
from sparseopt.models.files.gguf.writer import copied, write_gguf
from sparseopt.models.files.safetensors import write_tensors
from sparseopt.pruning.run.output_form import run_folder_of
from sparseopt.system.machine import parse_bytes

Lines = Iterable[dict[str, Any]]
TOKENS = (10, 512)
# Random models have no tokenizer, so `prune_model` is called with token ids instead of the command.
PRUNE = """
import json, sys
import numpy as np
from sparseopt.pruning import Recipe, prune_model
source, output, vocab, windows, seqlen, memory, recipe = sys.argv[1:]
tokens = np.random.default_rng(0).integers(0, int(vocab), (int(windows), int(seqlen))).astype(np.int32)
recipe = Recipe(**json.loads(recipe), calibration=tokens, heldout_windows=2)
prune_model(source, output, recipe, memory=int(memory) or None)
"""


def write_model(folder: Path, blocks: int, width: int, vocab: int, *, tied: bool = True, heads: int = 0) -> int:
    """Write a random Llama in bfloat16, one shard per block; returns its bytes. Memory holds one block."""
    config: dict[str, Any] = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": width,
        "intermediate_size": 11 * width // 4, "num_hidden_layers": blocks, "num_attention_heads": heads or width // 64,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, rng, places, total = find_family(config), np.random.default_rng(0), dict[str, str](), 0
    shapes = family.expected_shapes(family.read_config(config))
    inside = {name: name.split(".")[2] if name.startswith("model.layers.") else "outer" for name in shapes}
    for part in dict.fromkeys(inside.values()):
        tensors, file = {}, f"model-{part}.safetensors"
        for name in (name for name in shapes if inside[name] == part):
            values = rng.standard_normal(shapes[name], np.float32) / shapes[name][-1] ** 0.5 + ("norm" in name)
            tensors[name] = values.astype(ml_dtypes.bfloat16)
        write_tensors(folder / file, tensors)
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return total


def start(
    model: Path, output: Path, vocab: int, recipe: dict[str, Any], tokens: tuple[int, int] = TOKENS, memory: int = 0
) -> subprocess.Popen:
    """Start a process that prunes, within an amount of memory if one is given."""
    given = [model, output, vocab, *tokens, memory, json.dumps(recipe)]
    return subprocess.Popen([sys.executable, "-c", PRUNE, *map(str, given)], stderr=subprocess.PIPE)


def summary_of(process: subprocess.Popen, output: Path) -> dict[str, Any]:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"pruning failed: {errors.decode()[-2000:]}")
    return json.loads((output / "summary.json").read_text())


def pruned(
    blocks: int, width: int, vocab: int, recipe: dict[str, Any], memory: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a line says of the pruning of a random model, and the summary. A budget unties the head."""
    with tempfile.TemporaryDirectory() as place:
        model, output = Path(place) / "model", Path(place) / "out"
        size = write_model(model, blocks, width, vocab, tied=not memory)
        summary = summary_of(start(model, output, vocab, recipe, memory=memory), output)
    figures = {name: summary[name] for name in ("peak_memory_bytes", "seconds")}
    return {"blocks": blocks, "width": width, "tokens": math.prod(TOKENS), "model_bytes": size} | figures, summary


def memory(given: argparse.Namespace) -> Lines:
    for preset in ("paper", "tuned"):
        for blocks in (6, 24):
            line, _ = pruned(blocks, given.width, 8192, {"method": "maiht", "preset": preset})
            yield line | {"preset": preset}


def budget(given: argparse.Namespace) -> Lines:
    """A model of at least so many times the budget, pruned within it."""
    width, vocab, most = 2 * given.width, 250 * given.width, given.memory
    # Of an untied embedding and head, and of a block, in bfloat16.
    outer, block = 4 * vocab * width, 2 * (4 * width * width + 3 * width * (11 * width // 4))
    blocks = math.ceil((given.times * most - outer) / block)
    line, summary = pruned(blocks, width, vocab, {"method": given.method}, most)
    footprint = summary["footprint"]
    yield line | {
        "memory_bytes": most, "model_to_budget": line["model_bytes"] / most, "vocab": vocab, "method": given.method,
        "activations": footprint["activations"], "scratch_bytes": footprint["scratch_bytes"],
        "estimated_bytes": footprint["memory_bytes"], "peak_to_budget": line["peak_memory_bytes"] / most,
        "sparsity": summary["sparsity"],
    }  # fmt: skip


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*") if file.suffix in (".safetensors", ".gguf")}


def convert(model: Path, file: Path, vocab: int) -> Path:
    """Write a model as a GGUF file like llama.cpp's, without `vocab_size`."""
    whole = file.with_name("with-vocab-size.gguf")
    summary_of(start(model, whole, vocab, {"method": "wanda", "sparsity": 0.0, "bits": "q8_0"}), run_folder_of(whole))
    header = read_header(whole)
    values = {key: value for key, value in header.values.items() if not key.endswith(".vocab_size")}
    write_gguf(file, values, {name: copied(tensor) for name, tensor in header.tensors.items()})
    return file


def killed_runs(place: Path, kills: int, seed: int = 0, blocks: int = 40, converted: bool = False) -> dict[str, Any]:
    """A tiny model is pruned by processes that receive SIGKILL at random times, then by one that does not.

    The model is a folder, or if `converted` a GGUF file as llama.cpp converts it, which becomes another one. The line
    counts the kills, those during the pass, those that lost a finished block, and the runs that could not be resumed. A
    result is identical if it is byte for byte that of an uninterrupted run.
    """
    rng = np.random.default_rng(seed)
    model, ending = place / "model", ".gguf.run" if converted else ""
    whole, broken = place / f"whole{ending}", place / f"broken{ending}"
    write_model(model, blocks, 64, 64, heads=4)
    if converted:
        model = convert(model, place / "model.gguf", 64)

    def begin(folder: Path) -> subprocess.Popen:
        output = folder.with_suffix("") if converted else folder
        # Slow enough that most kills happen during the pass, fast enough for thirty of them.
        return start(model, output, 64, {"method": "maiht", "preset": "paper"}, (8, 64))

    began = time.perf_counter()
    summary_of(begin(whole), whole)
    seconds = time.perf_counter() - began
    done = lost = refused = within = runs = 0
    identical = True
    while done < kills:
        before = set(shards(broken))
        process = begin(broken)
        # Anywhere from the first import to slightly after the expected end.
        left = 1 - len(before) / (blocks + 1)
        try:
            process.wait(rng.uniform(0.1, 1.0) * seconds * max(left, 0.4))
        except subprocess.TimeoutExpired:
            # The pass begins when the run holds its folder.
            lock = broken / "run.lock"
            within += lock.is_file() and f"process {process.pid} " in lock.read_text()
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            lost += not before <= set(shards(broken))
            if not (broken / "summary.json").is_file():
                continue
        if process.returncode > 0:
            refused += 1
            sys.stderr.write(process.stderr.read().decode() if process.stderr else "")
            break
        # It finished before the kill: compare, and kill a new run next.
        identical &= shards(broken) == shards(whole)
        runs += 1
        broken = place / f"broken-{runs}{ending}"
    last = begin(broken).wait()
    return {
        "kills": done, "within_the_pass": within, "lost_finished_blocks": lost, "refused": refused + (last != 0),
        "identical": identical and shards(broken) == shards(whole), "seconds_unbroken": seconds,
    }  # fmt: skip


def kills(given: argparse.Namespace) -> Lines:
    for converted in (False, True):
        with tempfile.TemporaryDirectory() as place:
            found = killed_runs(Path(place), given.kills, given.seed, converted=converted)
        yield {"source": "converted GGUF file" if converted else "folder"} | found


FIGURES: dict[str, Callable[[argparse.Namespace], Lines]] = {"memory": memory, "kills": kills, "budget": budget}


def main() -> None:
    parser = options(__doc__)
    selection(parser, "--only", FIGURES)
    parser.add_argument("--width", type=int, default=512, help="of the models for memory; twice that for budget")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--memory", type=parse_bytes, default=parse_bytes("1180MiB"), help="memory budget")
    parser.add_argument("--times", type=float, default=3.0, help="least size of the model, relative to the budget")
    parser.add_argument("--method", default="wanda", help="for the budget part; mAIHT takes an hour")
    given = parser.parse_args()
    for name in given.only:
        say(name)
        for record in FIGURES[name](given):
            emit(name, **record, **environment())


if __name__ == "__main__":
    main()
