"""Killed runs: a tiny random Llama is pruned by processes that receive SIGKILL at random times, then by one that does
not, and the result is compared byte by byte with that of an uninterrupted run.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models import find_family
from sparseopt.models.files.safetensors import write_tensors

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
# Slow enough that most kills happen during the pass, fast enough for thirty of them.
prune_model(sys.argv[1], sys.argv[2], Recipe(method="maiht", preset="paper", calibration=tokens, heldout_windows=2))
"""


def write_model(folder: Path) -> None:
    """Write the model in float32."""
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
    """Start a process that prunes."""
    return subprocess.Popen([sys.executable, "-c", PRUNE, str(model), str(output)], stderr=subprocess.PIPE)


def finished_blocks(output: Path) -> set[str]:
    """Names of the shards in a folder."""
    return {file.name for file in output.glob("*.safetensors")}


def shards(output: Path) -> dict[str, bytes]:
    """The shards of the model, by name."""
    return {file.name: file.read_bytes() for file in output.glob("*.safetensors")}


def killed_runs(place: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill, resume, compare.

    Args:
        place: an empty folder.
        kills: how many, at random times.
        seed: of the times.

    Returns:
        The number of kills, of those during the pass, of those that lost a finished block, and of runs that could not
        be resumed; whether all results are identical to that of an uninterrupted run; and the seconds of such a run.
    """
    rng = np.random.default_rng(seed)
    model, whole, broken = (place / name for name in ("model", "whole", "broken"))
    write_model(model)
    began = time.perf_counter()
    if start(model, whole).wait() != 0:
        raise RuntimeError("the uninterrupted run failed")
    seconds = time.perf_counter() - began
    done = lost = refused = within = runs = 0
    identical = True
    while done < kills:
        before = finished_blocks(broken)
        process = start(model, broken)
        # Anywhere from the first import to slightly after the expected end.
        left = 1 - len(before) / (CONFIG["num_hidden_layers"] + 1)  # type: ignore[operator]
        try:
            process.wait(rng.uniform(0.1, 1.0) * seconds * max(left, 0.4))
        except subprocess.TimeoutExpired:
            # The pass begins when the run holds its folder.
            lock = broken / "run.lock"
            within += lock.is_file() and f"process {process.pid} " in lock.read_text()
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            after = finished_blocks(broken)
            lost += not before <= after
            if not (broken / "summary.json").is_file():
                continue
        if process.returncode > 0:
            refused += 1
            sys.stderr.write(process.stderr.read().decode() if process.stderr else "")
            break
        # It finished before the kill: compare, and kill a new run next.
        identical &= shards(broken) == shards(whole)
        runs += 1
        broken = place / f"broken-{runs}"
    last = start(model, broken).wait()
    return {
        "kills": done,
        "within_the_pass": within,
        "lost_finished_blocks": lost,
        "refused": refused + (last != 0),
        "identical": identical and shards(broken) == shards(whole),
        "seconds_unbroken": seconds,
    }
