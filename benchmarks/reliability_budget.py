"""A checkpoint larger than the memory budget: a random Llama of several times the budget, pruned in a separate process
whose largest resident set is compared with the budget.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_memory import write_model

PRUNE = """
import sys
import numpy as np
from sparseopt.pruning import Recipe, prune_model
source, output, memory, vocab, method, windows, seqlen = sys.argv[1:]
tokens = np.random.default_rng(0).integers(0, int(vocab), (int(windows), int(seqlen))).astype(np.int32)
recipe = Recipe(method=method, preset="paper" if method == "maiht" else None, calibration=tokens, heldout_windows=2)
prune_model(source, output, recipe, memory=int(memory))
"""


def blocks_for(nbytes: int, width: int, vocab: int) -> int:
    """The number of blocks of a model of at least `nbytes`, written by `write_model` with an untied head."""
    block = 2 * (4 * width * width + 3 * width * (11 * width // 4))
    return math.ceil((nbytes - 2 * 2 * vocab * width) / block)


def pruned_within(
    place: Path,
    memory: int,
    times: float = 3.0,
    width: int = 1024,
    vocab: int = 128_000,
    method: str = "wanda",
    windows: int = 10,
    seqlen: int = 512,
) -> dict[str, Any]:
    """Write a model, prune it within a budget, and read the summary of the run.

    Args:
        place: an empty folder.
        memory: the budget, bytes.
        times: least size of the model, relative to the budget.
        width: of the model; the number of blocks follows.
        vocab: rows of the embedding and of the head.
        method: mAIHT with preset paper; the memory of a solve depends on the method.
        windows: windows of random tokens, two of them held out.
        seqlen: tokens per window.
    """
    blocks = blocks_for(math.ceil(times * memory), width, vocab)
    size = write_model(place / "model", blocks, width, vocab, tied=False)
    arguments = [place / "model", place / "out", memory, vocab, method, windows, seqlen]
    subprocess.run([sys.executable, "-c", PRUNE, *map(str, arguments)], check=True)
    summary = json.loads((place / "out" / "summary.json").read_text())
    footprint, used = summary["footprint"], summary["peak_memory_bytes"]
    return {
        "memory_bytes": memory,
        "model_bytes": size,
        "model_to_budget": size / memory,
        "blocks": blocks,
        "width": width,
        "vocab": vocab,
        "method": method,
        "tokens": windows * seqlen,
        "activations": footprint["activations"],
        "scratch_bytes": footprint["scratch_bytes"],
        "estimated_bytes": footprint["memory_bytes"],
        "peak_memory_bytes": used,
        "peak_to_budget": used / memory,
        "sparsity": summary["sparsity"],
        "seconds": summary["seconds"],
    }
