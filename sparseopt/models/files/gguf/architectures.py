"""The supported GGUF architectures: tensor names, layout and configuration of each in Hugging Face.

Some constants are not in GGUF files, because the programs that run them know the architecture; they are given here. A
new architecture is two functions, one that reads a configuration and one that writes it, and one entry of
`ARCHITECTURES`.
"""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import optional, require, shown
from sparseopt.models.base.rope import rope_table
from sparseopt.models.files.gguf.architecture import Architecture, Config, Fields, Tensors, Values
from sparseopt.models.files.gguf.header import count, number
from sparseopt.models.files.gguf.scaling import llama3_factors, read_scaling, write_scaling

Read = dict[str, Any]

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
# "post_attention_layernorm" is the norm before the MLP in Llama, and the one after attention in Gemma.
_GEMMA_BLOCK = _LLAMA_BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _shared(fields: Fields, tensors: Tensors, theta: float = 10000.0) -> Read:
    """Fields of every architecture; `theta` is the rotary base of a file that has none.

    The vocabulary has the embedding's rows: converters may remove its padding.
    """
    hidden_size, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", hidden_size // heads)
    embedding, theta = tensors.get("model.embed_tokens.weight"), fields.number("rope.freq_base", theta)
    fields.require("attention.value_length", head_dim)
    fields.require("rope.dimension_count", head_dim)
    fields.require("attention.causal", True)
    fields.require("expert_count", 0)
    fields.require("expert_used_count", 0)
    # Without effect: the size for a file without an embedding, and two notes on the file's history.
    for name in ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned"):
        fields.get(name)
    return {
        "vocab_size": embedding.shape[0] if embedding else fields.count("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_hidden_layers": fields.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.count("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, **read_scaling(fields, tensors, theta)},
    }


def _llama(fields: Fields, tensors: Tensors) -> Read:
    return {
        **_shared(fields, tensors),
        "hidden_act": "silu",
        "attention_bias": _has_bias(tensors, "self_attn.q_proj"),
        "mlp_bias": _has_bias(tensors, "mlp.gate_proj"),
    }


def _qwen2(fields: Fields, tensors: Tensors) -> Read:
    """Biases of q, k and v are part of the family; GGUF stores no sliding windows."""
    return {**_shared(fields, tensors), "hidden_act": "silu", "use_sliding_window": False}


def _qwen3(fields: Fields, tensors: Tensors) -> Read:
    return {**_qwen2(fields, tensors), "attention_bias": _has_bias(tensors, "self_attn.q_proj")}


def _gemma2(fields: Fields, tensors: Tensors) -> Read:
    return {
        **_gemma(fields, tensors, 10000.0, big=46, pattern=2),
        "sliding_window": fields.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
    }


def _gemma3(fields: Fields, tensors: Tensors) -> Read:
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


def _gemma(fields: Fields, tensors: Tensors, theta: float, big: int, pattern: int) -> Read:
    """Fields that Gemma 2 and 3 share; one of every `pattern` layers attends to all tokens.

    The scale of attention is in no file. It is the head's width, except in the released 27B model, recognised by its
    number of layers, `big`, where it is the residual stream's width per head.
    """
    sizes = _shared(fields, tensors, theta)
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
        "attention_bias": _has_bias(tensors, "self_attn.q_proj"),
        "query_pre_attn_scalar": scalar,
        "layer_types": ["sliding_attention" if item else "full_attention" for item in slides],
    }


def _has_bias(tensors: Tensors, linear: str) -> bool:
    return f"model.layers.0.{linear}.bias" in tensors


# What transformers fills in where a configuration has no value.
_QWEN3_DEFAULTS = {"head_dim": 128}
_GEMMA_DEFAULTS = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _write_shared(config: Config, rope: Config, scalings: tuple[str, ...] = ("linear", "yarn")) -> Values:
    """Metadata of every architecture."""
    _refuse(rope, {"partial_rotary_factor": (None, 1.0)})
    hidden_size, heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    head_dim = optional(config, "head_dim") or hidden_size // heads
    return {
        "vocab_size": count(require(config, "vocab_size")),
        "context_length": count(require(config, "max_position_embeddings")),
        "embedding_length": count(hidden_size),
        "block_count": count(require(config, "num_hidden_layers")),
        "feed_forward_length": count(require(config, "intermediate_size")),
        "attention.head_count": count(heads),
        "attention.head_count_kv": count(optional(config, "num_key_value_heads") or heads),
        "attention.key_length": count(head_dim),
        "attention.value_length": count(head_dim),
        "attention.layer_norm_rms_epsilon": number(require(config, "rms_norm_eps", float, default=1e-6)),
        "rope.dimension_count": count(head_dim),
        **write_scaling(rope, scalings),
    }


def _write_llama(config: Config) -> Values:
    """Llama and Mistral; a window that covers all positions is none."""
    longest = require(config, "max_position_embeddings")
    window = optional(config, "sliding_window", default=4096 if config.get("model_type") == "mistral" else None)
    if window is not None and window < longest:
        raise ModelError(
            f"GGUF files of Llama and Mistral models have no sliding windows, given sliding_window={window} with "
            f"max_position_embeddings={longest}; set sliding_window to null in config.json for full attention, or "
            f"max_position_embeddings to {window}"
        )
    _refuse(config, {"hidden_act": ("silu",)})
    return _write_shared(config, rope_table(config), ("linear", "yarn", "llama3"))


def _write_qwen2(config: Config) -> Values:
    slides = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
    if slides and "sliding_attention" in (config.get("layer_types") or ["sliding_attention"]):
        _refuse(config, {"use_sliding_window": (False,)})
    _refuse(config, {"hidden_act": ("silu",)})
    return _write_shared(config, rope_table(config))


def _write_qwen3(config: Config) -> Values:
    return _write_qwen2(_QWEN3_DEFAULTS | dict(config))


def _write_gemma2(config: Config) -> Values:
    config = _GEMMA2_DEFAULTS | dict(config)
    # llama.cpp has no head apart from the embedding, and caps in any case.
    _refuse(config, {"tie_word_embeddings": (True,)})
    return {
        **_write_gemma(config, rope_table(config), big=46, pattern=2),
        "attn_logit_softcapping": number(require(config, "attn_logit_softcapping", float)),
        "final_logit_softcapping": number(require(config, "final_logit_softcapping", float)),
    }


def _write_gemma3(config: Config) -> Values:
    config = _GEMMA_DEFAULTS | dict(config)
    _refuse(config, {"attn_logit_softcapping": (None,)})
    nearby: Config = {"rope_theta": require(config, "rope_local_base_freq", float, default=1e4)}
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        nearby = rope_table({**config, **nearby}, part="sliding_attention")
        _refuse(nearby, {"rope_type": ("default",)})
    cap = optional(config, "final_logit_softcapping", float)
    pattern = require(config, "sliding_window_pattern", default=6)
    return {
        **_write_gemma(config, rope_table(config, 1e6, part="full_attention"), big=62, pattern=pattern, usual=6),
        "rope.freq_base_swa": number(require(nearby, "rope_theta", float)),
        **({} if cap is None else {"final_logit_softcapping": number(cap)}),
    }


def _write_gemma(config: Config, rope: Config, big: int, pattern: int, usual: int | None = None) -> Values:
    """See `_gemma`; `pattern` is the configuration's own, and `usual` that of the programs where it differs."""
    fields, layers = _write_shared(config, rope), require(config, "num_hidden_layers")
    heads = require(config, "num_attention_heads")
    scalar = require(config, "hidden_size") // heads if layers == big else require(config, "head_dim")
    _refuse(config, {"query_pre_attn_scalar": (scalar,), "hidden_activation": ("gelu_pytorch_tanh", None)})
    types = config.get("layer_types") or _layer_types(layers, pattern)
    usual = usual or pattern
    fields["attention.sliding_window"] = count(require(config, "sliding_window"))
    if types == _layer_types(layers, usual):
        return fields
    for other in range(1, layers + 2):
        if types == _layer_types(layers, other):
            return fields | {"attention.sliding_window_pattern": count(other)}
    raise ModelError(
        f"the model configuration's layer_types={shown(types)} has no full attention in every n-th layer, as programs "
        "that run GGUF files of Gemma models expect; write the model as a Hugging Face folder instead"
    )


def _layer_types(layers: int, pattern: int) -> list[str]:
    """One of every `pattern` layers attends to all tokens."""
    return ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(layers)]


def _refuse(config: Config, allowed: Mapping[str, tuple]) -> None:
    """Refuse other values of fields that GGUF has no key for; they may be absent."""
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise ModelError(
                f"the model configuration has {name}={shown(config[name])}, and a GGUF file of this architecture can "
                f"only mean {' or '.join(map(repr, values))}; write the model as a Hugging Face folder instead"
            )


ARCHITECTURES = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _LLAMA_BLOCK, _llama, _write_llama, llama3_factors, paired_heads=True
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA_BLOCK, _qwen2, _write_qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA_BLOCK | _HEAD_NORMS, _qwen3, _write_qwen3),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA_BLOCK, _gemma2, _write_gemma2, shifted_norms=True),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _GEMMA_BLOCK | _HEAD_NORMS, _gemma3, _write_gemma3, shifted_norms=True
    ),
}
# By `model_type`. Mistral has the tensors of Llama.
_WRITTEN_AS = {known.model_type: name for name, known in ARCHITECTURES.items()} | {"mistral": "llama"}


def architecture_of(config: Config) -> tuple[str, Architecture]:
    """The architecture that a Hugging Face configuration is written as, with its name in GGUF.

    Raises:
        ModelError: if its `model_type` has no name here, naming those known.
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
