"""Floor 5: the Qwen2 and Qwen2.5 family: Llama with biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.family import Family, read_decoder, read_windows
from sparseopt.models.fields import require
from sparseopt.models.rope import read_rope
from sparseopt.models.settings import BlockKind, DecoderConfig


def read_kinds(config: Mapping[str, Any]) -> tuple[BlockKind, ...]:
    """The blocks of Qwen2 and Qwen3: where windows are in use, those from `max_window_layers` on have one."""
    given = {"sliding_window": 4096, "max_window_layers": 28, **config}
    in_use = bool(config.get("use_sliding_window", False)) and given["sliding_window"] is not None
    window = require(given, "sliding_window") if in_use else None
    rope = read_rope(config)
    sliding = read_windows(config, lambda index: in_use and index >= given["max_window_layers"])
    return tuple(BlockKind(rope, window if slides else None) for slides in sliding)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face Qwen2 configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    return read_decoder(config, kinds=read_kinds(config), qkv_bias=True)


QWEN2 = Family("qwen2", read_config)
