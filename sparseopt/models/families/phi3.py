"""The Phi-3 family: Llama with fused projections and, for long contexts, LongRoPE."""

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import Config, optional
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, read_decoder


def _read_config(config: Config) -> DecoderConfig:
    rope = read_rope({"original_max_position_embeddings": 4096, **config})
    kind = BlockKind(rope, optional(config, "sliding_window"))
    return read_decoder({"rms_norm_eps": 1e-5, **config}, (kind,), qkv="fused", gate="fused")


def _refuses(config: DecoderConfig) -> str | None:
    # transformers derives the number of LongRoPE factors from hidden_size / num_attention_heads and ignores head_dim.
    width, heads = config.hidden_size // config.num_heads, f"num_attention_heads={config.num_heads}"
    try:
        for rope in {kind.rope for kind in config.kinds}:
            if rope and rope.scaling:
                rope.scaling.check(rope.size(width))
    except ModelError:
        return f"transformers expects rope factors for heads of {width} features with {heads}"
    return None


PHI3 = Family("phi3", _read_config, refuses=_refuses)
