"""The Mistral family: Llama with a sliding window."""

from sparseopt.models.base.fields import Config, optional, refuse_unless
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, read_decoder


def _read_config(config: Config) -> DecoderConfig:
    refuse_unless(config, {"layer_types": (None,)})
    kind = BlockKind(read_rope(config), optional(config, "sliding_window", default=4096))
    return read_decoder(config, (kind,))


FAMILY = Family("mistral", _read_config)
