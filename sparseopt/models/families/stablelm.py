"""The StableLM family: Llama with layer norms and partly rotated heads, in some models attention beside the MLP."""

from sparseopt.models.base.fields import Config, refuse_unless, require
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, read_decoder


def _read_config(config: Config) -> DecoderConfig:
    # The projections of transformers ignore `head_dim`, its rotary positions do not.
    derived = require(config, "hidden_size") // require(config, "num_attention_heads")
    refuse_unless(config, {"qk_layernorm": (False,), "head_dim": (None, derived)})
    parallel = bool(config.get("use_parallel_residual"))
    # Parallel attention and MLP share one norm.
    return read_decoder(
        {"num_key_value_heads": 32, **config},
        (BlockKind(read_rope(config, share=0.25)),),
        norm="layer",
        norms=("attention_norm",) if parallel else ("attention_norm", "mlp_norm"),
        norm_eps=require(config, "layer_norm_eps", float, default=1e-5),
        parallel=parallel,
        qkv_bias=bool(config.get("use_qkv_bias")),
    )


STABLELM = Family("stablelm", _read_config)
