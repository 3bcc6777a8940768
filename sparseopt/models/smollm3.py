"""Floor 5: the SmolLM3 family: Llama in which some blocks have no position embedding."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.errors import ModelError
from sparseopt.models.family import Family, read_decoder, read_windows
from sparseopt.models.fields import require
from sparseopt.models.rope import read_rope
from sparseopt.models.settings import BlockKind, DecoderConfig


def read_kinds(config: Mapping[str, Any]) -> tuple[BlockKind, ...]:
    """The blocks: `no_rope_layers` holds 1 for those that have positions; a window only where there are none."""
    count, given = require(config, "num_hidden_layers"), config.get("no_rope_layers")
    if given is None:
        interval = require({"no_rope_layer_interval": 4, **config}, "no_rope_layer_interval")
        given = [int((index + 1) % interval != 0) for index in range(count)]
    if len(given) < count or not set(given) <= {0, 1}:
        raise ModelError(f"no_rope_layers must hold 0 or 1 for each of {count} blocks, given {given!r}")
    in_use = bool(config.get("use_sliding_window", False)) and config.get("sliding_window") is not None
    window = require(config, "sliding_window") if in_use else None
    rope, sliding = read_rope(config, theta=2000000.0), read_windows(config, lambda index: in_use and not given[index])
    kinds = zip(given, sliding, strict=False)
    return tuple(BlockKind(rope if turns else None, window if slides else None) for turns, slides in kinds)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face SmolLM3 configuration as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    bias = bool(config.get("attention_bias", False))
    return read_decoder(
        {"num_key_value_heads": 4, **config},
        kinds=read_kinds(config),
        tied=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


SMOLLM3 = Family("smollm3", read_config)
