"""Tiny models by name, whole runs as a table, runs that end at any moment, and what lies in a folder afterwards."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.models import load_decoder, open_model
from sparseopt.pruning import LayerRecord, PruneReport, Recipe, ShrinkRecipe, prune_model
from sparseopt.system.run_folder import RUN_FILES
from tests.models.tiny import GOLDEN, VOCAB, random_tensors, tiny_config, write_folder, write_golden

# A tokenizer of single letters, enough to turn any text into ids of the tiny vocabulary.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
VOCABULARY = {token: index for index, token in enumerate(VOCAB)}
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": BYTES,
        "post_processor": None,
        "decoder": BYTES | {"add_prefix_space": True},
        "model": {"type": "BPE", "vocab": VOCABULARY, "merges": [], "unk_token": "<|end|>"},
    }
)
# How tiny models differ from the tiny Llama, whose linears have four shapes. Where shapes are not the point all linears
# and Grams have one, so that one program solves them.
SQUARE = {"intermediate_size": 32, "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "square": SQUARE,
    "biased": SQUARE | {"attention_bias": True, "mlp_bias": True},
    "experts": SQUARE
    | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "num_hidden_layers": 2,
    },
    "bfloat16": {"dtype": "bfloat16"},
    "wider": {"intermediate_size": 96, "num_hidden_layers": 4},
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
    """Write a model of `MODELS`, or other tensors of its shapes, or that of a golden file, with a tokenizer."""
    if name in MODELS:
        write_folder(folder, tiny_config(**MODELS[name]), tensors or tensors_of(name), **how)
    else:
        write_golden(GOLDEN / f"{name}.npz", folder)
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


HELDOUT = 2
SOME = {"re:.*layers.[01].self_attn.q_proj": 0.75, "layers.1.mlp.up_proj": 0, "re:.*layers.2": 0}
ALL_TRAINED = {"train_epochs": 1, "distil_epochs": 1}
WANDA, CURVES, ROUTED = {"method": "wanda"}, {"allocation": "curves"}, {"min_expert_tokens": 1}
# A model, and fields of a recipe; of a `ShrinkRecipe` where there are `SIZES`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tuned": ("square", {"preset": "tuned", "sparsity": 0.6}),
    "paper": ("llama", {"preset": "paper", "sparsity": 0.6}),
    "weighted": ("square", {"method": "sparsegpt", "weighting": "residual", "output_weights": "gradient"}),
    "per row": ("llama", WANDA | {"pattern": "per-row", "sparsity": 0.6}),
    "1:4": ("square", WANDA | {"pattern": "1:4"}),
    "blocks": ("square", WANDA | {"pattern": "block:4x8", "sparsity": 0.6}),
    "trained": ("square", WANDA | {"train_epochs": 2, "propagate": 0.5, "output_weights": "gradient"}),
    "bounds": ("square", WANDA | CURVES | {"sparsity": 0.6, "bounds": (0.375, 0.75)}),
    "curves of some": ("llama", CURVES | {"method": "admm", "ignore": ["re:.*layers.1", "down_proj"]}),
    "of bfloat16": ("bfloat16", WANDA),
    "permuted": ("planted", {"pattern": "2:4", "permute": True, "dtype": "bfloat16", "propagate": 0.5}),
    "some": ("biased", WANDA | ALL_TRAINED | {"targets": SOME, "ignore": ["down_proj", "lm_head"]}),
    "some to bfloat16": (
        "biased", WANDA | {"dtype": "bfloat16", "train_epochs": 1, "ignore": ["re:.*layers.0", "v_proj"]}
    ),
    "experts": ("experts", WANDA | ROUTED | {"output_weights": "gradient"}),
    "experts, curves": ("experts", CURVES | ROUTED),
    "experts, some": ("experts", WANDA | {"min_expert_tokens": 0, "train_epochs": 1, "ignore": ["re:.*experts.2"]}),
    "smaller": ("llama", ALL_TRAINED | {"channels": 0.75, "layers": 0.67}),
    "smaller tied_grouped": ("tied_grouped", WANDA | {"channels": 0.667, "heads": 0.5, "layers": 0.67}),
    "smaller gpt2": ("gpt2", WANDA | {"channels": 0.5, "layers": 0.67}),
    "smaller mixtral": ("mixtral", WANDA | ROUTED | {"channels": 0.667, "heads": 0.5, "experts": 0.75}),
}  # fmt: skip
# Channels, key-value groups, blocks and experts of a smaller model.
SIZES = {
    "smaller": (48, 2, 2, None),
    "smaller tied_grouped": (16, 1, 2, None),
    "smaller gpt2": (32, 4, 2, None),
    "smaller mixtral": (16, 1, 3, 3),
}


class Whole(NamedTuple):
    """A case that was run to its end."""

    name: str
    source: Path
    recipe: Recipe | ShrinkRecipe
    report: PruneReport
    events: list[tuple[Any, int, int]]

    @property
    def folder(self):
        return self.report.output

    def again(self, folder, **how):
        """The same run once more, into a folder."""
        return prune_model(self.source, folder, self.recipe, **how)


def whole_run(name: str, source: Path, tokens: np.ndarray, place: Path) -> Whole:
    """The run of a case into a new folder."""
    ids, events = tokens % open_model(source).config.vocab_size, []
    fields = {"calibration": ids, "heldout_windows": HELDOUT} | CASES[name][1]
    # Channels need not be multiples of 64, and blocks are trained only where that is asked for.
    recipe = ShrinkRecipe(**{"multiple": 8, "train_epochs": 0} | fields) if name in SIZES else Recipe(**fields)
    report = prune_model(source, place / "out", recipe, observer=lambda *told: events.append(told))
    return Whole(name, source, recipe, report, events)
