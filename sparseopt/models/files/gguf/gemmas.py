"""The Gemma architectures: norms stored with 1 added, layers with a sliding window, capped scores."""

from typing import Any

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import optional, require, shown
from sparseopt.models.base.rope import rope_table
from sparseopt.models.files.gguf.architecture import Architecture
from sparseopt.models.files.gguf.fields import Config, Fields, Tensors, Values, has_bias, refuse_unless_meant
from sparseopt.models.files.gguf.header import count, number
from sparseopt.models.files.gguf.llamas import HEAD_NORMS, LLAMA_BLOCK
from sparseopt.models.files.gguf.shared import read_shared, write_shared

# "post_attention_layernorm" is the norm before the MLP in Llama, and the one after attention in Gemma.
_BLOCK = LLAMA_BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# What transformers fills in if a configuration has no value.
_DEFAULTS = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_DEFAULTS2 = _DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


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
    config = _DEFAULTS2 | dict(config)
    # llama.cpp has no head apart from the embedding, and caps in any case.
    refuse_unless_meant(config, {"tie_word_embeddings": (True,)})
    return {
        **_write_gemma(config, rope_table(config), big=46, pattern=2),
        "attn_logit_softcapping": number(require(config, "attn_logit_softcapping", float)),
        "final_logit_softcapping": number(require(config, "final_logit_softcapping", float)),
    }


def _write_gemma3(config: Config) -> Values:
    config = _DEFAULTS | dict(config)
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


GEMMA2 = Architecture("gemma2", "Gemma2ForCausalLM", _BLOCK, _gemma2, _write_gemma2, shifted_norms=True)
GEMMA3 = Architecture(
    "gemma3_text", "Gemma3ForCausalLM", _BLOCK | HEAD_NORMS, _gemma3, _write_gemma3, shifted_norms=True
)
