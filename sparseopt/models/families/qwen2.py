"""The Qwen2 and Qwen2.5 family: Llama with biases on queries, keys and values."""

from sparseopt.models.base.fields import Config, optional
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, SizeFields, read_decoder, read_windows


def read_kinds(config: Config) -> tuple[BlockKind, ...]:
    """The blocks of Qwen2 and Qwen3: if windows are in use, blocks from `max_window_layers` on have one."""
    window = optional(config, "sliding_window", default=4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    rope = read_rope(config)
    sliding = read_windows(config, lambda index: window is not None and index >= first)
    return tuple(BlockKind(rope, window if slides else None) for slides in sliding)


def _read_config(config: Config) -> DecoderConfig:
    return read_decoder(config, read_kinds(config), qkv_bias=True)


SIZES = SizeFields(by_block=("layer_types", "max_window_layers"))

FAMILY = Family("qwen2", _read_config, sizes=SIZES)
