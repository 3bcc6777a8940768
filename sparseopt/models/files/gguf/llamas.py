"""Llama and the architectures that differ little from it: one function reads a configuration, one writes it."""

from typing import Any

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import optional, require
from sparseopt.models.base.rope import rope_table
from sparseopt.models.files.gguf.architecture import Architecture
from sparseopt.models.files.gguf.fields import Config, Fields, Tensors, Values, has_bias, refuse_unless_meant
from sparseopt.models.files.gguf.header import count
from sparseopt.models.files.gguf.shared import llama3_factors, read_shared, refuse_other_width, write_shared

LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FUSED_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_OLMO2_BLOCK = {short: long for short, long in LLAMA_BLOCK.items() if not short.endswith("_norm")} | _POST_NORMS
_STARCODER2_BLOCK = {short: long for short, long in LLAMA_BLOCK.items() if short != "ffn_gate"}
_STARCODER2_BLOCK |= {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_LAYER_NORM = ("attention.layer_norm_epsilon", "norm_epsilon")
# One of this many blocks of SmolLM3 has no position embedding.
_NO_ROPE_STEP = 4


def _llama(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    return {
        **read_shared(fields, tensors),
        "hidden_act": "silu",
        "attention_bias": has_bias(tensors, "self_attn.q_proj"),
        "mlp_bias": has_bias(tensors, "mlp.gate_proj"),
    }


def _write_llama(config: Config) -> Values:
    """Llama and Mistral."""
    _refuse_windows(config, 4096 if config.get("model_type") == "mistral" else None)
    refuse_unless_meant(config, {"hidden_act": ("silu",)})
    return write_shared(config, rope_table(config), ("linear", "yarn", "llama3"))


def _qwen2(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """Biases of q, k and v are part of the family; GGUF stores no sliding windows."""
    return {**read_shared(fields, tensors), "hidden_act": "silu", "use_sliding_window": False}


def _write_qwen2(config: Config) -> Values:
    _refuse_switched_windows(config)
    refuse_other_width(config)
    return write_shared(config, rope_table(config))


def _qwen3(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    return {**_qwen2(fields, tensors), "attention_bias": has_bias(tensors, "self_attn.q_proj")}


def _write_qwen3(config: Config) -> Values:
    _refuse_switched_windows(config)
    return write_shared({"head_dim": 128, **config}, rope_table(config))


def _smollm3(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    config = _llama(fields, tensors)
    return {**config, "no_rope_layers": _roped(config["num_hidden_layers"]), "use_sliding_window": False}


def _write_smollm3(config: Config) -> Values:
    _refuse_switched_windows(config)
    layers, given = require(config, "num_hidden_layers"), config.get("no_rope_layers")
    if given is None:
        refuse_unless_meant(config, {"no_rope_layer_interval": (_NO_ROPE_STEP,)})
    else:
        refuse_unless_meant({"no_rope_layers": given[:layers]}, {"no_rope_layers": (_roped(layers),)})
    return write_shared({"num_key_value_heads": 4, **config}, rope_table(config, 2000000.0))


def _roped(layers: int) -> list[int]:
    """1 for each block with a position embedding."""
    return [int((index + 1) % _NO_ROPE_STEP != 0) for index in range(layers)]


def _olmo2(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    bias = has_bias(tensors, "self_attn.q_proj")
    return {**read_shared(fields, tensors), "hidden_act": "silu", "attention_bias": bias}


def _write_olmo2(config: Config) -> Values:
    """llama.cpp has neither biases nor a tied head."""
    refuse_other_width(config)
    refuse_unless_meant(config, {"tie_word_embeddings": (False,), "attention_bias": (False,), "hidden_act": ("silu",)})
    return write_shared(config, rope_table(config), eps=1e-5)


def _phi3(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """A window of zero means none. LongRoPE, whose factors are tensors, is not supported."""
    config = read_shared(fields, tensors, partial=True)
    longest = config["max_position_embeddings"]
    return {
        **config,
        "hidden_act": "silu",
        "sliding_window": fields.get("attention.sliding_window") or None,
        "original_max_position_embeddings": fields.count("rope.scaling.original_context_length", longest),
    }


def _write_phi3(config: Config) -> Values:
    """llama.cpp reads a window of zero as none, and so far ignores any other."""
    refuse_other_width(config)
    refuse_unless_meant(config, {"hidden_act": ("silu",)})
    length = require(config, "original_max_position_embeddings", default=4096)
    window = optional(config, "sliding_window") or 0
    return {
        **write_shared(config, rope_table(config), ("linear",), eps=1e-5, partial=True),
        "rope.scaling.original_context_length": count(length),
        "attention.sliding_window": count(window),
    }


def _starcoder2(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    return {
        **read_shared(fields, tensors, norm=_LAYER_NORM),
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": has_bias(tensors, "self_attn.q_proj"),
        "sliding_window": None,
    }


def _write_starcoder2(config: Config) -> Values:
    """llama.cpp loads no model without biases."""
    _refuse_windows(config)
    refuse_other_width(config)
    refuse_unless_meant(config, {"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)})
    return write_shared(config, rope_table(config), norm=_LAYER_NORM, eps=1e-5)


def _refuse_windows(config: Config, default: int | None = None) -> None:
    """Raise if there is a sliding window, which llama.cpp ignores here; one over all positions does not count."""
    longest, window = require(config, "max_position_embeddings"), optional(config, "sliding_window", default=default)
    if window is not None and window < longest:
        raise ModelError(
            f"GGUF files of this architecture have no sliding windows, given sliding_window={window} with "
            f"max_position_embeddings={longest}; set sliding_window to null in config.json for full attention, or "
            f"max_position_embeddings to {window}"
        )


def _refuse_switched_windows(config: Config) -> None:
    """The same for windows that `use_sliding_window` switches on, and for another activation."""
    slides = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
    if slides and "sliding_attention" in (config.get("layer_types") or ["sliding_attention"]):
        refuse_unless_meant(config, {"use_sliding_window": (False,)})
    refuse_unless_meant(config, {"hidden_act": ("silu",)})


LLAMA = Architecture("llama", "LlamaForCausalLM", LLAMA_BLOCK, _llama, _write_llama, llama3_factors, paired_heads=True)
QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", LLAMA_BLOCK, _qwen2, _write_qwen2)
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", LLAMA_BLOCK | HEAD_NORMS, _qwen3, _write_qwen3)
SMOLLM3 = Architecture("smollm3", "SmolLM3ForCausalLM", LLAMA_BLOCK, _smollm3, _write_smollm3, paired_heads=True)
OLMO2 = Architecture("olmo2", "Olmo2ForCausalLM", _OLMO2_BLOCK | HEAD_NORMS, _olmo2, _write_olmo2)
PHI3 = Architecture("phi3", "Phi3ForCausalLM", _FUSED_BLOCK, _phi3, _write_phi3)
STARCODER2 = Architecture("starcoder2", "Starcoder2ForCausalLM", _STARCODER2_BLOCK, _starcoder2, _write_starcoder2)
