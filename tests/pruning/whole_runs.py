"""Tiny models by name, runs that end at any moment, and what lies in a folder afterwards."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.models import load_decoder, open_model
from sparseopt.pruning import LayerRecord
from sparseopt.system.run_folder import RUN_FILES
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder

# A tokenizer of single letters, enough to turn any text into ids of the tiny vocabulary.
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(VOCAB)},
            "merges": [],
            "unk_token": "<|end|>",
        },
    }
)
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
# How tiny models differ from the tiny Llama. All linears and Grams of "square" have one shape.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "square": {"intermediate_size": 32, "num_key_value_heads": 4},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "experts": MIXTRAL | {"num_hidden_layers": 2, "intermediate_size": 24},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "wider": {"intermediate_size": 96, "num_hidden_layers": 4},
    "deeper": {"num_hidden_layers": 4},
    "planted": {"model_type": "qwen2", "num_hidden_layers": 2},
}


def tensors_of(name: str = "llama") -> dict[str, np.ndarray]:
    """The tensors of a model in `MODELS`.

    Of "planted" 2:4 loses nothing once channels stand in the right order: the inputs of the residual stream follow the
    pattern already, and the second half of the MLP's channels and of each head's values is not read.
    """
    config = tiny_config(**MODELS[name])
    tensors = random_tensors(config, np.random.default_rng(7), jnp.dtype(config["dtype"]))
    for key, value in tensors.items() if name == "planted" else ():
        if "o_proj" in key:
            value.reshape(32, -1, 8)[:, :, 4:] = 0
        elif "down_proj" in key:
            value[:, 32:] = 0
        elif value.ndim == 2 and "layers" in key:
            value.reshape(len(value), -1, 4)[:, :, 2:] = 0
    return tensors


def write_model(folder: Path, name: str = "llama", tensors: dict[str, np.ndarray] | None = None, **how: Any) -> Path:
    """Write a model of `MODELS`, or other tensors of its shapes, with a tokenizer."""
    write_folder(folder, tiny_config(**MODELS[name]), tensors or tensors_of(name), **how)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


def make_tokens(rng, windows, length=24):
    """Windows with repeated phrases, so that inputs are correlated as real text's are."""
    phrases = rng.integers(0, len(VOCAB), (6, length // 3))
    return phrases[rng.integers(0, 6, (windows, 3))].reshape(windows, length).astype(np.int32)


class Broken(Exception):
    """The end of a run, at any moment."""


def ended_by(kind, count=1):
    """An observer that ends the run at its `count`-th event of a kind."""
    seen = []

    def observer(event, done, total):
        seen.extend([event] if isinstance(event, kind) else [])
        if len(seen) == count:
            raise Broken

    return observer


def breaking_at(count):
    """An observer that ends the run at its `count`-th record of a linear."""
    return ended_by(LayerRecord, count)


def model_bytes(folder: Path) -> dict[str, bytes]:
    """The files of the model itself."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in RUN_FILES}


def written(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What lies in a folder, and when it was written."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a model's folder."""
    model = open_model(folder)
    return {key: model.stored(key) for key in model.exported_keys()}


def predicted(folder, ids, start=0):
    """Each token after `start` is the model's likeliest next one: it predicts them worse when something goes."""
    decoder, ids = load_decoder(folder), ids.astype(np.int32)
    step = jax.jit(lambda decoder, ids: jnp.argmax(decoder(ids), axis=-1))
    for time in range(start, ids.shape[1] - 1):
        ids[:, time + 1] = step(decoder, ids)[:, time]
    return ids


def without(tensors, blocks, gone):
    """The tensors of a model of so many blocks without some of them; the others are numbered anew."""
    found = {name: value for name, value in tensors.items() if ".layers." not in name}
    for new, old in enumerate(block for block in range(blocks) if block not in gone):
        start = f"model.layers.{old}."
        found |= {name.replace(start, f"model.layers.{new}."): v for name, v in tensors.items() if start in name}
    return found
