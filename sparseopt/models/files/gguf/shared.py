"""Sizes and position embedding, which all architectures have, read and written."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import optional, require
from sparseopt.models.files.gguf.fields import OUTER, Config, Fields, Tensors, Values, refuse_unless_meant
from sparseopt.models.files.gguf.header import count, number
from sparseopt.models.files.gguf.scaling import read_scaling, write_scaling

# The names of the norms' epsilon in GGUF and in Hugging Face.
RMS_NORM = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")


def read_shared(
    fields: Fields,
    tensors: Tensors,
    theta: float = 10000.0,
    norm: tuple[str, str] = RMS_NORM,
    outer: Mapping[str, str] = OUTER,
    partial: bool = False,
) -> dict[str, Any]:
    """Fields of every architecture.

    The vocabulary has the embedding's rows: converters may remove its padding.

    Args:
        fields: the metadata.
        tensors: all tensors, from which biases and a tied head are seen.
        theta: the rotary base of a file that has none.
        norm: the names of the norms' epsilon in GGUF and in the configuration.
        outer: names of tensors outside the blocks.
        partial: heads may be rotated in part.
    """
    hidden_size, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", hidden_size // heads)
    embedding, theta = tensors.get(f"{outer['token_embd']}.weight"), fields.number("rope.freq_base", theta)
    fields.require("attention.value_length", head_dim)
    rope: dict[str, Any] = {"rope_theta": theta}
    if partial:
        rope["partial_rotary_factor"] = fields.count("rope.dimension_count", head_dim) / head_dim
    else:
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
        norm[1]: fields.number(norm[0]),
        "tie_word_embeddings": f"{outer['output']}.weight" not in tensors,
        "rope_theta": theta,
        "rope_parameters": rope | read_scaling(fields, tensors, theta),
    }


def write_shared(
    config: Config,
    rope: Config,
    scalings: tuple[str, ...] = ("linear", "yarn"),
    norm: tuple[str, str] = RMS_NORM,
    eps: float = 1e-6,
    partial: bool = False,
) -> Values:
    """Metadata of every architecture.

    Args:
        config: a Hugging Face configuration.
        rope: its position embedding, by `rope_table`.
        scalings: those that programs apply to models of the architecture.
        norm: the names of the norms' epsilon in GGUF and in the configuration.
        eps: of a configuration without it.
        partial: heads may be rotated in part.
    """
    if not partial:
        refuse_unless_meant(rope, {"partial_rotary_factor": (None, 1.0)})
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
        norm[0]: number(require(config, norm[1], float, default=eps)),
        "rope.dimension_count": count(int(head_dim * (rope.get("partial_rotary_factor") or 1.0))),
        **write_scaling(rope, scalings),
    }


def refuse_other_width(config: Config) -> None:
    """Refuse heads that together are not as wide as the residual stream, which llama.cpp does not load here."""
    hidden_size, heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    head_dim = optional(config, "head_dim") or hidden_size // heads
    if heads * head_dim != hidden_size:
        raise ModelError(
            f"a GGUF file of this architecture has num_attention_heads times head_dim equal to hidden_size, given "
            f"{heads} times {head_dim} with hidden_size={hidden_size}; keep all heads, or write the model as a Hugging "
            "Face folder instead"
        )
