"""Valid models, as the bytes of their files."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models.files.gguf.tokenizer import build_tokenizer
from tests.models import tiny


@cache
def folders() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """A model in one file, and the same in two shards."""
    config = tiny.tiny_config(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    tensors = tiny.random_tensors(config, np.random.default_rng(1))
    with tempfile.TemporaryDirectory() as folder:
        found = [tiny.write_folder(Path(folder, str(shards)), config, tensors, shards) for shards in (1, 2)]
        one, two = ({file.name: file.read_bytes() for file in sorted(Path(model).iterdir())} for model in found)
    return one, two


@cache
def ggufs() -> tuple[bytes, ...]:
    """A GGUF file of every architecture, the last one with a tokenizer's tables."""
    rng, found = np.random.default_rng(2), []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "m.gguf")
        for architecture, config in tiny.CONFIGS.items():
            small = config | {"num_hidden_layers": 1} | {k: config[k][:1] for k in ("layer_types",) if k in config}
            tensors = tiny.random_tensors(small, rng)
            found.append(tiny.write_architecture(file, architecture, small, tensors).read_bytes())
        config = tiny.tiny_config(num_hidden_layers=1)
        found.append(tiny.write_gguf(file, config, tiny.random_tensors(config, rng)).read_bytes())
    return tuple(found)


@cache
def tokenizer() -> dict[str, Any]:
    """A `tokenizer.json`."""
    return json.loads(build_tokenizer(tiny.byte_level_metadata("qwen2"), Path("m.gguf")).to_str())
