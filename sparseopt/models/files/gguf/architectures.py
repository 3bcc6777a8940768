"""The supported GGUF architectures, and the one as which a Hugging Face model is written.

Some constants are not in GGUF files, because the programs that run them know the architecture; they are here. A new
architecture is two functions, one that reads a configuration and one that writes it, and one entry in `ARCHITECTURES`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import Config, optional, require, shown
from sparseopt.models.base.rope import rope_table
from sparseopt.models.files.gguf.base import Architecture, Fields, Tensors, Values, has_bias, refuse_unless_meant
from sparseopt.models.files.gguf.header import count, flag, number
from sparseopt.models.files.gguf.shared import RMS_NORM, llama3_factors, read_shared, refuse_other_width, write_shared

_LLAMA_BLOCK = {
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
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FUSED_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_OLMO2_BLOCK = {short: long for short, long in _LLAMA_BLOCK.items() if not short.endswith("_norm")} | _POST_NORMS
_STARCODER2_BLOCK = {short: long for short, long in _LLAMA_BLOCK.items() if short != "ffn_gate"}
_STARCODER2_BLOCK |= {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_LAYER_NORM = ("attention.layer_norm_epsilon", "norm_epsilon")
Reader = Callable[[Fields, Tensors], dict[str, Any]]
# One of this many blocks of SmolLM3 has no position embedding.
_NO_ROPE_STEP = 4


def _reader(biases: Mapping[str, str], norm: tuple[str, str] = RMS_NORM, **constants: Any) -> Reader:
    """Reads what all architectures share, the family's constants, and by field which layers have biases."""

    def read(fields: Fields, tensors: Tensors) -> dict[str, Any]:
        found = {name: has_bias(tensors, linear) for name, linear in biases.items()}
        return {**read_shared(fields, tensors, norm=norm), **constants, **found}

    return read


_BIAS = {"attention_bias": "self_attn.q_proj"}
_llama = _reader(_BIAS | {"mlp_bias": "mlp.gate_proj"}, hidden_act="silu")
# Biases of q, k and v are part of the family; GGUF stores no sliding windows.
_qwen2 = _reader({}, hidden_act="silu", use_sliding_window=False)
_qwen3 = _reader(_BIAS, hidden_act="silu", use_sliding_window=False)
_olmo2 = _reader(_BIAS, hidden_act="silu")
_starcoder2 = _reader(
    {"use_bias": "self_attn.q_proj"}, _LAYER_NORM, hidden_act="gelu_pytorch_tanh", sliding_window=None
)


def _write_llama(config: Config) -> Values:
    """Llama and Mistral."""
    _refuse_windows(config, 4096 if config.get("model_type") == "mistral" else None)
    refuse_unless_meant(config, {"hidden_act": ("silu",)})
    return write_shared(config, rope_table(config), ("linear", "yarn", "llama3"))


def _write_qwen2(config: Config) -> Values:
    _refuse_switched_windows(config)
    refuse_other_width(config)
    return write_shared(config, rope_table(config))


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


# Gemma: norms stored with 1 added, layers with a sliding window, capped scores.
# "post_attention_layernorm" is the norm before the MLP in Llama, and the one after attention in Gemma.
_GEMMA_BLOCK = _LLAMA_BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What transformers fills in if a configuration has no value.
_GEMMA_DEFAULTS = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _gemma2(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    return {
        **_gemma(fields, tensors, 10000.0, big=46, pattern=2),
        "sliding_window": fields.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
    }


def _gemma3(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """Sliding layers have their own rotary base and no scaling."""
    config = _gemma(fields, tensors, 1000000.0, big=62, pattern=6)
    local = fields.number("rope.freq_base_swa", 10000.0)
    sliding = {"rope_type": "default", "rope_theta": local}
    return {
        **config,
        "sliding_window": fields.count("attention.sliding_window"),
        "rope_local_base_freq": local,
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": sliding},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        **fields.numbers({"final_logit_softcapping": "final_logit_softcapping"}),
    }


def _gemma(fields: Fields, tensors: Tensors, theta: float, big: int, pattern: int) -> dict[str, Any]:
    """Fields that Gemma 2 and 3 share; one of every `pattern` layers attends to all tokens.

    The scale of attention is in no file. It is the head's width, except in the released 27B model, recognised by its
    number of layers, `big`, for which it is the residual stream's width per head.
    """
    sizes = read_shared(fields, tensors, theta)
    layers = sizes["num_hidden_layers"]
    scalar = sizes["hidden_size"] // sizes["num_attention_heads"] if layers == big else sizes["head_dim"]
    slides = fields.get("attention.sliding_window_pattern", pattern)
    if type(slides) is int and slides > 0:
        slides = [bool((i + 1) % slides) for i in range(layers)]
    if not isinstance(slides, list) or len(slides) != layers or not all(type(item) is bool for item in slides):
        raise fields.error("attention.sliding_window_pattern", f"expected a positive int or {layers} booleans")
    return {
        **sizes,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": has_bias(tensors, "self_attn.q_proj"),
        "query_pre_attn_scalar": scalar,
        "layer_types": ["sliding_attention" if item else "full_attention" for item in slides],
    }


def _write_gemma2(config: Config) -> Values:
    config = _GEMMA2_DEFAULTS | dict(config)
    # llama.cpp has no head apart from the embedding, and caps in any case.
    refuse_unless_meant(config, {"tie_word_embeddings": (True,)})
    return {
        **_write_gemma(config, rope_table(config), big=46, pattern=2),
        "attn_logit_softcapping": number(require(config, "attn_logit_softcapping", float)),
        "final_logit_softcapping": number(require(config, "final_logit_softcapping", float)),
    }


def _write_gemma3(config: Config) -> Values:
    config = _GEMMA_DEFAULTS | dict(config)
    refuse_unless_meant(config, {"attn_logit_softcapping": (None,)})
    nearby: Config = {"rope_theta": require(config, "rope_local_base_freq", float, default=1e4)}
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        nearby = rope_table({**config, **nearby}, part="sliding_attention")
        refuse_unless_meant(nearby, {"rope_type": ("default",)})
    cap = optional(config, "final_logit_softcapping", float)
    pattern = require(config, "sliding_window_pattern", default=6)
    return {
        **_write_gemma(config, rope_table(config, 1e6, part="full_attention"), big=62, pattern=pattern, usual=6),
        "rope.freq_base_swa": number(require(nearby, "rope_theta", float)),
        **({} if cap is None else {"final_logit_softcapping": number(cap)}),
    }


def _write_gemma(config: Config, rope: Config, big: int, pattern: int, usual: int | None = None) -> Values:
    """See `_gemma`; `pattern` is the configuration's own, and `usual` the programs' pattern if it differs."""
    fields, layers = write_shared(config, rope), require(config, "num_hidden_layers")
    heads = require(config, "num_attention_heads")
    scalar = require(config, "hidden_size") // heads if layers == big else require(config, "head_dim")
    refuse_unless_meant(config, {"query_pre_attn_scalar": (scalar,), "hidden_activation": ("gelu_pytorch_tanh", None)})
    types = config.get("layer_types") or _layer_types(layers, pattern)
    usual = usual or pattern
    fields["attention.sliding_window"] = count(require(config, "sliding_window"))
    if types == _layer_types(layers, usual):
        return fields
    # Without any window llama.cpp stops.
    for other in range(2, layers + 2):
        if types == _layer_types(layers, other):
            return fields | {"attention.sliding_window_pattern": count(other)}
    raise ModelError(
        f"the model configuration's layer_types={shown(types)} are not full_attention in every n-th layer, for an n of "
        "2 or more, as programs that run GGUF files of Gemma models expect; write the model as a Hugging Face folder "
        "instead"
    )


def _layer_types(layers: int, pattern: int) -> list[str]:
    """One of every `pattern` layers attends to all tokens."""
    return ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(layers)]


# GPT-NeoX: layer norms with biases, q, k and v of all heads in one matrix, partly rotated heads.
_NEOX_OUTER = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"}
_NEOX_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_NEOX_NORM = ("attention.layer_norm_epsilon", "layer_norm_eps")


def _gptneox(fields: Fields, tensors: Tensors) -> dict[str, Any]:
    """Heads are not grouped, and their size follows from their number."""
    shared = read_shared(fields, tensors, norm=_NEOX_NORM, outer=_NEOX_OUTER, partial=True)
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
        **write_shared(ungrouped, rope, norm=_NEOX_NORM, eps=1e-5, partial=True),
        "use_parallel_residual": flag(bool(config.get("use_parallel_residual", True))),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _LLAMA_BLOCK, _llama, _write_llama, llama3_factors, paired_heads=True
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA_BLOCK, _qwen2, _write_qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA_BLOCK | _HEAD_NORMS, _qwen3, _write_qwen3),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _LLAMA_BLOCK, _smollm3, _write_smollm3, paired_heads=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA_BLOCK, _gemma2, _write_gemma2, shifted_norms=True),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _GEMMA_BLOCK | _HEAD_NORMS, _gemma3, _write_gemma3, shifted_norms=True
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _FUSED_BLOCK, _phi3, _write_phi3),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", _OLMO2_BLOCK | _HEAD_NORMS, _olmo2, _write_olmo2),
    "starcoder2": Architecture(
        "starcoder2", "Starcoder2ForCausalLM", _STARCODER2_BLOCK, _starcoder2, _write_starcoder2
    ),
    "gptneox": Architecture(
        "gpt_neox", "GPTNeoXForCausalLM", _NEOX_BLOCK, _gptneox, _write_gptneox,
        outer=_NEOX_OUTER, layers="gpt_neox.layers", interleaved="query_key_value",
    ),
}  # fmt: skip
# By `model_type`. Mistral has the tensors of Llama.
_WRITTEN_AS = {known.model_type: name for name, known in ARCHITECTURES.items()} | {"mistral": "llama"}


def architecture_of(config: Config) -> tuple[str, Architecture]:
    """The architecture as which a Hugging Face configuration is written, with its name in GGUF.

    Raises:
        ModelError: if its `model_type` has no name here, with a list of the known ones.
    """
    model_type = config.get("model_type")
    # In a list: a damaged file may give a value that cannot be hashed.
    if model_type not in list(_WRITTEN_AS):
        raise ModelError(
            f"the model_type {shown(model_type)} has no name in GGUF here; known are {', '.join(_WRITTEN_AS)}: write "
            "the model as a Hugging Face folder instead"
        )
    name = _WRITTEN_AS[str(model_type)]
    return name, ARCHITECTURES[name]
