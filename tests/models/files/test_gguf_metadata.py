"""A model's configuration, tensors and tokenizer as GGUF metadata: what is written reads as what it was."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from sparseopt.models import load_tokenizer, open_source
from sparseopt.models.files.gguf.architectures import architecture_of
from sparseopt.models.files.gguf.header import Value, text
from sparseopt.models.files.gguf.metadata import metadata_of
from sparseopt.models.files.gguf.scaling import ROPE_FACTORS
from tests.models.tiny import (
    CONFIGS,
    byte_level_metadata,
    random_tensors,
    sentencepiece_metadata,
    write_architecture,
    write_folder,
)


def write(file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], values: dict[str, Value]) -> Path:
    """A GGUF file with these metadata, as a writer makes it."""
    name, architecture = architecture_of(config)
    writer = gguf.GGUFWriter(file, name)
    for key, (value, kind, item) in values.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, kind, sub_type=item)
    for key, tensor in tensors.items():
        writer.add_tensor(architecture.gguf_name(key), architecture.redo(key, tensor, config))
    if (factors := architecture.rope_factors(config)) is not None:
        writer.add_tensor(ROPE_FACTORS, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def written(file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    """The source of a file with the metadata of a configuration alone."""
    name, architecture = architecture_of(config)
    values = {f"{name}.{key}": value for key, value in architecture.write_config(config).items()}
    return open_source(write(file, config, tensors, {"general.architecture": text(name)} | values))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CONFIGS},
    "linear": ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000000.0}}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn with factors": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.25, "beta_fast": 24.0, "beta_slow": 2.0}},
    ),
    "llama3": ("llama", {"rope_theta": 500000.0, "rope_parameters": LLAMA3}),
    **{
        f"fewer heads of {name}": (name, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8} | own)
        for name, own in {
            "llama": {},
            "qwen3": {},
            "smollm3": {},
            "gemma2": {"query_pre_attn_scalar": 8},
            "gemma3": {"query_pre_attn_scalar": 8},
        }.items()
    },
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "other sliding layers": ("gemma2", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
    "all sliding": ("gemma3", {"layer_types": ["sliding_attention"] * 7}),
    "the largest gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 46,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 23,
        },
    ),
    "a cap": ("gemma3", {"final_logit_softcapping": 20.0}),
}


@pytest.mark.parametrize(("architecture", "changes"), CHANGED.values(), ids=CHANGED)
def test_a_configuration_and_its_tensors_come_back(tmp_path, rng, architecture, changes):
    config = CONFIGS[architecture] | changes
    tensors = random_tensors(config, rng)
    source = written(tmp_path / "m.gguf", config, tensors)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert source.config == {name: value for name, value in config.items() if name not in ids}
    assert set(source.tensors) == set(tensors)
    for name, tensor in tensors.items():
        # Gemma's norms have been through + 1 and - 1 in float32.
        atol = 2e-7 if architecture.startswith("gemma") and tensor.ndim == 1 else 0
        np.testing.assert_allclose(source.read(name), tensor, rtol=0, atol=atol, err_msg=name)


TEXTS = [
    "hello the lo hell",
    " hello  the\n\nhe  ll",
    "a1234 tell<b>x",
    "aaa été 日本<|stop|>he<eos>",
    "hehe aaaa   !",
    "",
]
TOKENIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{pre: ("llama", byte_level_metadata(pre)) for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2", "smaug-bpe")},
    "begins with BOS": ("qwen2", byte_level_metadata("qwen2") | {"tokenizer.ggml.add_bos_token": True}),
    "ends with EOS": ("qwen2", byte_level_metadata("qwen2") | {"tokenizer.ggml.add_eos_token": True}),
    "sentencepiece": ("llama", sentencepiece_metadata(prefix=True)),
    "sentencepiece without a space": ("llama", sentencepiece_metadata(prefix=False)),
    "gemma": ("gemma3", sentencepiece_metadata(prefix=False)),
}


def as_folder(folder: Path, architecture: str, tokenizer: dict[str, Any], rng: np.random.Generator) -> Any:
    """A Hugging Face folder with the tokenizer of these metadata, and more rows of the embedding than tokens."""
    config = CONFIGS[architecture]
    tensors = random_tensors(config, rng)
    model = {"tokenizer.chat_template": "{{ messages }}"} | tokenizer
    source = open_source(write_architecture(folder.with_suffix(".gguf"), architecture, config, tensors, changes=model))
    write_folder(folder, config, tensors)
    for name, raw in source.sidecars().items():
        (folder / name).write_bytes(raw)
    return open_source(folder)


@pytest.mark.parametrize(("architecture", "tokenizer"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_comes_back(tmp_path, rng, architecture, tokenizer):
    source = as_folder(tmp_path / "model", architecture, tokenizer, rng)
    values = metadata_of(source, source.config)
    assert values["general.name"].value == "model"
    assert len(values["tokenizer.ggml.tokens"].value) == source.config["vocab_size"]
    if "tokenizer.ggml.pre" in tokenizer:
        assert values["tokenizer.ggml.pre"].value == tokenizer["tokenizer.ggml.pre"]
    tensors = {name: source.read(name) for name in source.tensors}
    back = open_source(write(tmp_path / "back.gguf", source.config, tensors, values))
    assert back.config == source.config
    before, after = load_tokenizer(source), load_tokenizer(back)
    assert before.get_vocab() == after.get_vocab()
    for text_ in TEXTS:
        assert after.encode(text_).ids == before.encode(text_).ids, text_
        assert after.decode(after.encode(text_).ids) == before.decode(before.encode(text_).ids), text_
    theirs, ours = source.sidecars(), back.sidecars()
    assert json.loads(ours["tokenizer_config.json"]) == json.loads(theirs["tokenizer_config.json"])
    assert json.loads(ours["tokenizer.json"])["added_tokens"] == json.loads(theirs["tokenizer.json"])["added_tokens"]
