"""Floor 5: a GGUF file seen as a Hugging Face model: names, configuration, rotary layout, sidecar files."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.models.errors import ModelError
from sparseopt.models.gguf_file import GGUFTensor, read_header
from sparseopt.models.gguf_tokenizer import build_tokenizer, tokenizer_config

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
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
# Frequency factors of a scaled rotary embedding: they go into the configuration, not into a module.
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """What a GGUF architecture is in Hugging Face; `paired_heads`: q and k rows are stored pair by pair."""

    model_type: str
    class_name: str
    paired_heads: bool


ARCHITECTURES = {"llama": Architecture("llama", "LlamaForCausalLM", paired_heads=True)}


class GGUFSource:
    """One GGUF file. Quantised tensors read as float32, q and k rows in half-rotation order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self._metadata = header.metadata
        name = self._metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise ModelError(f"{path} has the unknown architecture {name!r}; known are {', '.join(ARCHITECTURES)}")
        self._name, self._architecture = name, ARCHITECTURES[name]
        self._rope_factors = header.tensors.get(_ROPE_FACTORS)
        self.tensors: dict[str, GGUFTensor] = {
            hf_name(name): tensor for name, tensor in header.tensors.items() if name != _ROPE_FACTORS
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor by its Hugging Face name, dequantised."""
        tensor = self.tensors[name].read()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if self._architecture.paired_heads and heads:
            return unpair_heads(tensor, self.config[heads])
        return tensor

    @cached_property
    def config(self) -> dict[str, Any]:
        """A Hugging Face configuration made from the metadata.

        Raises:
            ModelError: if a needed value is missing.
        """
        hidden_size, heads = self._count("embedding_length"), self._count("attention.head_count")
        embedding = self.tensors.get("model.embed_tokens.weight")
        theta = self._number("rope.freq_base", 10000.0)
        config = {
            "architectures": [self._architecture.class_name],
            "model_type": self._architecture.model_type,
            "vocab_size": embedding.shape[0] if embedding else self._count("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": self._count("attention.key_length", hidden_size // heads),
            "hidden_act": "silu",
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta} | self._rope_scaling(),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.tensors,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self.tensors,
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "dtype": self._matrix_dtype(),
        }
        return config | self._special_ids()

    def sidecars(self) -> dict[str, bytes]:
        """generation_config.json, tokenizer.json and tokenizer_config.json, made from the metadata."""
        files = {"generation_config.json": self._special_ids()}
        if "tokenizer.ggml.tokens" in self._metadata:
            files["tokenizer.json"] = json.loads(self.tokenizer().to_str())
            files["tokenizer_config.json"] = tokenizer_config(self._metadata)
        return {name: json.dumps(value, indent=2, ensure_ascii=False).encode() for name, value in files.items()}

    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` that the metadata describe."""
        return build_tokenizer(self._metadata, self.path)

    def _count(self, field: str, default: int | None = None) -> int:
        return self._value(field, int, default)

    def _number(self, field: str, default: float | None = None) -> float:
        return _shortest(self._value(field, float, default))

    def _value(self, field: str, kind: type[int] | type[float], default: Any) -> Any:
        """A positive number of the architecture's own; one given for each block must be the same for all."""
        value = self._metadata.get(f"{self._name}.{field}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not kind or not value > 0:
            raise ModelError(
                f"{self.path} has {self._name}.{field} = {value!r}, expected one positive {kind.__name__}; "
                "convert the model again"
            )
        return value

    def _rope_scaling(self) -> dict[str, Any]:
        kind = self._metadata.get(f"{self._name}.rope.scaling.type", "none")
        if self._rope_factors is not None:
            return _llama3_scaling(self._rope_factors.read(), self._number("rope.freq_base", 10000.0), self.path)
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._number("rope.scaling.factor")}
        if kind == "none":
            return {"rope_type": "default"}
        raise ModelError(f"{self.path} has rope scaling {kind!r}; supported are none, linear, and llama3 by factors")

    def _matrix_dtype(self) -> str:
        dtypes = {tensor.dtype.name for tensor in self.tensors.values() if len(tensor.shape) == 2}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def _special_ids(self) -> dict[str, int]:
        names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        found = {name: self._metadata.get(f"tokenizer.ggml.{short}_token_id") for name, short in names.items()}
        return {name: value for name, value in found.items() if type(value) is int}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; one without keeps its own, to be reported as extra."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    parts = stem.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{kind}"
    return name


def unpair_heads(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from the order (0, H/2, 1, H/2 + 1, ...) back to 0 .. H - 1; `[heads H, ...]`."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 9.99999975e-06 is written 1e-05 again."""
    return float(str(np.float32(value)))


def _llama3_scaling(factors: np.ndarray, theta: float, path: Path) -> dict[str, Any]:
    """The llama3 scaling whose frequency factors these are; the released models differ in `factor` alone.

    Raises:
        ModelError: if the factors are not those of a released model.
    """
    from sparseopt.models.decoder import Rope

    rope = Rope(theta, _shortest(float(factors.max())), 1.0, 4.0, 8192)
    plain = Rope(theta).frequencies(2 * factors.size)
    if not np.allclose(plain / rope.frequencies(2 * factors.size), factors, rtol=1e-3):
        raise ModelError(f"{path} has rope_freqs that are not those of Llama 3; use the Hugging Face folder instead")
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low,
        "high_freq_factor": rope.high,
        "original_max_position_embeddings": rope.original_length,
    }
