"""Qwen2 and Qwen2.5, Qwen3, and Qwen3-MoE, its mixture of experts."""

from sparseopt.models.base.fields import Config, optional, refuse_unless, require
from sparseopt.models.base.rope import read_rope
from sparseopt.models.decoder.settings import BlockKind, DecoderConfig
from sparseopt.models.families.family import (
    BLOCK_NAMES,
    Family,
    KeyTable,
    SizeFields,
    read_decoder,
    read_experts,
    read_windows,
)


def _read_kinds(config: Config) -> tuple[BlockKind, ...]:
    """The blocks of Qwen2 and Qwen3: if windows are in use, blocks from `max_window_layers` on have one."""
    window = optional(config, "sliding_window", default=4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    rope = read_rope(config)
    sliding = read_windows(config, lambda index: window is not None and index >= first)
    return tuple(BlockKind(rope, window if slides else None) for slides in sliding)


def _read_qwen2(config: Config) -> DecoderConfig:
    """The Qwen2 and Qwen2.5 family: Llama with biases on queries, keys and values."""
    return read_decoder(config, _read_kinds(config), qkv_bias=True)


_SIZES = SizeFields(by_block=("layer_types", "max_window_layers"))

QWEN2 = Family("qwen2", _read_qwen2, sizes=_SIZES)


def _read_qwen3(config: Config) -> DecoderConfig:
    """The Qwen3 family: Llama with norms on the queries and keys of every head."""
    bias = bool(config.get("attention_bias"))
    return read_decoder({"head_dim": 128, **config}, _read_kinds(config), qk_norm="head", attention_bias=bias)


QWEN3 = Family("qwen3", _read_qwen3, sizes=_SIZES)


def _read_qwen3_moe(config: Config) -> DecoderConfig:
    """The Qwen3-MoE family: Qwen3 with many small experts in most blocks."""
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


_QWEN3_MOE_KEYS = KeyTable(block=(*BLOCK_NAMES, ("mlp.gate", "mlp.router")))
_QWEN3_MOE_SIZES = SizeFields(
    experts=("num_experts", "num_local_experts"),
    expert_channels=("moe_intermediate_size",),
    by_block=("mlp_only_layers", "decoder_sparse_step"),
)

QWEN3_MOE = Family("qwen3_moe", _read_qwen3_moe, _QWEN3_MOE_KEYS, _QWEN3_MOE_SIZES)
