"""Reading: folders and shards, and all kinds of damage."""

import json
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparseopt.core.base.mesh import allocate, on_device
from sparseopt.models import ModelError, ShardedWriter, open_model, open_source
from sparseopt.models.files import safetensors
from sparseopt.models.files.safetensors import read_header, write_tensors
from tests.models.tiny import random_tensors, tiny_config, write_folder


@pytest.fixture
def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return random_tensors(tiny_config(), rng)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_reads_back_whole_or_in_shards(tmp_path: Path, tensors: dict, shards: int) -> None:
    source = open_source(write_folder(tmp_path, tiny_config(), tensors, shards))
    assert set(source.tensors) == set(tensors)
    for name, expected in tensors.items():
        assert source.tensors[name].shape == expected.shape
        np.testing.assert_array_equal(source.read(name), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_stored_dtypes_stay_and_parts_are_float32(tmp_path: Path, rng: np.random.Generator, dtype: type) -> None:
    tensors = random_tensors(tiny_config(), rng, dtype)
    write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    model = open_model(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    assert model.source.read(name).dtype == dtype == model.source.tensors[name].dtype
    weight = model.block(1).mlp.up_proj.weight[...]
    assert weight.dtype == jnp.float32
    np.testing.assert_array_equal(weight, tensors[name].astype(np.float32))


def test_a_large_matrix_is_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX takes over what NumPy has read, piece by piece, and cast."""
    config = tiny_config(vocab_size=20_000)
    model = open_model(write_folder(tmp_path, config, random_tensors(config, np.random.default_rng(0), np.float16)))
    monkeypatch.setattr(safetensors, "SLICE", 2**16)
    tracemalloc.start()
    weight = model.embedding().weight[...]
    most, size = tracemalloc.get_traced_memory()[1], 4 * 20_000 * 32
    tracemalloc.stop()
    assert weight.nbytes == size <= most < 1.2 * size


def test_memory_that_begins_well_is_taken_over() -> None:
    values = allocate((3, 5))
    values[...] = 7
    assert on_device(values).unsafe_buffer_pointer() == values.ctypes.data
    assert allocate((0, 4), np.int8).shape == (0, 4)


def test_our_files_are_those_of_the_safetensors_package(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {
        "odd": rng.normal(size=(3, 5)).astype(np.float16),
        "wide": rng.normal(size=(2, 2)),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3, np.int32),
    }
    write_tensors(tmp_path / "ours", arrays)
    save_file(arrays, tmp_path / "theirs")
    for name, value in load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(value, arrays[name])
    for name, stored in read_header(tmp_path / "theirs").items():
        np.testing.assert_array_equal(stored.read(), arrays[name])


def test_missing_extra_misshapen_and_integer_keys_come_in_one_error(tmp_path: Path, tensors: dict) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((4, 32), np.float32)
    tensors["model.norm.weight"] = np.zeros(32, np.int8)
    with pytest.raises(ModelError) as caught:
        open_model(write_folder(tmp_path, tiny_config(), tensors))
    text = str(caught.value)
    assert "4 problems" in text
    assert "missing: model.layers.1.mlp.up_proj.weight [64, 32]" in text
    assert "extra: model.layers.3.mlp.up_proj.weight [2, 2]" in text
    assert "misshapen: model.layers.0.self_attn.k_proj.weight is [4, 32], expected [16, 32]" in text
    assert "not a float: model.norm.weight is int8" in text


def test_a_second_copy_of_a_tied_head_is_left_and_what_the_decoder_lacks_passes_through(
    tmp_path: Path, tensors: dict
) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    # A buffer of old files, which may hold anything.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.full(4, -np.inf, np.float32)
    tensors["vision_tower.position_ids"] = np.arange(3)
    model = open_model(write_folder(tmp_path, tiny_config(), tensors))
    np.testing.assert_array_equal(model.head().lm_head.weight[...], tensors["model.embed_tokens.weight"])
    assert set(model.outer_keys()) == {"model.embed_tokens.weight", "model.norm.weight", "vision_tower.position_ids"}
    model.check_finite()
    writer = ShardedWriter(tmp_path / "out", model.source, np.float16, keys=model.exported_keys())
    writer.write("all", {key: model.source.read(key) for key in model.exported_keys()})
    writer.finish()
    copied = open_model(tmp_path / "out").source
    assert copied.tensors["vision_tower.position_ids"].dtype == np.int64
    assert copied.read("vision_tower.position_ids").tolist() == [0, 1, 2]
    assert copied.tensors["model.norm.weight"].dtype == np.float16


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path, tensors: dict) -> None:
    """transformers would use the stored head."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    model = open_model(write_folder(tmp_path, tiny_config(), tensors))
    for use in (model.head, model.decoder, model.check_finite):
        with pytest.raises(ModelError, match=r"lm_head.weight and model.embed_tokens.weight, which differ, .* false"):
            use()


def test_of_many_problems_the_first_are_told(tmp_path: Path, tensors: dict) -> None:
    extra = {f"model.layers.{index}.mlp.up_proj.weight": np.zeros((2, 2), np.float32) for index in range(3, 30)}
    with pytest.raises(ModelError, match="27 problems") as caught:
        open_model(write_folder(tmp_path, tiny_config(), tensors | extra))
    assert str(caught.value).splitlines()[-1] == "  and 7 more"
    assert len(str(caught.value).splitlines()) == 22


@pytest.mark.parametrize("path", ["~nobody-of-this-name/model", "x" * 300])
def test_a_path_that_the_system_refuses_is_no_model(path: str) -> None:
    with pytest.raises(ModelError, match="no model at"):
        open_model(path)


def test_an_untied_head_must_be_there(tmp_path: Path, tensors: dict) -> None:
    with pytest.raises(ModelError, match=r"missing: lm_head.weight \[49, 32\]"):
        open_model(write_folder(tmp_path, tiny_config(tie_word_embeddings=False), tensors))


def test_more_blocks_than_tensors_are_refused_at_once(tmp_path: Path, tensors: dict) -> None:
    folder = write_folder(tmp_path, tiny_config(num_hidden_layers=2**40), tensors)
    with pytest.raises(ModelError, match="holds 29 tensors, its configuration asks for 1099511627776 blocks"):
        open_model(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_weight_is_named(tmp_path: Path, tensors: dict, bad: float) -> None:
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 4] = bad
    model = open_model(write_folder(tmp_path, tiny_config(), tensors))
    model.block(1)
    with pytest.raises(ModelError, match=r"model.layers.2.self_attn.o_proj.weight .* 1 NaN or infinite"):
        model.block(2)


def test_a_block_that_is_not_there(tmp_path: Path, tensors: dict) -> None:
    model = open_model(write_folder(tmp_path, tiny_config(), tensors))
    for index in (-1, 3):
        with pytest.raises(IndexError, match="blocks 0 to 2"):
            model.block(index)


def test_every_cut_of_a_safetensors_file_is_noticed(tmp_path: Path, rng: np.random.Generator) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"truncated|corrupt"):
            read_header(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(ModelError, match="too long"):
        read_header(file)


def stored(header: dict) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(16)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (stored({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}), "needs bytes 0 to 16"),
        (stored({"a": {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}}), "needs bytes 0 to 16"),
        (stored({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}), "corrupt"),
        (stored({"a": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}}), "stores F8_E4M3"),
        (stored({"a": {"dtype": "F32", "shape": [4]}}), "corrupt header"),
        (stored({"a": 3}), "corrupt header"),
        (stored([1, 2]), "corrupt header"),
        ((9000).to_bytes(8, "little") + b"[" * 9000, "corrupt header"),
        (b"\xff" * 64, "truncated or no safetensors file"),
        ((16).to_bytes(8, "little") + b"\xff" * 32, "corrupt header"),
    ],
)
def test_corrupt_safetensors(tmp_path: Path, content: bytes, text: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=text):
        read_header(file)


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist.*hf download"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(ModelError, match=r"is a file but no \.gguf"):
        open_source(tmp_path / "model.txt")
    with pytest.raises(ModelError, match=r"has no config\.json; it holds model\.txt"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no valid JSON"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no model\.safetensors.*it holds config\.json, model\.txt"):
        open_source(tmp_path)
    (tmp_path / "part.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"give the path of one \.gguf"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pickled weights.*save_pretrained"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", "..", ""])
def test_shards_stay_in_the_folder(tmp_path: Path, tensors: dict, name: str) -> None:
    write_folder(tmp_path, tiny_config(), tensors, 2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="outside the folder"):
        open_source(tmp_path)


def test_of_one_file_and_shards_the_one_file_is_read_as_transformers_does(tmp_path: Path, tensors: dict) -> None:
    write_folder(tmp_path, tiny_config(), {name: np.zeros_like(value) for name, value in tensors.items()}, 2)
    write_folder(tmp_path, tiny_config(), tensors)
    source = open_source(tmp_path)
    assert all(source.read(name).tobytes() == tensors[name].tobytes() for name in source.tensors)


def test_a_bad_index(tmp_path: Path, tensors: dict) -> None:
    write_folder(tmp_path, tiny_config(), tensors, 3)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"ghost": "model-00002-of-00003.safetensors"}}))
    with pytest.raises(ModelError, match="names 1 tensors that their shards lack, the first ghost in model-00002"):
        open_source(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks shards .* model-00003-of-00003\.safetensors"):
        open_source(tmp_path)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ModelError, match="no weight_map"):
        open_source(tmp_path)
