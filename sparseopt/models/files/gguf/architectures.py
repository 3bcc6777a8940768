"""The supported GGUF architectures: tensor names, layout and configuration of each in Hugging Face.

Some constants are not in GGUF files, because the programs that run them know the architecture; they are given here. A
new architecture is one function and one entry of `ARCHITECTURES`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.rope import Llama3, plain_frequencies
from sparseopt.models.files.gguf.header import GGUFTensor

# Tensors by their Hugging Face names; one without keeps its own.
Tensors = Mapping[str, GGUFTensor]
Config = dict[str, Any]

# Frequency factors of a scaled rotary embedding: part of the configuration, not of a module.
ROPE_FACTORS = "rope_freqs.weight"

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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


class Fields:
    """The metadata under `{architecture}.`, by the rest of their keys; reading marks a key."""

    def __init__(self, path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.path, self._prefix, self._metadata = path, f"{architecture}.", metadata
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._metadata

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(self._prefix + name)
        return self._metadata.get(self._prefix + name, default)

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer; where one is given for each block, all must be equal."""
        return self._positive(name, int, default)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal that rounds to the stored float32."""
        return shortest(self._positive(name, float, default))

    def numbers(self, names: Mapping[str, str]) -> dict[str, float]:
        """Those numbers of `{GGUF name: Hugging Face name}` that the file has, by their Hugging Face names."""
        return {there: self.number(here) for here, there in names.items() if here in self}

    def require(self, name: str, value: Any) -> None:
        """Refuse a key with another value; it may be absent."""
        if self.get(name, value) != value:
            raise self.error(name, f"{value!r} is the only value supported")

    def refuse_unread(self) -> None:
        """Refuse keys of the architecture that were never read: they ask for something that is not supported."""
        unread = [key for key in self._metadata if key.startswith(self._prefix) and key not in self._read]
        if unread:
            raise ModelError(
                f"{self.path} has metadata that are not supported: "
                f"{', '.join(unread)}; use the model's Hugging Face folder instead"
            )

    def error(self, name: str, text: str) -> ModelError:
        value = self._metadata.get(self._prefix + name)
        return ModelError(f"{self.path} has {self._prefix}{name} = {repr(value)[:100]}, {text}")

    def _positive(self, name: str, kind: type[int] | type[float], default: Any) -> Any:
        value = self.get(name, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not kind or not 0 < value < math.inf:
            raise self.error(name, f"expected one positive {kind.__name__}; convert the model again")
        return value


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05 for 9.99999975e-06."""
    return float(str(np.float32(value)))


@dataclass(frozen=True)
class Architecture:
    """A GGUF architecture in the terms of Hugging Face.

    Attributes:
        model_type: its `model_type`.
        class_name: its class, for `architectures`.
        block: names of a block's tensors in GGUF and Hugging Face, without the endings ".weight" and ".bias".
        read_config: the configuration, without the entries that all architectures share.
        paired_heads: the rows of q and k are stored pair by pair and must be put in half-rotation order.
        shifted_norms: norm weights are stored with 1 added.
    """

    model_type: str
    class_name: str
    block: Mapping[str, str] = field(repr=False)
    read_config: Callable[[Fields, Tensors], Config] = field(repr=False)
    paired_heads: bool = False
    shifted_norms: bool = False

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a GGUF tensor; one without keeps its own, to be reported as extra."""
        stem, _, kind = name.rpartition(".")
        if stem in _OUTER:
            return f"{_OUTER[stem]}.{kind}"
        parts = stem.split(".", 2)
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in self.block:
            return f"model.layers.{parts[1]}.{self.block[parts[2]]}.{kind}"
        return name

    def undo(self, name: str, tensor: np.ndarray, config: Config) -> np.ndarray:
        """The tensor of a Hugging Face name in the layout of Hugging Face and its own dtype."""
        if self.shifted_norms and name.endswith("norm.weight"):
            return (tensor.astype(np.float32) - 1).astype(tensor.dtype)
        return unpair_heads(tensor, config[_HEADS[_owner(name)]]) if self.moves_rows(name) else tensor

    def moves_rows(self, name: str) -> bool:
        """Whether `undo` changes the order of a tensor's rows."""
        return self.paired_heads and _owner(name) in _HEADS


# The number of heads of the linears that have them in pairs, by its name in a configuration.
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def _owner(name: str) -> str:
    """The module that a tensor belongs to, without those around it."""
    return name.rpartition(".")[0].rpartition(".")[2]


def unpair_heads(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from the order (0, H/2, 1, H/2 + 1, ...) back to 0 .. H - 1; `[heads H, ...]`."""
    if not tensor.ndim or tensor.shape[0] % (2 * heads):
        raise ModelError(f"a tensor {list(tensor.shape)} has no rows of {heads} heads; convert the model again")
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)


def _shared(fields: Fields, tensors: Tensors, theta: float = 10000.0) -> Config:
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
        "rope_parameters": {"rope_theta": theta, **_scaling(fields, tensors, theta)},
    }


def _llama(fields: Fields, tensors: Tensors) -> Config:
    return {
        **_shared(fields, tensors),
        "hidden_act": "silu",
        "attention_bias": _has_bias(tensors, "self_attn.q_proj"),
        "mlp_bias": _has_bias(tensors, "mlp.gate_proj"),
    }


def _qwen2(fields: Fields, tensors: Tensors) -> Config:
    """Biases of q, k and v are part of the family; GGUF stores no sliding windows."""
    return {**_shared(fields, tensors), "hidden_act": "silu", "use_sliding_window": False}


def _qwen3(fields: Fields, tensors: Tensors) -> Config:
    return {**_qwen2(fields, tensors), "attention_bias": _has_bias(tensors, "self_attn.q_proj")}


def _gemma2(fields: Fields, tensors: Tensors) -> Config:
    return {
        **_gemma(fields, tensors, 10000.0, big=46, pattern=2),
        "sliding_window": fields.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
    }


def _gemma3(fields: Fields, tensors: Tensors) -> Config:
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


def _gemma(fields: Fields, tensors: Tensors, theta: float, big: int, pattern: int) -> Config:
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


def _scaling(fields: Fields, tensors: Tensors, theta: float) -> Config:
    # A factor without a type scales linearly.
    kind = fields.get("rope.scaling.type", "linear" if "rope.scaling.factor" in fields else "none")
    if ROPE_FACTORS in tensors:
        return llama3_scaling(tensors[ROPE_FACTORS].read(), theta, fields.path)
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": fields.number("rope.scaling.factor")}
    if kind == "yarn":
        fields.require("rope.scaling.yarn_ext_factor", 1.0)
        return {
            "rope_type": "yarn",
            "factor": fields.number("rope.scaling.factor"),
            "original_max_position_embeddings": fields.count("rope.scaling.original_context_length"),
            **fields.numbers(
                {
                    "rope.scaling.yarn_attn_factor": "attention_factor",
                    "rope.scaling.yarn_beta_fast": "beta_fast",
                    "rope.scaling.yarn_beta_slow": "beta_slow",
                }
            ),
        }
    raise fields.error("rope.scaling.type", "supported are none, linear, yarn, and llama3 by its factors")


def llama3_scaling(factors: np.ndarray, theta: float, path: Path) -> Config:
    """The llama3 scaling with these frequency factors; the released models differ in `factor` alone."""
    scaling = Llama3(shortest(float(factors.max())), 1.0, 4.0, 8192)
    size = 2 * factors.size
    expected = plain_frequencies(theta, size) / scaling.frequencies(theta, size, time=1)
    if not np.allclose(expected, factors, rtol=1e-3):
        raise ModelError(f"{path} has rope_freqs that are not those of Llama 3; use the Hugging Face folder instead")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.length,
    }


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LLAMA_BLOCK, _llama, paired_heads=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA_BLOCK, _qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA_BLOCK | _HEAD_NORMS, _qwen3),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA_BLOCK, _gemma2, shifted_norms=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _GEMMA_BLOCK | _HEAD_NORMS, _gemma3, shifted_norms=True),
}
