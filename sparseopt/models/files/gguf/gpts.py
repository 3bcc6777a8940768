"""GPT-NeoX in GGUF files: layer norms with biases, q, k and v of all heads in one matrix, partly rotated heads."""

from typing import Any

from sparseopt.models.base.rope import rope_table
from sparseopt.models.files.gguf.architecture import Architecture
from sparseopt.models.files.gguf.fields import Config, Fields, Tensors, Values, refuse_unless_meant
from sparseopt.models.files.gguf.header import flag
from sparseopt.models.files.gguf.shared import read_shared, refuse_other_width, write_shared

_OUTER = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_LAYER_NORM = ("attention.layer_norm_epsilon", "layer_norm_eps")


def _gptneox(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """Heads are not grouped, and their size follows from their number."""
    shared = read_shared(fields, tensors, norm=_LAYER_NORM, outer=_OUTER, partial=True)
    grouped = {name: shared.pop(name) for name in ("num_key_value_heads", "head_dim")}
    if grouped["num_key_value_heads"] != shared["num_attention_heads"]:
        raise fields.error("attention.head_count_kv", "the number of heads is the only value supported")
    return {
        **shared,
        "hidden_act": "gelu",
        "attention_bias": True,
        "use_parallel_residual": fields.get("use_parallel_residual", True),
        "rotary_emb_base": shared["rope_theta"],
        "rotary_pct": shared["rope_parameters"]["partial_rotary_factor"],
    }


def _write_gptneox(config: Config) -> Values:
    """llama.cpp has a head apart from the embedding and biases, and an approximation of gelu."""
    refuse_unless_meant(config, {"tie_word_embeddings": (False,), "attention_bias": (True,), "hidden_act": ("gelu",)})
    ungrouped = {**config, "num_key_value_heads": None, "head_dim": None}
    refuse_other_width(ungrouped)
    rope = rope_table(config, config.get("rotary_emb_base") or 10000.0, config.get("rotary_pct") or 0.25)
    return {
        **write_shared(ungrouped, rope, norm=_LAYER_NORM, eps=1e-5, partial=True),
        "use_parallel_residual": flag(bool(config.get("use_parallel_residual", True))),
    }


GPTNEOX = Architecture(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _BLOCK,
    _gptneox,
    _write_gptneox,
    outer=_OUTER,
    layers="gpt_neox.layers",
    interleaved="query_key_value",
)
