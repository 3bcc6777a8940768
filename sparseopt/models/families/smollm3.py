"""The SmolLM3 family: Llama in which some blocks have no position embedding."""

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import Config, optional, require
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, SizeFields, read_decoder, read_windows


def _read_kinds(config: Config) -> tuple[BlockKind, ...]:
    """The blocks: `no_rope_layers` holds 1 for blocks with positions; only blocks without them have a window."""
    count, given = require(config, "num_hidden_layers"), config.get("no_rope_layers")
    if given is None:
        interval = require(config, "no_rope_layer_interval", default=4)
        given = [int((index + 1) % interval != 0) for index in range(count)]
    if len(given) < count or not set(given) <= {0, 1}:
        raise ModelError(f"no_rope_layers must hold 0 or 1 for each of {count} blocks, given {given!r}")
    window = optional(config, "sliding_window") if config.get("use_sliding_window") else None
    rope = read_rope(config, theta=2000000.0)
    sliding = read_windows(config, lambda index: window is not None and not given[index])
    kinds = zip(given, sliding, strict=False)
    return tuple(BlockKind(rope if turns else None, window if slides else None) for turns, slides in kinds)


def _read_config(config: Config) -> DecoderConfig:
    return read_decoder(
        {"num_key_value_heads": 4, "tie_word_embeddings": True, **config},
        _read_kinds(config),
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
    )


FAMILY = Family("smollm3", _read_config, sizes=SizeFields(by_block=("layer_types", "no_rope_layers")))
