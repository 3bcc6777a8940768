"""Reading and writing what all architectures have: sizes, position embedding and its scaling."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import optional, require
from sparseopt.models.base.rope import Llama3, plain_frequencies, read_rope, rope_table
from sparseopt.models.files.gguf.base import OUTER, Config, Fields, Tensors, Values, refuse_unless_meant, shortest
from sparseopt.models.files.gguf.header import count, number, text

# Frequency factors of a scaled rotary embedding: part of the configuration, not of a module.
ROPE_FACTORS = "rope_freqs.weight"

# Fields of yarn in GGUF and in Hugging Face.
_YARN = {
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}


def read_scaling(fields: Fields, tensors: Tensors, theta: float) -> dict[str, Any]:
    """The fields of a scaling in a Hugging Face configuration, without the base."""
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
            **_yarn_factors(fields),
        }
    raise fields.error("rope.scaling.type", "supported are none, linear, yarn, and llama3 by its factors")


def _yarn_factors(fields: Fields) -> dict[str, float]:
    found, multiple = fields.numbers(_YARN), fields.get("rope.scaling.attn_factor")
    if multiple is not None and "attention_factor" not in found:
        usual = _usual_magnitude(fields.number("rope.scaling.factor"))
        found["attention_factor"] = fields.number("rope.scaling.attn_factor") * usual
    return found


def llama3_scaling(factors: np.ndarray, theta: float, path: Path) -> dict[str, Any]:
    """The llama3 scaling with these frequency factors; the released models differ only in `factor`."""
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


def write_scaling(rope: Config, kinds: tuple[str, ...]) -> Values:
    """The metadata of a position embedding, given as `rope_table` reads it, with its base.

    Args:
        rope: the fields.
        kinds: the scalings that programs apply to models of the architecture, besides none.
    """
    kind = rope["rope_type"]
    if kind not in ("default", *kinds):
        raise ModelError(
            f"rope_type={kind!r} cannot be written to a GGUF file of this architecture; possible are default, "
            f"{', '.join(kinds)}: write the model as a Hugging Face folder instead"
        )
    base = {"rope.freq_base": number(require(rope, "rope_theta", float))}
    if kind in ("default", "llama3"):
        return base
    if kind == "linear":
        scaling = {"rope.scaling.factor": number(require(rope, "factor", float))}
        return base | {"rope.scaling.type": text(kind)} | scaling
    refuse_unless_meant(rope, {"truncate": (None, True)})
    length = require(rope, "original_max_position_embeddings")
    factor = require(rope, "factor", float, default=rope.get("max_position_embeddings", 0) / length)
    given = dict(rope)
    if rope.get("attention_factor") is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        given["attention_factor"] = read_rope({"rope_parameters": given}).magnitude
    more = {key: number(require(given, name, float)) for key, name in _YARN.items() if given.get(name) is not None}
    if given.get("attention_factor") is not None:
        # llama.cpp ignores `yarn_attn_factor`: it multiplies the usual factor by this one.
        more["rope.scaling.attn_factor"] = number(given["attention_factor"] / _usual_magnitude(factor))
    return base | {
        "rope.scaling.type": text(kind),
        "rope.scaling.factor": number(factor),
        "rope.scaling.original_context_length": count(length),
        **more,
    }


def _usual_magnitude(factor: float) -> float:
    """The factor by which yarn lengthens the rotated vectors, unless a configuration gives another."""
    return 1.0 + 0.1 * math.log(max(factor, 1.0))


def llama3_factors(config: Config) -> np.ndarray | None:
    """The divisor of each frequency in a llama3 scaling, float32 `[H/2]`; None for another scaling.

    Raises:
        ModelError: if the scaling cannot be recovered from its factors.
    """
    fields = rope_table(config)
    if fields["rope_type"] != "llama3":
        return None
    rope = read_rope(config)
    size = config.get("head_dim") or require(config, "hidden_size") // require(config, "num_attention_heads")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    expected = {name: fields.get(name) for name in names}
    factors = (plain_frequencies(rope.theta, size) / rope.frequencies(size)).astype(np.float32)
    # The largest equal the factor itself, which the quotient may miss by rounding.
    factor = require(fields, "factor", float)
    factors[np.isclose(factors, factor, rtol=1e-6)] = factor
    try:
        found = llama3_scaling(factors, rope.theta, Path("the file"))
    except ModelError:
        found = {}
    if expected.items() <= found.items():
        return factors
    raise ModelError(
        f"the llama3 rope with {expected} cannot be told from its factors, which are all that a GGUF file has: they "
        "must divide some frequencies by the whole factor, with the other fields 1, 4 and 8192 as in Llama 3; write "
        "the model as a Hugging Face folder instead"
    )


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
        tensors: all tensors, which show biases and a tied head.
        theta: the rotary base if the file has none.
        norm: the names of the norms' epsilon in GGUF and in the configuration.
        outer: names of tensors outside the blocks.
        partial: whether heads may be rotated in part.
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
        rope: its position embedding, from `rope_table`.
        scalings: the scalings that programs apply to models of the architecture.
        norm: the names of the norms' epsilon in GGUF and in the configuration.
        eps: epsilon of a configuration without it.
        partial: whether heads may be rotated in part.
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
    """Raise if the heads together are not as wide as the residual stream, which llama.cpp does not load here."""
    hidden_size, heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    head_dim = optional(config, "head_dim") or hidden_size // heads
    if heads * head_dim != hidden_size:
        raise ModelError(
            f"a GGUF file of this architecture has num_attention_heads times head_dim equal to hidden_size, given "
            f"{heads} times {head_dim} with hidden_size={hidden_size}; keep all heads, or write the model as a Hugging "
            "Face folder instead"
        )
