"""Floor 5: the Llama family (Llama 1 to 3, SmolLM, TinyLlama and others with model_type "llama")."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.decoder import DecoderConfig
from sparseopt.models.errors import ModelError
from sparseopt.models.family import Family, KeyTable, read_rope, refuse_unless, require


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Hugging Face Llama configuration, old or new, as a `DecoderConfig`.

    Raises:
        ModelError: naming the field that is missing, inconsistent or not supported.
    """
    refuse_unless(
        config,
        {
            "hidden_act": ("silu", "swish"),
            "sliding_window": (None,),
            "quantization_config": (None,),
            "is_encoder_decoder": (False,),
        },
    )
    hidden_size, num_heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    kv_field, head_field = config.get("num_key_value_heads"), config.get("head_dim")
    num_kv_heads = num_heads if kv_field is None else require(config, "num_key_value_heads")
    head_dim = hidden_size // num_heads if head_field is None else require(config, "head_dim")
    if num_heads % num_kv_heads:
        raise ModelError(f"num_key_value_heads={num_kv_heads} must divide num_attention_heads={num_heads}")
    if head_dim % 2 or (head_field is None and hidden_size % num_heads):
        raise ModelError(f"head_dim must be even and whole, given {hidden_size=} {num_heads=} {head_dim=}")
    return DecoderConfig(
        vocab_size=require(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=require(config, "intermediate_size"),
        num_layers=require(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=require({"rms_norm_eps": 1e-6, **config}, "rms_norm_eps", float),
        rope=read_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bool(config.get("attention_bias", False)),
        output_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


LLAMA = Family(
    model_type="llama",
    read_config=read_config,
    keys=KeyTable(
        prefixes=(
            ("model.embed_tokens", "embed_tokens"),
            ("model.layers", "layers"),
            ("model.norm", "head.norm"),
            ("lm_head", "head.lm_head"),
        ),
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    ),
)
