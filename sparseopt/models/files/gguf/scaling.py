"""Scalings of rotary positions in GGUF metadata, read and written.

The factors of llama3 are a tensor of their own.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import require
from sparseopt.models.base.rope import Llama3, plain_frequencies, read_rope, rope_table
from sparseopt.models.files.gguf.fields import Config, Fields, Tensors, Values, refuse_unless_meant, shortest
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
        # llama.cpp computes the usual factor whatever `yarn_attn_factor` says, and multiplies it by this one.
        more["rope.scaling.attn_factor"] = number(given["attention_factor"] / _usual_magnitude(factor))
    return base | {
        "rope.scaling.type": text(kind),
        "rope.scaling.factor": number(factor),
        "rope.scaling.original_context_length": count(length),
        **more,
    }


def _usual_magnitude(factor: float) -> float:
    """The factor by which yarn makes the rotated vectors longer, unless a configuration gives another."""
    return 1.0 + 0.1 * math.log(max(factor, 1.0))


def llama3_factors(config: Config) -> np.ndarray | None:
    """By what a llama3 scaling divides each frequency, float32 `[H/2]`; None for another scaling.

    Raises:
        ModelError: for a scaling that cannot be told from its factors.
    """
    fields = rope_table(config)
    if fields["rope_type"] != "llama3":
        return None
    rope = read_rope(config)
    size = config.get("head_dim") or require(config, "hidden_size") // require(config, "num_attention_heads")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    expected = {name: fields.get(name) for name in names}
    factors = (plain_frequencies(rope.theta, size) / rope.frequencies(size)).astype(np.float32)
    # The largest are the factor itself, which the quotient may miss by rounding.
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
