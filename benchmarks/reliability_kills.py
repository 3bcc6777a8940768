"""Runs that are killed: a tiny random Llama is pruned by processes that get SIGKILL at random moments, then by one that
gets none, and the result is compared byte by byte with that of an unbroken run.

    python benchmarks/bench_reliability.py [--kills 30] [--seed 0]

Prints one JSON line: kills, how many of them lost a finished block or left a folder that could not be gone on with,
whether the bytes are the same, versions.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sparseopt.machine import environment
from sparseopt.models import find_family
from sparseopt.models.safetensors_file import write_tensors

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 40,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
PRUNE = """
import sys
import numpy as np
from sparseopt.pruning import Recipe, prune_model
tokens = np.random.default_rng(0).integers(0, 64, (8, 64)).astype(np.int32)
# Slow enough that most kills come within the pass, quick enough for thirty of them.
prune_model(sys.argv[1], sys.argv[2], Recipe(preset="paper", calibration=tokens, heldout_samples=2))
"""


def write_model(folder: Path) -> None:
    """The model in float32."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    family, rng = find_family(CONFIG), np.random.default_rng(0)
    shapes = family.expected_shapes(family.read_config(CONFIG))
    tensors = {
        name: rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5) + np.float32("norm" in name)
        for name, shape in shapes.items()
    }
    write_tensors(folder / "model.safetensors", tensors)


def start(model: Path, output: Path) -> subprocess.Popen:
    """A process that prunes."""
    return subprocess.Popen([sys.executable, "-c", PRUNE, str(model), str(output)], stderr=subprocess.PIPE)


def finished_blocks(output: Path) -> set[str]:
    """Names of the shards in a folder."""
    return {file.name for file in output.glob("*.safetensors")}


def shards(output: Path) -> dict[str, bytes]:
    """The bytes of the model."""
    return {file.name: file.read_bytes() for file in output.glob("*.safetensors")}


def main() -> None:
    """Kill, go on, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as place:
        model, whole, broken = (Path(place) / name for name in ("model", "whole", "broken"))
        write_model(model)
        began = time.perf_counter()
        assert start(model, whole).wait() == 0
        seconds = time.perf_counter() - began
        kills = lost = refused = within = runs = 0
        while kills < options.kills:
            before = finished_blocks(broken)
            process = start(model, broken)
            # Anywhere from the first import to a little more than what is left to do.
            left = 1 - len(before) / (CONFIG["num_hidden_layers"] + 1)  # type: ignore[operator]
            try:
                process.wait(rng.uniform(0.1, 1.0) * seconds * max(left, 0.4))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                after = finished_blocks(broken)
                within += bool(after)
                lost += not before <= after
                if not (broken / "summary.json").is_file():
                    continue
            if process.returncode > 0:
                refused += 1
                sys.stderr.write(process.stderr.read().decode() if process.stderr else "")
                break
            # Finished before the kill came: the same bytes, and the next kills hit a new run.
            assert shards(broken) == shards(whole)
            runs += 1
            broken = Path(place) / f"broken-{runs}"
        last = start(model, broken).wait()
        record = {
            "figure": "kills",
            "kills": kills,
            "within_the_pass": within,
            "lost_finished_blocks": lost,
            "refused": refused + (last != 0),
            "identical": shards(broken) == shards(whole),
            "seconds_unbroken": seconds,
            **environment(),
        }
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
