"""The OPT family: layer norms, biases everywhere, learned positions, a ReLU between two linear layers."""

from sparseopt.models.base.fields import Config, refuse_unless, require
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import Family, KeyTable, SizeFields, read_decoder, ungrouped

# The first rows of the position table are padding.
POSITION_OFFSET = 2


def _read_config(config: Config) -> DecoderConfig:
    width = config.get("hidden_size")
    allowed: dict[str, tuple] = {"do_layer_norm_before": (True,), "layer_norm_elementwise_affine": (True,)}
    refuse_unless(config, allowed | {"_remove_final_layer_norm": (False,), "word_embed_proj_dim": (width, None)})
    bias = bool(config.get("enable_bias", True))
    return read_decoder(
        {"tie_word_embeddings": True, "activation_function": "relu", **ungrouped(config)},
        (BlockKind(rope=None),),
        activation="activation_function",
        intermediate_size=require(config, "ffn_dim"),
        norm="layer",
        norm_eps=1e-5,
        attention_bias=bias,
        gate=None,
        mlp_bias=bias,
        learned_positions=True,
        max_positions=require(config, "max_position_embeddings"),
        position_offset=POSITION_OFFSET,
    )


OUTER = (
    ("model.decoder.embed_positions.weight", "embed_tokens.positions"),
    ("model.decoder.embed_tokens", "embed_tokens"),
    ("model.decoder.final_layer_norm", "head.norm"),
    ("model.decoder.layers", "layers"),
    ("lm_head", "head.lm_head"),
)
BLOCK = (
    ("self_attn_layer_norm", "attention_norm"),
    ("final_layer_norm", "mlp_norm"),
    ("self_attn.out_proj", "self_attn.o_proj"),
    ("fc1", "mlp.up_proj"),
    ("fc2", "mlp.down_proj"),
)

FAMILY = Family("opt", _read_config, KeyTable(OUTER, BLOCK, base="model."), SizeFields(channels=("ffn_dim",)))
