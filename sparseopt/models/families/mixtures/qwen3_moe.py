"""The Qwen3-MoE family: Qwen3 with many small experts in most blocks."""

from sparseopt.models.base.fields import Config, refuse_unless, require
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import BLOCK_NAMES, Family, KeyTable, SizeFields, read_decoder, read_experts


def _read_config(config: Config) -> DecoderConfig:
    refuse_unless(config, {"use_sliding_window": (False,)})
    given = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, **config}
    if "num_local_experts" in config:
        given["num_experts"] = config["num_local_experts"]
    plain, step = set(config.get("mlp_only_layers") or ()), require(config, "decoder_sparse_step", default=1)
    rope = read_rope(config)
    kinds = tuple(
        BlockKind(rope, experts=index not in plain and (index + 1) % step == 0)
        for index in range(require(config, "num_hidden_layers"))
    )
    normalise = bool(config.get("norm_topk_prob"))
    experts = read_experts(given, "num_experts", "moe_intermediate_size", normalise=normalise)
    bias = bool(config.get("attention_bias"))
    return read_decoder(config, kinds, qk_norm="head", attention_bias=bias, experts=experts)


KEYS = KeyTable(block=(*BLOCK_NAMES, ("mlp.gate", "mlp.router")))
SIZES = SizeFields(
    experts=("num_experts", "num_local_experts"),
    expert_channels=("moe_intermediate_size",),
    by_block=("mlp_only_layers", "decoder_sparse_step"),
)

FAMILY = Family("qwen3_moe", _read_config, KEYS, SIZES)
