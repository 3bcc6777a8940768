"""Floor 5: the Phi-3 family: Llama with fused projections and, for long contexts, LongRoPE."""

from sparseopt.models.family import Family, read_decoder
from sparseopt.models.fields import Config, optional
from sparseopt.models.rope import read_rope
from sparseopt.models.settings import BlockKind, DecoderConfig


def _read_config(config: Config) -> DecoderConfig:
    rope = read_rope({"original_max_position_embeddings": 4096, **config})
    kind = BlockKind(rope, optional(config, "sliding_window"))
    return read_decoder({"rms_norm_eps": 1e-5, **config}, kind, qkv="fused", gate="fused")


PHI3 = Family("phi3", _read_config)
