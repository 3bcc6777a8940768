"""Tiny random models of every GGUF architecture, under Hugging Face names, and GGUF files written from them.

Tensor names and metadata keys are the `gguf` package's own.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, Keys

from tests.models.tiny import MERGES, SPECIAL, VOCAB, pair_heads

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PLAIN_ROPE = {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_GEMMA = {
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}

# Whole configurations: what a file written from them must give again.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_SIZES,
        **_PLAIN_ROPE,
        "head_dim": 8,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **_SIZES,
        "rope_theta": 1000000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "head_dim": 8,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **_SIZES,
        "rope_theta": 1000000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "head_dim": 16,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **_SIZES,
        **_PLAIN_ROPE,
        **_GEMMA,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **_SIZES,
        **_GEMMA,
        "num_hidden_layers": 7,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}


def tensor_shapes(architecture: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its Hugging Face name."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (q, width),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.v_proj.weight": (kv, width),
        "self_attn.o_proj.weight": (width, q),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    if architecture == "qwen2":
        block |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", q), ("k", kv), ("v", kv))}
    if architecture in ("qwen3", "gemma3"):
        block |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    if architecture in ("gemma2", "gemma3"):
        block |= {"pre_feedforward_layernorm.weight": (width,), "post_feedforward_layernorm.weight": (width,)}
    outer: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        outer["lm_head.weight"] = (config["vocab_size"], width)
    layers = range(config["num_hidden_layers"])
    return outer | {f"model.layers.{i}.{name}": shape for i in layers for name, shape in block.items()}


def tensors_of(architecture: str, config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in tensor_shapes(architecture, config).items()
    }


def metadata_of(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a converter writes for this architecture, tokenizer included."""
    gemma = architecture.startswith("gemma")
    values = {
        Keys.LLM.BLOCK_COUNT: config["num_hidden_layers"],
        Keys.LLM.CONTEXT_LENGTH: config["max_position_embeddings"],
        Keys.LLM.EMBEDDING_LENGTH: config["hidden_size"],
        Keys.LLM.FEED_FORWARD_LENGTH: config["intermediate_size"],
        Keys.Attention.HEAD_COUNT: config["num_attention_heads"],
        Keys.Attention.HEAD_COUNT_KV: config["num_key_value_heads"],
        Keys.Attention.LAYERNORM_RMS_EPS: config["rms_norm_eps"],
    }
    if architecture != "gemma2":
        values[Keys.Rope.FREQ_BASE] = config["rope_theta"]
    if architecture == "llama":
        values |= {Keys.LLM.VOCAB_SIZE: config["vocab_size"], Keys.Rope.DIMENSION_COUNT: config["head_dim"]}
    if architecture == "qwen3" or gemma:
        values |= {Keys.Attention.KEY_LENGTH: config["head_dim"], Keys.Attention.VALUE_LENGTH: config["head_dim"]}
    if gemma:
        values[Keys.Attention.SLIDING_WINDOW] = config["sliding_window"]
    if architecture == "gemma2":
        values |= {
            Keys.LLM.ATTN_LOGIT_SOFTCAPPING: config["attn_logit_softcapping"],
            Keys.LLM.FINAL_LOGIT_SOFTCAPPING: config["final_logit_softcapping"],
        }
    if architecture == "gemma3":
        values |= {
            "{arch}.rope.freq_base_swa": config["rope_local_base_freq"],
            Keys.Rope.SCALING_TYPE: "linear",
            Keys.Rope.SCALING_FACTOR: 8.0,
        }
    special = {
        Keys.Tokenizer.BOS_ID: config["bos_token_id"],
        Keys.Tokenizer.EOS_ID: config["eos_token_id"],
        Keys.Tokenizer.PAD_ID: config["pad_token_id"],
    }
    own = {key.format(arch=architecture): value for key, value in values.items()}
    return own | (sentencepiece_metadata(prefix=False) if gemma else byte_level_metadata("qwen2")) | special


def byte_level_metadata(pre: str) -> dict[str, Any]:
    return {
        Keys.Tokenizer.MODEL: "gpt2",
        Keys.Tokenizer.PRE: pre,
        Keys.Tokenizer.LIST: VOCAB,
        Keys.Tokenizer.TOKEN_TYPE: [3] * len(SPECIAL) + [1] * (len(VOCAB) - len(SPECIAL)),
        Keys.Tokenizer.MERGES: MERGES,
        Keys.Tokenizer.ADD_BOS: False,
    }


# Pieces in order of training, as SentencePiece lays them out: specials, user-defined, bytes, merges, letters.
_USER_DEFINED = ["\n\n", "  ", "   ", "    ", "<b>"]
_MERGED = ["he", "ll", "▁t", "lo", "hell", "▁the", "▁hello", "hello", "▁a", "é▁", "aa", "aaa"]
_PIECES = ["▁", *"abcdefghijklmnopqrstuvwxyz", "\n", "é"]


def sentencepiece_metadata(prefix: bool) -> dict[str, Any]:
    """A SentencePiece vocabulary as converters store it: user-defined tokens with real spaces and a made-up score."""
    head = ["<pad>", "<bos>", "<eos>", "<unk>", *_USER_DEFINED]
    tokens = [*head, *(f"<0x{byte:02X}>" for byte in range(256)), *_MERGED, *_PIECES]
    scores = [-1000.0] * len(head) + [0.0] * 256 + [-float(i) for i in range(len(_MERGED) + len(_PIECES))]
    kinds = [3, 3, 3, 2, 4, 4, 4, 4, 4] + [6] * 256 + [1] * (len(_MERGED) + len(_PIECES))
    return {
        Keys.Tokenizer.MODEL: "llama",
        Keys.Tokenizer.PRE: "default",
        Keys.Tokenizer.LIST: tokens,
        Keys.Tokenizer.SCORES: scores,
        Keys.Tokenizer.TOKEN_TYPE: kinds,
        Keys.Tokenizer.BOS_ID: 1,
        Keys.Tokenizer.EOS_ID: 2,
        Keys.Tokenizer.UNK_ID: 3,
        Keys.Tokenizer.PAD_ID: 0,
        Keys.Tokenizer.ADD_PREFIX: prefix,
    }


def write_architecture(
    file: Path,
    architecture: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Matrices are stored as `kind`, vectors as float32; `changes` to the metadata by key, None takes one out."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (metadata_of(architecture, config) | dict(changes or {})).items():
        _add_value(writer, key, value)
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        stored = tensor
        if architecture == "llama" and (part := name.split(".")[-2]) in heads:
            stored = pair_heads(stored, heads[part])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            stored = stored + 1
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        if stored.ndim == 2:
            writer.add_tensor(gguf_name, gguf.quants.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    if value is not None:
        add[type(value)](key, value)
