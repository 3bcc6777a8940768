"""A model's configuration, tensors and tokenizer as GGUF metadata: what is written reads as what it was."""

import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType
from transformers import AutoConfig

from sparseopt.models import ModelError, load_tokenizer, open_source
from sparseopt.models.files.gguf.architectures import ARCHITECTURES, architecture_of
from sparseopt.models.files.gguf.header import Value, count, text
from sparseopt.models.files.gguf.shared import ROPE_FACTORS
from sparseopt.models.files.gguf.writer import metadata_of, rounded, write_gguf
from sparseopt.models.files.source import FolderSource
from tests.fuzz.damage import refused
from tests.models.tiny import (
    CONFIGS,
    byte_level_metadata,
    random_tensors,
    sentencepiece_metadata,
    write_architecture,
    write_folder,
)


def write(file, config, tensors, values):
    """A GGUF file with these metadata, in float32."""
    _, architecture = architecture_of(config)
    stored = {architecture.gguf_name(key): architecture.redo(key, tensor, config) for key, tensor in tensors.items()}
    if (factors := architecture.rope_factors(config)) is not None:
        stored[ROPE_FACTORS] = factors
    encoded = {key: rounded(lambda array=array: [array], Kind.F32, array.shape) for key, array in stored.items()}
    write_gguf(file, values, encoded)
    return file


def written(file, config, tensors):
    """The source of a file with the metadata of a configuration alone."""
    name, architecture = architecture_of(config)
    values = {f"{name}.{key}": value for key, value in architecture.write_config(config).items()}
    return open_source(write(file, config, tensors, {"general.architecture": text(name)} | values))


THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | THETA
YARN_FACTORS = YARN | {"attention_factor": 1.25, "beta_fast": 24.0, "beta_slow": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000000.0}
HALF = {"rope_type": "default", "partial_rotary_factor": 0.5} | THETA
SLIDES, FULL = "sliding_attention", "full_attention"
FEWER = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
LARGEST = {"num_hidden_layers": 46, "query_pre_attn_scalar": 8, "layer_types": [SLIDES, FULL] * 23}
CHANGED = {
    **{name: (name, {}) for name in CONFIGS},
    "linear": ("qwen3", {"rope_parameters": LINEAR}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn with factors": ("llama", {"rope_parameters": YARN_FACTORS}),
    "llama3": ("llama", {"rope_theta": 500000.0, "rope_parameters": LLAMA3}),
    "llama3 with another factor": ("llama", {"rope_theta": 500000.0, "rope_parameters": LLAMA3 | {"factor": 10.0}}),
    "a window that llama.cpp ignores": ("phi3", {"sliding_window": 16}),
    **{f"fewer heads of {name}": (name, FEWER) for name in ("llama", "qwen3", "smollm3")},
    **{f"fewer heads of {name}": (name, FEWER | {"query_pre_attn_scalar": 8}) for name in ("gemma2", "gemma3")},
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "other sliding layers": ("gemma2", {"layer_types": [SLIDES] * 2 + [FULL]}),
    "all sliding": ("gemma3", {"layer_types": [SLIDES] * 7}),
    "the largest gemma2": ("gemma2", LARGEST),
    "partly rotated heads": ("phi3", {"rope_parameters": HALF}),
    "one after the other": ("gptneox", {"use_parallel_residual": False}),
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
TOKENIZERS = {
    **{pre: ("llama", byte_level_metadata(pre)) for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2", "smaug-bpe")},
    "begins with BOS": ("qwen2", byte_level_metadata("qwen2") | {"tokenizer.ggml.add_bos_token": True}),
    "ends with EOS": ("qwen2", byte_level_metadata("qwen2") | {"tokenizer.ggml.add_eos_token": True}),
    "sentencepiece": ("llama", sentencepiece_metadata(prefix=True)),
    "sentencepiece without a space": ("llama", sentencepiece_metadata(prefix=False)),
    "gemma": ("gemma3", sentencepiece_metadata(prefix=False)),
    "neox": ("gptneox", byte_level_metadata("gpt-2")),
}


def as_folder(folder, architecture, tokenizer, rng):
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
    for words in TEXTS:
        ids = before.encode(words).ids
        assert after.encode(words).ids == ids, words
        assert after.decode(ids) == before.decode(ids), words
    theirs, ours = source.sidecars(), back.sidecars()
    assert json.loads(ours["tokenizer_config.json"]) == json.loads(theirs["tokenizer_config.json"])
    assert json.loads(ours["tokenizer.json"])["added_tokens"] == json.loads(theirs["tokenizer.json"])["added_tokens"]


def gguf_source(file, rng, architecture="llama", **changes):
    config = CONFIGS[architecture]
    return open_source(write_architecture(file, architecture, config, random_tensors(config, rng), changes=changes))


def test_metadata_of_a_gguf_file_are_kept_with_their_types(tmp_path, rng):
    """Of all types; what says how this file was made is left out."""
    source = gguf_source(tmp_path / "m.gguf", rng)
    own = {
        "general.tags": Value(["a", "b"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "own.small": Value(-3, GGUFValueType.INT8),
        "own.large": Value(2**40, GGUFValueType.UINT64),
        "own.double": Value(0.1, GGUFValueType.FLOAT64),
        "own.bytes": Value([1, 2], GGUFValueType.ARRAY, GGUFValueType.UINT8),
        "own.flags": Value([True, False], GGUFValueType.ARRAY, GGUFValueType.BOOL),
        "llama.block_count": Value(3, GGUFValueType.UINT16),
    }
    left = {"general.file_type": count(7), "general.quantization_version": count(2), "split.count": count(1)}
    left |= {"quantize.imatrix.file": text("matrix")}
    tensors = {name: source.read(name) for name in source.tensors}
    typed = open_source(write(tmp_path / "typed.gguf", source.config, tensors, {**source.values, **own, **left}))
    assert typed.values.keys() >= left.keys()
    assert metadata_of(typed, typed.config) == {k: v for k, v in source.values.items() if k not in left} | own


def test_a_smaller_model_has_its_own_sizes(tmp_path, rng):
    """Fields that the dense model's file could leave out are written; lists with an entry for each block are not."""
    pattern = "gemma3.attention.sliding_window_pattern"
    lists = {"gemma3.attention.head_count_kv": [2] * 7, pattern: [True] * 5 + [False, True]}
    sizes = {"gemma3.attention.key_length": None, "gemma3.attention.value_length": None, "gemma3.embedding_length": 64}
    changes = {**lists, **sizes, "general.size_label": "1M", "general.license": "mit"}
    source = gguf_source(tmp_path / "m.gguf", rng, "gemma3", **changes)
    assert metadata_of(source, source.config) == source.values
    plain = source.config | {"layer_types": [SLIDES, FULL] * 3 + [SLIDES]}
    assert metadata_of(source, plain)[pattern] == count(2)
    smaller = source.config | {"num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1}
    smaller["layer_types"] = source.config["layer_types"][:6]
    values = metadata_of(source, smaller)
    assert "general.size_label" not in values
    assert values["general.license"].value == "mit"
    back = open_source(write(tmp_path / "s.gguf", smaller, random_tensors(smaller, rng), values))
    assert back.config == smaller
    # A key that the smaller model does not have.
    source = open_source(write(tmp_path / "p.gguf", plain, random_tensors(plain, rng), metadata_of(source, plain)))
    assert pattern not in metadata_of(source, plain | {"num_hidden_layers": 1, "layer_types": [SLIDES]})


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_a_configuration_leaves_out_is_what_transformers_fills_in(architecture):
    """A configuration with the least of fields gives the metadata of the whole one."""
    whole = CONFIGS[architecture]
    least = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {name: whole[name] for name in ("model_type", *least, "max_position_embeddings")}
    # Heads that divide, so that a size that is derived is an integer.
    given |= {"hidden_size": 64, "num_attention_heads": 8}
    filled = AutoConfig.for_model(**given).to_dict() | given
    # The number of KV heads has a default that only the sizes of the smallest released model agree with.
    if architecture not in ("smollm3",):
        filled["num_key_value_heads"] = 8
    filled["pad_token_id"] = 0
    values = ARCHITECTURES[architecture].write_config(given)
    assert values == ARCHITECTURES[architecture].write_config(filled)


# Each value is refused by the name of its field.
UNSUPPORTED = {
    "llama": {"hidden_act": "gelu", "partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 1]},
    "gemma2": {"query_pre_attn_scalar": 24},
    "olmo2": {"tie_word_embeddings": True},
    "starcoder2": {"use_bias": False},
}
REFUSED = [
    *((name, {k: value}, f"{k}={value!r}") for name, fields in UNSUPPORTED.items() for k, value in fields.items()),
    ("llama", {"model_type": "opt"}, "the model_type 'opt' has no name in GGUF here; known are llama, qwen2"),
    (
        "llama",
        {"model_type": "mistral", "max_position_embeddings": 8192},
        "given sliding_window=4096 with max_position",
    ),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "cannot be told from its factors"),
    ("qwen2", {"rope_parameters": LLAMA3}, "rope_type='llama3' cannot be written"),
    ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' cannot be"),
    ("qwen2", {"num_attention_heads": 2}, "given 2 times 8 with hidden_size=32; keep all heads"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping must be a positive float"),
    ("gemma3", {"layer_types": [FULL] * 7}, "are not full_attention in every n-th layer"),
]


@pytest.mark.parametrize(("architecture", "changes", "words"), REFUSED)
def test_a_configuration_without_a_name_in_gguf_is_refused(architecture, changes, words):
    config = CONFIGS[architecture] | changes

    def described():
        _, found = architecture_of(config)
        return found.write_config(config), found.rope_factors(config)

    refused(ModelError, words, described)


def test_mistral_is_written_as_llama_with_the_last_part_of_its_name(tmp_path, rng):
    mistral, tensors = CONFIGS["llama"] | {"model_type": "mistral"}, random_tensors(CONFIGS["llama"], rng)
    source = FolderSource(write_folder(tmp_path, mistral, tensors), "mistralai/Small-7B@main", "0" * 40)
    values = metadata_of(source, source.config)
    assert [values[f"general.{name}"].value for name in ("architecture", "name")] == ["llama", "Small-7B"]
    back = open_source(write(tmp_path / "m.gguf", mistral, tensors, values))
    assert (back.config["model_type"], back.config["num_hidden_layers"]) == ("llama", 3)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back.read(name), tensor)
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.q_norm.weight has no name in GGUF files of llama"):
        ARCHITECTURES["llama"].gguf_name("model.layers.0.self_attn.q_norm.weight")


BYTES, PIECES = byte_level_metadata("qwen2"), sentencepiece_metadata(prefix=True)
WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
CHANGES = [
    (BYTES, lambda file: file.update(model=WORDS), "the model WordLevel, GGUF has a name for BPE"),
    (BYTES, lambda file: file["model"].update(dropout=0.1), "a tokenizer with dropout=0.1"),
    (BYTES, lambda file: file.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer {'type': 'Whitespace'}"),
    (BYTES, lambda file: file.update(normalizer={"type": "Lowercase"}), "the normalizer {'type': 'Lowercase'}"),
    (BYTES, lambda file: file["model"].update(byte_fallback=True), "the step {"),
    (BYTES, lambda file: file["model"]["vocab"].update(extra=999), "the id 999 and an embedding of 320 rows"),
    # In scores, "hell" of "he" and "ll" cannot come before "hello" in one way and after it in another.
    (PIECES, lambda file: file["model"]["merges"].remove(["he", "ll"]), "do not follow from an order of its tokens"),
]


@pytest.mark.parametrize(("tokenizer", "change", "words"), CHANGES)
def test_a_tokenizer_without_a_name_in_gguf_is_refused(tmp_path, rng, tokenizer, change, words):
    source = as_folder(tmp_path / "model", "llama", tokenizer, rng)
    file = tmp_path / "model" / "tokenizer.json"
    stored = json.loads(file.read_text())
    change(stored)
    file.write_text(json.dumps(stored))
    refused(ModelError, words, metadata_of, source, source.config)


def test_special_tokens_template_and_older_files(tmp_path, rng):
    """The tokenizer names its tokens before the configuration does, and a template's own file comes first."""
    source = as_folder(tmp_path / "model", "llama", byte_level_metadata("qwen2"), rng)
    folder = tmp_path / "model"
    settings = {"eos_token": {"content": "<|end|>"}, "add_bos_token": True, "chat_template": "old"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("new")
    values = metadata_of(source, source.config | {"bos_token_id": [2, 1]})
    ids = [values[f"tokenizer.ggml.{name}_token_id"].value for name in ("bos", "eos", "padding")]
    assert ids == [2, 0, 0]
    assert values["tokenizer.ggml.add_bos_token"].value is True
    assert values["tokenizer.ggml.add_eos_token"].value is False
    assert values["tokenizer.chat_template"].value == "new"
    (folder / "tokenizer.json").unlink()
    assert not any(key.startswith("tokenizer.") for key in metadata_of(source, source.config))
    (folder / "tokenizer.model").write_bytes(b"")
    refused(ModelError, "has tokenizer.model and no tokenizer.json", metadata_of, source, source.config)
