"""GGUF files: values, names, row order, configuration, and all kinds of damage."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from sparseopt.models import ModelError, load_decoder, open_model, open_source
from sparseopt.models.base.rope import Llama3, plain_frequencies
from sparseopt.models.files.gguf.architectures import llama3_scaling, unpair_heads
from sparseopt.models.files.gguf.header import read_header
from tests.jitted import run
from tests.models.tiny import pair_heads, random_tensors, tiny_config, write_folder, write_gguf

Kind = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.F32, "float32"),
        (Kind.F16, "float16"),
        (Kind.BF16, "bfloat16"),
        (Kind.Q8_0, "float32"),
        (Kind.Q4_1, "float32"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_tensors_come_back_under_their_names(tmp_path: Path, rng: np.random.Generator, kind: Kind, dtype: str) -> None:
    config = tiny_config()
    tensors = random_tensors(config, rng)
    source = open_source(write_gguf(tmp_path / "m.gguf", config, tensors, kind))
    assert set(source.tensors) == set(tensors)
    assert source.config["dtype"] == dtype
    for name, expected in tensors.items():
        got = source.read(name)
        assert got.shape == source.tensors[name].shape == expected.shape, name
        assert got.dtype == source.tensors[name].dtype, name
        if expected.ndim == 2:
            assert got.dtype.name == dtype, name
            # Rows are quantised on their own, so that their order does not change their values.
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
        np.testing.assert_array_equal(got.astype(np.float32), expected, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_model_of_its_folder(tmp_path: Path, rng: np.random.Generator, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    tensors = random_tensors(config, rng)
    folder = write_folder(tmp_path / "folder", config, tensors)
    file = write_gguf(tmp_path / "m.gguf", config, tensors)
    assert open_model(file).config == open_model(folder).config
    made = open_source(file).config
    assert {key: made[key] for key in config} == config
    tokens = rng.integers(0, 49, (2, 9))
    np.testing.assert_array_equal(*(run(load_decoder(path), tokens) for path in (file, folder)))


def test_row_order_is_undone(rng: np.random.Generator) -> None:
    for shape in [(12, 5), (12,)]:
        tensor = rng.normal(size=shape)
        paired = pair_heads(tensor, 3)
        assert not np.array_equal(paired, tensor)
        np.testing.assert_array_equal(unpair_heads(paired, 3), tensor)


def test_every_cut_of_a_file_is_noticed(tmp_path: Path, rng: np.random.Generator) -> None:
    config = tiny_config(num_hidden_layers=1)
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, rng))
    whole = file.read_bytes()
    # The file may end with padding after its last tensor; a cut in it loses nothing.
    end = max(tensor.start + tensor.nbytes for tensor in read_header(file).tensors.values())
    for length in [*range(200), *range(200, end, 997), end - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"truncated|no GGUF file"):
            open_source(file)


@pytest.mark.parametrize(
    ("start", "content", "text"),
    [
        (0, b"GGML", "does not begin with 'GGUF'"),
        (4, b"\x01", "version 1"),
        (4, b"\x00\x00\x00\x03", "version 50331648"),
        (8, b"\xff" * 7, "items claimed"),
        (16, b"\xff" * 7, "items claimed"),
        (24, b"\xff" * 7, "bytes wanted"),
        (32, b"\xff", "not UTF-8"),
        (52, b"\x63", "unknown metadata type 99"),
    ],
)
def test_corrupt_files(tmp_path: Path, rng: np.random.Generator, start: int, content: bytes, text: str) -> None:
    config = tiny_config(num_hidden_layers=1)
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, rng))
    raw = bytearray(file.read_bytes())
    assert raw[32:52] == b"general.architecture"
    raw[start : start + len(content)] = content
    file.write_bytes(raw)
    with pytest.raises(ModelError, match=text):
        open_source(file)


def test_random_damage_raises_model_errors_only(tmp_path: Path, rng: np.random.Generator) -> None:
    config = tiny_config(num_hidden_layers=1)
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, rng))
    whole = file.read_bytes()
    table_end = min(tensor.start for tensor in read_header(file).tensors.values())
    refused = 0
    for _ in range(300):
        raw = bytearray(whole)
        raw[int(rng.integers(table_end))] = int(rng.integers(256))
        file.write_bytes(raw)
        try:
            open_model(file)
        except ModelError:
            refused += 1
    assert refused > 30


def test_a_type_that_cannot_be_decoded(tmp_path: Path, rng: np.random.Generator) -> None:
    config = tiny_config(num_hidden_layers=1)
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, rng))
    tensor = replace(read_header(file).tensors["output_norm.weight"], kind=Kind.I64)
    with pytest.raises(ModelError, match="a tensor of type I64, which is not supported"):
        tensor.read()


def test_an_unknown_architecture_names_those_known(tmp_path: Path, rng: np.random.Generator) -> None:
    config = tiny_config()
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, rng), architecture="mamba")
    with pytest.raises(ModelError, match="unknown architecture 'mamba'; known are llama, qwen2, qwen3, gemma2, gemma3"):
        open_source(file)


def test_missing_and_extra_tensors_are_reported(tmp_path: Path, rng: np.random.Generator) -> None:
    config = tiny_config()
    tensors = random_tensors(config, rng)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(32, np.float32)
    with pytest.raises(ModelError) as caught:
        open_model(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert "missing: model.layers.2.mlp.down_proj.weight" in str(caught.value)
    assert "missing: model.layers.1.self_attn.q_proj.bias" in str(caught.value)


def test_llama3_factors_become_a_scaling(tmp_path: Path) -> None:
    factors = plain_frequencies(500000.0, 64) / Llama3(32.0, 1.0, 4.0, 8192).frequencies(500000.0, 64, time=1)
    made = llama3_scaling(factors, 500000.0, tmp_path)
    assert (made["rope_type"], made["factor"], made["original_max_position_embeddings"]) == ("llama3", 32.0, 8192)
    with pytest.raises(ModelError, match="not those of Llama 3"):
        llama3_scaling(np.linspace(1, 8, 32), 500000.0, tmp_path)


def test_sidecars_hold_ids_and_chat_template(tmp_path: Path, rng: np.random.Generator) -> None:
    config = tiny_config()
    files = open_source(write_gguf(tmp_path / "m.gguf", config, random_tensors(config, rng))).sidecars()
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    made = json.loads(files["tokenizer_config.json"])
    assert (made["bos_token"], made["eos_token"]) == ("<|start|>", "<|stop|>")
    assert "m['content']" in made["chat_template"]
