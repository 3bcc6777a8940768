"""Peak memory of pruning against the number of blocks: random Llamas of one width, each pruned by the command.

    python benchmarks/bench_memory.py [--blocks 6 24] [--width 512] [--preset paper tuned]

Prints one JSON line per run: the largest resident set of the process, the bytes of the model, seconds, versions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sparseopt.models import find_family
from sparseopt.models.files.safetensors import write_tensors
from sparseopt.system.machine import environment

VOCAB = 8192


def write_model(folder: Path, blocks: int, width: int, vocab: int = VOCAB, *, tied: bool = True) -> int:
    """Write a random Llama in bfloat16, one shard per block; returns its bytes. Memory holds one block."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, rng, places, total = find_family(config), np.random.default_rng(0), dict[str, str](), 0
    shapes = family.expected_shapes(family.read_config(config))
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if name.startswith("model.layers.") else "outer", []).append(name)
    for group, names in groups.items():
        tensors = {
            name: (rng.standard_normal(shapes[name], np.float32) / shapes[name][-1] ** 0.5 + ("norm" in name)).astype(
                ml_dtypes.bfloat16
            )
            for name in names
        }
        write_tensors(folder / f"model-{group}.safetensors", tensors)
        places |= dict.fromkeys(names, f"model-{group}.safetensors")
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return total


# Random models have no tokenizer, so `prune_model` is called with token ids instead of the command.
PRUNE = """
import sys
import numpy as np
from sparseopt.pruning import Recipe, prune_model
source, output, preset, samples, seqlen, vocab = sys.argv[1:]
tokens = np.random.default_rng(0).integers(0, int(vocab), (int(samples), int(seqlen))).astype(np.int32)
prune_model(source, output, Recipe(method="maiht", preset=preset, calibration=tokens, heldout_windows=2))
"""


def measure(blocks: int, width: int, preset: str, samples: int, seqlen: int) -> dict[str, Any]:
    """Prune in a separate process and read its summary."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = write_model(folder / "model", blocks, width)
        arguments = [folder / "model", folder / "out", preset, samples, seqlen, VOCAB]
        subprocess.run([sys.executable, "-c", PRUNE, *map(str, arguments)], check=True)
        summary = json.loads((folder / "out" / "summary.json").read_text())
    return {
        "figure": "memory",
        "blocks": blocks,
        "width": width,
        "preset": preset,
        "tokens": samples * seqlen,
        "model_bytes": size,
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "seconds": summary["seconds"],
        **environment(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 24])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--preset", nargs="+", default=["paper", "tuned"])
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--seqlen", type=int, default=512)
    options = parser.parse_args()
    for preset in options.preset:
        for blocks in options.blocks:
            record = measure(blocks, options.width, preset, options.windows, options.seqlen)
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
