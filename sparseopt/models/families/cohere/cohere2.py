"""The Cohere 2 family (Command R7B, Command A): Cohere with local blocks, and no positions in the others."""

from sparseopt.models.base.fields import Config, require
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.cohere.cohere import COHERE_KEYS, read_cohere, read_cohere_rope
from sparseopt.models.families.family import Family, SizeFields, read_windows


def _read_config(config: Config) -> DecoderConfig:
    rope, window = read_cohere_rope(config, 10000.0), require(config, "sliding_window", default=4096)
    pattern = require(config, "sliding_window_pattern", default=4)
    local = read_windows(config, lambda index: (index + 1) % pattern != 0)
    return read_cohere(config, tuple(BlockKind(rope, window) if slides else BlockKind(None) for slides in local))


FAMILY = Family("cohere2", _read_config, COHERE_KEYS, SizeFields(by_block=("layer_types",)))
