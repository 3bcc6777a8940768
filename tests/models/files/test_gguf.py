"""What a GGUF file says of its model beyond tensors: scalings, layers, constants; the rest is refused by name."""

import json
from copy import deepcopy
from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf import MODEL_TENSOR
from transformers import AutoConfig

from sparseopt.models import ModelError, open_model, open_source
from sparseopt.models.files.gguf.architectures import ARCHITECTURES
from sparseopt.models.files.gguf.header import read_header
from sparseopt.models.files.gguf.shared import llama3_scaling
from tests.fuzz.damage import refused
from tests.models.tiny import CONFIGS, random_tensors, tiny_config, write_architecture, write_gguf

NUMBERS = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}


def source_with(place, architecture, changes, **sizes):
    """A file with no tensor but the embedding, since only its metadata matter; keys without their first part."""
    config = CONFIGS[architecture] | sizes
    tensors = {"model.embed_tokens.weight": np.zeros((config["vocab_size"], config["hidden_size"]), np.float32)}
    keys = {f"{architecture}.{name}": value for name, value in changes.items()}
    return open_source(write_architecture(place / "m.gguf", architecture, config, tensors, changes=keys))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_tensor_of_the_format_has_a_name_and_the_reference_takes_every_field(architecture):
    """Of what the gguf package lists for the architecture, but experts, stored rotary tables and q, k, v of Phi-3."""
    unread = {MODEL_TENSOR.ROPE_FREQS, MODEL_TENSOR.ATTN_ROT_EMBD, MODEL_TENSOR.FFN_GATE_INP}
    unread |= {MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_DOWN_EXP, MODEL_TENSOR.FFN_UP_EXP}
    unread |= {MODEL_TENSOR.ROPE_FACTORS_LONG, MODEL_TENSOR.ROPE_FACTORS_SHORT}
    if architecture == "phi3":
        unread |= {MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V}
    known, config = ARCHITECTURES[architecture], CONFIGS[architecture]
    for tensor in set(gguf.MODEL_TENSORS[NUMBERS[architecture]]) - unread:
        name = gguf.TENSOR_NAMES[tensor].format(bid=2) + ".weight"
        assert known.hf_name(name).startswith(("model.", "lm_head.", "gpt_neox.", "embed_out.")), name
        assert known.gguf_name(known.hf_name(name)) == name
    assert known.hf_name("blk.2.ffn_gate_exps.weight") == "blk.2.ffn_gate_exps.weight"
    # transformers writes into the tables that it is given.
    theirs = AutoConfig.for_model(**deepcopy(config))
    assert type(theirs).__name__.startswith(config["architectures"][0].removesuffix("ForCausalLM"))
    older = ("dtype", "rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct")
    kept = {name: config[name] for name in config if name not in older}
    assert {name: getattr(theirs, name) for name in kept} == kept


def test_rows_of_other_arrays_and_dtypes_change_places_too():
    """As those of scales of few bits; `test_formats` has the rows of weights and biases."""
    llama, config, name = ARCHITECTURES["llama"], CONFIGS["llama"], "model.layers.0.self_attn.k_proj.weight"
    rows = np.arange(16, dtype=np.int8)
    assert llama.redo(name, rows, config).tolist()[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    scales = np.repeat(rows[:, None], 3, axis=1).astype(np.float16)
    np.testing.assert_array_equal(llama.redo(name, scales, config)[:, 1], llama.redo(name, rows, config))
    np.testing.assert_array_equal(llama.undo(name, llama.redo(name, scales, config), config), scales)
    for architecture, linear in (("llama", name), ("gptneox", "gpt_neox.layers.0.attention.query_key_value.bias")):
        with pytest.raises(ModelError, match=rf"{linear} \[23\] has no rows of"):
            ARCHITECTURES[architecture].undo(linear, np.ones(23), CONFIGS[architecture])


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_constants_that_no_file_holds_are_the_reference_s(tmp_path, architecture):
    """Written without its optional values, a file gives what the reference's class has by default."""
    optional = ("rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor")
    optional += ("attn_logit_softcapping", "final_logit_softcapping")
    made = source_with(tmp_path, architecture, dict.fromkeys(optional)).config
    default = AutoConfig.for_model(made["model_type"], num_hidden_layers=made["num_hidden_layers"])
    names = {"attn_logit_softcapping", "final_logit_softcapping", "layer_types", "hidden_activation", "hidden_act"}
    for name in (names | {"use_sliding_window", "attention_bias"}) & made.keys():
        assert made[name] == getattr(default, name), name
    if architecture == "gemma3":
        assert made["rope_parameters"] == default.rope_parameters
    if architecture == "gemma2":
        assert made["rope_parameters"]["rope_theta"] == default.default_theta


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
MORE_YARN = {"attn_factor": 1.1, "beta_fast": 24.0, "beta_slow": 2.0, "ext_factor": 1.0}
MORE_YARN = YARN | {f"rope.scaling.yarn_{name}": value for name, value in MORE_YARN.items()}
YARN_READ = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MORE_READ = YARN_READ | {"attention_factor": 1.1, "beta_fast": 24.0, "beta_slow": 2.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 2.0}
PATTERN = "attention.sliding_window_pattern"
SLIDING = (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"]
READ = {
    "yarn": ("qwen2", YARN, "rope_parameters", YARN_READ),
    "yarn with factors": ("qwen2", MORE_YARN, "rope_parameters", MORE_READ),
    "a factor without a type": ("qwen3", {"rope.scaling.factor": 2.0}, "rope_parameters", LINEAR),
    "which layers slide": ("gemma3", {PATTERN: 3}, "layer_types", SLIDING),
    "each layer that slides": ("gemma3", {PATTERN: [True, True, False] * 2 + [True]}, "layer_types", SLIDING),
    # The largest Gemma scales by another width.
    "a small gemma2": ("gemma2", {}, "query_pre_attn_scalar", 16),
    "the largest gemma2": ("gemma2", {"block_count": 46}, "query_pre_attn_scalar", 32 // 4),
    "a small gemma3": ("gemma3", {}, "query_pre_attn_scalar", 16),
    "the largest gemma3": ("gemma3", {"block_count": 62}, "query_pre_attn_scalar", 32 // 4),
}


@pytest.mark.parametrize(("architecture", "changes", "field", "expected"), READ.values(), ids=READ)
def test_metadata_become_fields(tmp_path, architecture, changes, field, expected):
    assert source_with(tmp_path, architecture, changes).config[field] == expected


# Each value is refused by the name of its key.
UNSUPPORTED = {
    "llama": {"expert_count": 8},
    "qwen2": {"rope.scaling.type": "longrope", "pooling_type": 3, "attention.sliding_window": 64, "scale": 1.0},
    "qwen3": {"rope.dimension_count": 8, "attention.value_length": 8, "attention.causal": False},
    "gemma2": {"attention.head_count_kv": [1, 2, 2], "attention.scale": 0.1},
    "gemma3": {"attention.sliding_window": None, "attn_logit_softcapping": 50.0, "block_count": None},
}
REFUSED = [
    *((name, {key: value}, f"{name}.{key}") for name, values in UNSUPPORTED.items() for key, value in values.items()),
    ("qwen2", {"rope.scaling.type": "linear"}, "qwen2.rope.scaling.factor = None, expected one positive float"),
    ("qwen2", {"rope.dimension_sections": [1, 1, 1, 0], "scale": 1.0}, "qwen2.rope.dimension_sections, qwen2.scale"),
    *(("gemma3", {PATTERN: wrong}, "expected a positive int or 7 booleans") for wrong in ([True] * 3, 0)),
    ("gemma3", YARN | {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5, 1.0 is"),
]


@pytest.mark.parametrize(("architecture", "changes", "text"), REFUSED)
def test_what_a_file_asks_for_beyond_that_is_refused(tmp_path, architecture, changes, text):
    source = source_with(tmp_path, architecture, changes)
    refused(ModelError, text, getattr, source, "config")


def test_a_part_of_a_split_model_more_tokens_than_rows_and_other_factors_are_refused(tmp_path):
    config, tensors = CONFIGS["qwen2"], {"model.norm.weight": np.ones(32, np.float32)}
    file = write_architecture(tmp_path / "part.gguf", "qwen2", config, tensors, changes={"split.count": 3})
    refused(ModelError, r"one of 3 parts \(split.count\); join them", open_source, file)
    with pytest.raises(ModelError, match="306 tokens and an embedding of 96 rows"):
        source_with(tmp_path, "gemma2", {}, vocab_size=96).stored_tokenizer()
    assert source_with(tmp_path, "gemma2", {}).stored_tokenizer()[0].get_vocab_size() == 306
    refused(ModelError, "not those of Llama 3", llama3_scaling, np.linspace(1, 8, 32), 500000.0, tmp_path)


def test_a_type_that_cannot_be_decoded_and_tensors_missing_are_named(tmp_path, tensors):
    del tensors["model.layers.2.mlp.down_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(32, np.float32)
    file = write_gguf(tmp_path / "m.gguf", tiny_config(), tensors)
    for missing in ("missing: model.layers.2.mlp.down_proj.weight", "missing: model.layers.1.self_attn.q_proj.bias"):
        refused(ModelError, missing, open_model, file)
    tensor = replace(read_header(file).tensors["output_norm.weight"], kind=gguf.GGMLQuantizationType.I64)
    refused(ModelError, "a tensor of type I64, which is not supported", tensor.read)


def test_sidecars_hold_ids_and_chat_template(tmp_path, rng):
    config = tiny_config()
    files = open_source(write_gguf(tmp_path / "m.gguf", config, random_tensors(config, rng))).sidecars()
    assert files.keys() >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    made = json.loads(files["tokenizer_config.json"])
    assert (made["bos_token"], made["eos_token"]) == ("<|start|>", "<|stop|>")
    assert "m['content']" in made["chat_template"]
