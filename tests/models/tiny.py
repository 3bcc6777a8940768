"""Tiny random models as files: Hugging Face folders, golden models of the families, and GGUF of every architecture.

Tensor names and metadata keys of GGUF are the `gguf` package's own.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, Keys
from safetensors.numpy import save_file

from sparseopt.models import OUTER_TAG, ShardedWriter, block_tag, find_family

# The smallest byte-level alphabet that covers the tests' texts, three merges and three special tokens.
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'", "Ġ", "Ċ"]
MERGES = ["h e", "l l", "Ġ t"]
SPECIAL = ["<|end|>", "<|start|>", "<|stop|>"]
VOCAB = [*SPECIAL, *LETTERS, "he", "ll", "Ġt"]
GOLDEN = Path(__file__).parent / "golden"


def tiny_config(**changes):
    """The tiny Llama with the vocabulary of the tests and a tied head."""
    own = {"vocab_size": len(VOCAB), "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pad_token_id": 2}
    return {field: value for field, value in CONFIGS["llama"].items() if field != "head_dim"} | own | changes


def random_tensors(config, rng, dtype=np.float32):
    family = find_family(config)
    shapes = family.expected_shapes(family.read_config(config))
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[-1]) + ("norm" in name)).astype(dtype)
        for name, shape in shapes.items()
    }


def write_folder(folder, config, tensors, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def copy_model(model, folder, **options):
    """The model written out again, a shard for each block."""
    writer = ShardedWriter(folder, model.source, **options)
    writer.write(OUTER_TAG, {key: model.source.read(key) for key in model.outer_keys()})
    for index in range(model.num_blocks):
        keys = model.block_keys(index).values()
        writer.write(block_tag(index), {key: model.source.read(key) for key in keys})
    writer.finish()
    return writer


def write_golden(file, folder):
    """The model of a golden file as a folder, in float32; returns the arrays of the file."""
    arrays = dict(np.load(file))
    stored = {key.removeprefix("weight/"): value for key, value in arrays.items() if key.startswith("weight/")}
    tensors = {key: value.astype(np.float32) for key, value in stored.items()}
    write_folder(folder, json.loads(str(arrays["config"])), tensors)
    return arrays


_ROPE, _LONG_ROPE = ({"rope_type": "default", "rope_theta": theta} for theta in (10000.0, 1000000.0))
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
    "rope_theta": 10000.0,
    "rope_parameters": _ROPE,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_LLAMA = {"head_dim": 8, "hidden_act": "silu", "mlp_bias": False}
_QWEN = {"rope_theta": 1000000.0, "rope_parameters": _LONG_ROPE, "hidden_act": "silu", "use_sliding_window": False}
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA = {
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
_GEMMA3_ROPES = {"full_attention": _LONG_ROPE | {"rope_type": "linear", "factor": 8.0}, "sliding_attention": _ROPE}
_SLIDES, _FULL = "sliding_attention", "full_attention"


def _architecture(name, model_type, *without, **fields):
    sizes = {field: value for field, value in _SIZES.items() if field not in without}
    return {"architectures": [f"{name}ForCausalLM"], "model_type": model_type} | sizes | fields


# Whole configurations by GGUF architecture: what a file written from them must give again.
CONFIGS = {
    "llama": _architecture("Llama", "llama", **_LLAMA),
    "qwen2": _architecture("Qwen2", "qwen2", "attention_bias", **_QWEN | {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3": _architecture("Qwen3", "qwen3", **_QWEN, head_dim=16),
    # A block without a position embedding.
    "smollm3": _architecture(
        "SmolLM3",
        "smollm3",
        **_LLAMA | {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "use_sliding_window": False},
    ),
    "phi3": _architecture(
        "Phi3",
        "phi3",
        "attention_bias",
        head_dim=8,
        sliding_window=None,
        hidden_act="silu",
        original_max_position_embeddings=64,
        rope_parameters=_ROPE | {"partial_rotary_factor": 1.0},
    ),
    "olmo2": _architecture("Olmo2", "olmo2", head_dim=8, hidden_act="silu"),
    "starcoder2": _architecture(
        "Starcoder2",
        "starcoder2",
        *("attention_bias", "rms_norm_eps"),
        head_dim=8,
        norm_epsilon=1e-5,
        use_bias=True,
        sliding_window=None,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    ),
    "gptneox": _architecture(
        "GPTNeoX",
        "gpt_neox",
        *("rms_norm_eps", "num_key_value_heads"),
        layer_norm_eps=1e-5,
        attention_bias=True,
        hidden_act="gelu",
        use_parallel_residual=True,
        rotary_emb_base=10000.0,
        rotary_pct=0.5,
        rope_parameters=_ROPE | {"partial_rotary_factor": 0.5},
    ),
    "gemma2": _architecture("Gemma2", "gemma2", **_GEMMA, **_CAPS, layer_types=[_SLIDES, _FULL, _SLIDES]),
    "gemma3": _architecture(
        "Gemma3",
        "gemma3_text",
        **_GEMMA,
        **dict.fromkeys(_CAPS),
        num_hidden_layers=7,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_parameters=_GEMMA3_ROPES,
        layer_types=[_SLIDES] * 5 + [_FULL, _SLIDES],
    ),
}
# Metadata of every architecture, by the field that holds them.
_FIELDS = {
    Keys.LLM.BLOCK_COUNT: "num_hidden_layers",
    Keys.LLM.CONTEXT_LENGTH: "max_position_embeddings",
    Keys.LLM.EMBEDDING_LENGTH: "hidden_size",
    Keys.LLM.FEED_FORWARD_LENGTH: "intermediate_size",
    Keys.Attention.HEAD_COUNT: "num_attention_heads",
    Keys.Attention.HEAD_COUNT_KV: "num_key_value_heads",
    Keys.Attention.LAYERNORM_RMS_EPS: "rms_norm_eps",
    Keys.Rope.FREQ_BASE: "rope_theta",
    Keys.Tokenizer.BOS_ID: "bos_token_id",
    Keys.Tokenizer.EOS_ID: "eos_token_id",
    Keys.Tokenizer.PAD_ID: "pad_token_id",
}
_HEAD_SIZES = dict.fromkeys((Keys.Attention.KEY_LENGTH, Keys.Attention.VALUE_LENGTH), "head_dim")
_WINDOWS = _HEAD_SIZES | {Keys.Attention.SLIDING_WINDOW: "sliding_window"}
_SOFT_CAPS = dict(zip((Keys.LLM.ATTN_LOGIT_SOFTCAPPING, Keys.LLM.FINAL_LOGIT_SOFTCAPPING), _CAPS, strict=True))
_ROTATED = {Keys.Rope.DIMENSION_COUNT: "head_dim"}
# What else an architecture's metadata hold.
_MORE_FIELDS = {
    "llama": {Keys.LLM.VOCAB_SIZE: "vocab_size", **_ROTATED},
    "qwen3": _HEAD_SIZES,
    "smollm3": {Keys.LLM.VOCAB_SIZE: "vocab_size", **_ROTATED},
    "phi3": {**_ROTATED, Keys.Rope.SCALING_ORIG_CTX_LEN: "original_max_position_embeddings"},
    "starcoder2": {Keys.Attention.LAYERNORM_EPS: "norm_epsilon"},
    "gptneox": {
        Keys.Attention.LAYERNORM_EPS: "layer_norm_eps",
        Keys.LLM.USE_PARALLEL_RESIDUAL: "use_parallel_residual",
    },
    "gemma2": _WINDOWS | _SOFT_CAPS,
    "gemma3": _WINDOWS | {"{arch}.rope.freq_base_swa": "rope_local_base_freq"},
}


def metadata_of(architecture, config):
    """What a converter writes for this architecture, tokenizer included."""
    gemma = architecture.startswith("gemma")
    found = sentencepiece_metadata(prefix=False) if gemma else byte_level_metadata("qwen2")
    fields = _FIELDS | _MORE_FIELDS.get(architecture, {})
    found |= {key: config[name] for key, name in fields.items() if name in config}
    if architecture in ("gemma2", "gptneox"):
        del found[Keys.Rope.FREQ_BASE]
    if architecture == "gptneox":
        found[Keys.Rope.DIMENSION_COUNT] = 4
    if architecture == "gemma3":
        found |= {Keys.Rope.SCALING_TYPE: "linear", Keys.Rope.SCALING_FACTOR: 8.0}
    return {key.format(arch=architecture): value for key, value in found.items()}


def byte_level_metadata(pre):
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


def sentencepiece_metadata(prefix):
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


def pair_heads(tensor, heads):
    """The row order of GGUF: of every head the rows 0, H/2, 1, H/2 + 1, ..."""
    half = tensor.shape[0] // heads // 2
    order = [head * 2 * half + i + part * half for head in range(heads) for i in range(half) for part in (0, 1)]
    return tensor[order]


def fuse_heads(tensor, heads):
    """The row order of GGUF: q of all heads, then k, then v."""
    size = tensor.shape[0] // heads // 3
    order = [(head * 3 + part) * size + i for part in range(3) for head in range(heads) for i in range(size)]
    return tensor[order]


def write_architecture(file, architecture, config, tensors, kind=GGMLQuantizationType.F32, changes=None):
    """Matrices are stored as `kind`, vectors as float32; `changes` to the metadata by key, None takes one out."""
    writer = gguf.GGUFWriter(file, architecture)
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in (metadata_of(architecture, config) | (changes or {})).items():
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
    for name, stored in tensors.items():
        if architecture in ("llama", "smollm3") and (part := name.split(".")[-2]) in heads:
            stored = pair_heads(stored, heads[part])
        if ".query_key_value." in name:
            stored = fuse_heads(stored, config["num_attention_heads"])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            stored = stored + 1
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        if stored.ndim == 2:
            writer.add_tensor(gguf_name, gguf.quants.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, stored.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_gguf(file, config, tensors, kind=GGMLQuantizationType.F32, pre="smollm"):
    """A file of the architecture llama, with the tokenizer of `VOCAB` and a chat template."""
    template = "{% for m in messages %}<|start|>{{ m['content'] }}<|stop|>{% endfor %}"
    whole = {"head_dim": config["hidden_size"] // config["num_attention_heads"]} | config
    # Without a size of heads, which the file then has by its other sizes.
    changes = {Keys.Tokenizer.PRE: pre, Keys.Tokenizer.CHAT_TEMPLATE: template, "llama.rope.dimension_count": None}
    return write_architecture(file, "llama", whole, tensors, kind, changes)
