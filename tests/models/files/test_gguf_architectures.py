"""GGUF architectures: each file reads as the Hugging Face model that it was written from, or is refused by name."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import MODEL_TENSOR, GGMLQuantizationType, Keys
from transformers import AutoConfig

from sparseopt.models import ModelError, open_model, open_source, unread
from sparseopt.models.files import safetensors
from sparseopt.models.files.gguf.architectures import ARCHITECTURES
from sparseopt.models.files.safetensors import write_tensors
from tests.jitted import run
from tests.models.tiny import write_folder
from tests.models.tiny_gguf import CONFIGS, tensors_of, write_architecture

Kind = GGMLQuantizationType
NUMBERS = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}


def source_with(tmp_path: Path, architecture: str, changes: dict[str, Any], **sizes: int) -> Any:
    """A file without tensors but the embedding, since only its metadata matter."""
    config = CONFIGS[architecture] | sizes
    tensors = {"model.embed_tokens.weight": np.zeros((config["vocab_size"], config["hidden_size"]), np.float32)}
    return open_source(write_architecture(tmp_path / "m.gguf", architecture, config, tensors, changes=changes))


def test_every_architecture_is_tested() -> None:
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Kind.F32, "float32"), (Kind.BF16, "bfloat16"), (Kind.Q8_0, "float32")],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_tensors_come_back(tmp_path: Path, rng: np.random.Generator, architecture: str, kind: Kind, dtype: str) -> None:
    config = CONFIGS[architecture]
    tensors = tensors_of(architecture, config, rng)
    source = open_source(write_architecture(tmp_path / "m.gguf", architecture, config, tensors, kind))
    assert set(source.tensors) == set(tensors)
    assert source.config["dtype"] == dtype
    for name, expected in tensors.items():
        got = source.read(name)
        assert got.shape == source.tensors[name].shape == expected.shape, name
        assert got.dtype == source.tensors[name].dtype, name
        if expected.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
            np.testing.assert_array_equal(got.astype(np.float32), expected, err_msg=name)
        else:
            # Gemma's norms have been through + 1 and - 1 in float32.
            np.testing.assert_allclose(got, expected, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_pieces_are_the_tensor(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, architecture: str, kind: Kind
) -> None:
    """Read and dequantised in many pieces or at once, also where rows change places; so is a copy."""
    config = CONFIGS[architecture]
    source = open_source(
        write_architecture(tmp_path / "m.gguf", architecture, config, tensors_of(architecture, config, rng), kind)
    )
    whole = {name: source.read(name) for name in source.tensors}
    write_tensors(tmp_path / "whole", unread(source, whole))
    monkeypatch.setattr(safetensors, "SLICE", 3 * 32 * 4)
    assert len(list(source.pieces("model.embed_tokens.weight"))) > 3
    for name, expected in whole.items():
        np.testing.assert_array_equal(np.concatenate(list(source.pieces(name))), expected, err_msg=name)
        np.testing.assert_array_equal(source.read(name), expected, err_msg=name)
        np.testing.assert_array_equal(unread(source, [name])[name].read(), expected, err_msg=name)
    write_tensors(tmp_path / "pieces", unread(source, whole))
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_tensor_of_the_format_has_a_name(architecture: str) -> None:
    """Of what the gguf package lists for the architecture; experts and stored rotary tables are not read."""
    unread = {MODEL_TENSOR.ROPE_FREQS, MODEL_TENSOR.ATTN_ROT_EMBD, MODEL_TENSOR.FFN_GATE_INP}
    unread |= {MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_DOWN_EXP, MODEL_TENSOR.FFN_UP_EXP}
    known = ARCHITECTURES[architecture]
    for tensor in set(gguf.MODEL_TENSORS[NUMBERS[architecture]]) - unread:
        name = gguf.TENSOR_NAMES[tensor].format(bid=2) + ".weight"
        assert known.hf_name(name).startswith(("model.", "lm_head.")), name
    assert known.hf_name("blk.2.ffn_gate_exps.weight") == "blk.2.ffn_gate_exps.weight"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_configuration_comes_back(tmp_path: Path, rng: np.random.Generator, architecture: str) -> None:
    config = CONFIGS[architecture]
    tensors = tensors_of(architecture, config, rng)
    made = open_source(write_architecture(tmp_path / "m.gguf", architecture, config, tensors)).config
    assert made == config
    # The reference's own configuration class takes every entry as it is.
    theirs = AutoConfig.for_model(**made)
    assert type(theirs).__name__.startswith(config["architectures"][0].removesuffix("ForCausalLM"))
    kept = {name: getattr(theirs, name) for name in made if name not in ("dtype", "rope_theta", "rope_local_base_freq")}
    assert kept == {name: made[name] for name in kept}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_file_runs_as_the_folder_it_was_written_from(
    tmp_path: Path, rng: np.random.Generator, architecture: str
) -> None:
    config = CONFIGS[architecture]
    tensors = tensors_of(architecture, config, rng)
    folder = open_model(write_folder(tmp_path / "folder", config, tensors))
    file = open_model(write_architecture(tmp_path / "m.gguf", architecture, config, tensors))
    assert file.config == folder.config
    # Beyond the window of 8 tokens that sliding blocks have.
    tokens = rng.integers(0, config["vocab_size"], (2, 20))
    expected = run(folder.decoder(), tokens)
    assert np.std(expected) > 0.01
    # Only Gemma's norms are not the same bytes.
    atol = 1e-5 if architecture.startswith("gemma") else 0
    np.testing.assert_allclose(run(file.decoder(), tokens), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_constants_that_no_file_holds_are_the_reference_s(tmp_path: Path, architecture: str) -> None:
    """Written without its optional values, a file gives what the reference's class has by default."""
    optional = (
        "{arch}.rope.freq_base_swa",
        Keys.Rope.SCALING_TYPE,
        Keys.Rope.SCALING_FACTOR,
        Keys.LLM.ATTN_LOGIT_SOFTCAPPING,
        Keys.LLM.FINAL_LOGIT_SOFTCAPPING,
    )
    made = source_with(tmp_path, architecture, {key.format(arch=architecture): None for key in optional}).config
    default = AutoConfig.for_model(made["model_type"], num_hidden_layers=made["num_hidden_layers"])
    names = ["attn_logit_softcapping", "final_logit_softcapping", "layer_types", "hidden_activation", "hidden_act"]
    for name in [*names, "use_sliding_window", "attention_bias"]:
        if name in made:
            assert made[name] == getattr(default, name), name
    if architecture == "gemma3":
        assert made["rope_parameters"] == default.rope_parameters
    if architecture == "gemma2":
        assert made["rope_parameters"]["rope_theta"] == default.default_theta


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_by_another_width(tmp_path: Path, architecture: str, layers: int) -> None:
    assert source_with(tmp_path, architecture, {}).config["query_pre_attn_scalar"] == 16
    big = source_with(tmp_path, architecture, {}, num_hidden_layers=layers)
    assert big.config["query_pre_attn_scalar"] == 32 // 4


@pytest.mark.parametrize("pattern", [3, [True, True, False] * 2 + [True]])
def test_a_file_may_say_which_layers_slide(tmp_path: Path, pattern: Any) -> None:
    source = source_with(tmp_path, "gemma3", {"gemma3.attention.sliding_window_pattern": pattern})
    expected = (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"]
    assert source.config["layer_types"] == expected


def test_biases_are_seen_in_the_tensors(tmp_path: Path, rng: np.random.Generator) -> None:
    config = CONFIGS["qwen3"]
    tensors = tensors_of("qwen3", config, rng)
    tensors |= {f"model.layers.{i}.self_attn.q_proj.bias": np.ones(64, np.float32) for i in range(3)}
    made = open_source(write_architecture(tmp_path / "m.gguf", "qwen3", config, tensors))
    assert made.config["attention_bias"]
    np.testing.assert_array_equal(made.read("model.layers.1.self_attn.q_proj.bias"), 1)


def test_yarn_becomes_rope_parameters(tmp_path: Path) -> None:
    changes = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    more = {"yarn_attn_factor": 1.1, "yarn_beta_fast": 24.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0}
    keys = {f"qwen2.rope.scaling.{name}": value for name, value in changes.items()}
    base = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    assert source_with(tmp_path, "qwen2", keys).config["rope_parameters"] == base
    keys |= {f"qwen2.rope.scaling.{name}": value for name, value in more.items()}
    made = source_with(tmp_path, "qwen2", keys).config["rope_parameters"]
    assert made == base | {"attention_factor": 1.1, "beta_fast": 24.0, "beta_slow": 2.0}


def test_a_factor_without_a_type_scales_linearly(tmp_path: Path) -> None:
    made = source_with(tmp_path, "qwen3", {"qwen3.rope.scaling.factor": 2.0}).config
    assert made["rope_parameters"] == {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("architecture", "changes", "text"),
    [
        (
            "qwen2",
            {"rope.scaling.type": "longrope"},
            "qwen2.rope.scaling.type = 'longrope', supported are none, linear",
        ),
        ("qwen2", {"rope.scaling.type": "linear"}, r"qwen2.rope.scaling.factor = None, expected one positive float"),
        ("qwen2", {"pooling_type": 3}, "not supported: qwen2.pooling_type"),
        ("qwen2", {"attention.sliding_window": 64}, "not supported: qwen2.attention.sliding_window"),
        (
            "qwen2",
            {"rope.dimension_sections": [1, 1, 1, 0], "scale": 1.0},
            "qwen2.rope.dimension_sections, qwen2.scale",
        ),
        ("qwen3", {"rope.dimension_count": 8}, "qwen3.rope.dimension_count = 8, 16 is the only value supported"),
        ("qwen3", {"attention.value_length": 8}, "qwen3.attention.value_length = 8, 16 is the only"),
        ("qwen3", {"attention.causal": False}, "qwen3.attention.causal = False, True is the only"),
        ("llama", {"expert_count": 8}, "llama.expert_count = 8, 0 is the only"),
        ("gemma2", {"attention.head_count_kv": [1, 2, 2]}, r"head_count_kv = \[1, 2, 2\], expected one positive int"),
        ("gemma2", {"attention.scale": 0.1}, "not supported: gemma2.attention.scale"),
        ("gemma3", {"attention.sliding_window": None}, "gemma3.attention.sliding_window = None, expected"),
        ("gemma3", {"attention.sliding_window_pattern": [True] * 3}, "expected a positive int or 7 booleans"),
        ("gemma3", {"attention.sliding_window_pattern": 0}, "expected a positive int or 7 booleans"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "not supported: gemma3.attn_logit_softcapping"),
        ("gemma3", {"rope.scaling.yarn_ext_factor": 0.5, "rope.scaling.type": "yarn"}, "yarn_ext_factor = 0.5, 1.0 is"),
        ("gemma3", {"block_count": None}, "gemma3.block_count = None, expected one positive int"),
    ],
)
def test_what_a_file_asks_for_beyond_that_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], text: str
) -> None:
    source = source_with(tmp_path, architecture, {f"{architecture}.{name}": value for name, value in changes.items()})
    with pytest.raises(ModelError, match=text):
        _ = source.config


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"one of 3 parts \(split.count\); join them"):
        source_with(tmp_path, "qwen2", {"split.count": 3})


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="306 tokens and an embedding of 96 rows"):
        source_with(tmp_path, "gemma2", {}, vocab_size=96).stored_tokenizer()
    assert source_with(tmp_path, "gemma2", {}).stored_tokenizer()[0].get_vocab_size() == 306
