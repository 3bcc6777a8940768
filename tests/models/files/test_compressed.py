"""Few bits in the format of compressed-tensors: exact round trips, folders that read as dense ones, what is refused.

`tests.oracle.test_compressed` has the package itself read such folders.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseopt.layers.bits import BITS, Bits, parse_bits
from sparseopt.models import ModelError, load_decoder, open_model, open_source
from sparseopt.models.files import safetensors
from sparseopt.models.files.compressed import (
    CompressedTensor,
    compress_tensors,
    join_parts,
    quantization_config,
    read_quantization,
)
from sparseopt.models.files.safetensors import read_header, write_tensors
from tests.jitted import run
from tests.models.tiny import copy_model, random_tensors, tiny_config, write_folder

# Of the tiny model: all linears but one.
LINEARS = [
    f"model.layers.{index}.{name}"
    for index in range(3)
    for name in (
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]
DENSE = "model.layers.1.mlp.down_proj"


def on_grid(rng: np.random.Generator, shape: tuple[int, int], bits: Bits) -> np.ndarray:
    """A weight on a grid, a third of it zeros, with a group of zeros only."""
    sizes = np.exp2(rng.normal(-2, 1, (shape[0], shape[1] // (bits.group or shape[1]))))
    scales = (sizes / bits.high).astype(np.float16)
    scales[0, 0] = 0
    multiples = rng.integers(bits.low, bits.high, (*scales.shape, bits.group or shape[1]), endpoint=True)
    multiples[rng.random(multiples.shape) < 1 / 3] = 0
    multiples[0, 0] = 0
    return (scales.astype(np.float32)[..., None] * multiples.astype(np.float32)).reshape(shape)


def read_back(file: Path, stored: dict[str, np.ndarray]) -> dict[str, Any]:
    write_tensors(file, stored)
    return join_parts(file, read_header(file))


# Rows that fill their last word of 32 bits and rows that do not.
@pytest.mark.parametrize(
    ("name", "inputs"),
    [("int8", 20), ("int8", 7), ("int8", 64), ("int4:10", 20), ("int4:5", 5), ("int4:32", 96), ("int4", 256)],
)
def test_every_weight_comes_back(tmp_path, rng, monkeypatch, name, inputs):
    bits, norm = parse_bits(name), np.ones(3, ml_dtypes.bfloat16)
    weight = on_grid(rng, (6, inputs), bits)
    stored = compress_tensors({"a.weight": weight, "norm.weight": norm}, {"a.weight": bits})
    assert stored.keys() == {"a.weight_packed", "a.weight_scale", "a.weight_shape", "norm.weight"}
    per_word = 4 if name == "int8" else 8
    assert (stored["a.weight_packed"].dtype, stored["a.weight_packed"].shape) == (np.int32, (6, -(-inputs // per_word)))
    assert (stored["a.weight_scale"].dtype, stored["a.weight_scale"].shape[0]) == (np.float32, 6)
    assert stored["a.weight_shape"].dtype == np.int64
    found = read_back(tmp_path / "a", stored)
    tensor = found["a.weight"]
    assert isinstance(tensor, CompressedTensor)
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == (weight.shape, np.float32, weight.nbytes)
    assert tensor.read().tobytes() == weight.tobytes()
    assert found["norm.weight"].read().tobytes() == norm.tobytes()
    monkeypatch.setattr(safetensors, "SLICE", 2 * 4 * inputs)
    pieces = list(tensor.pieces())
    assert [len(piece) for piece in pieces] == [2, 2, 2]
    np.testing.assert_array_equal(np.concatenate(pieces), weight)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["int8", "int4:1", "int4:3"]), st.integers(2, 9))
def test_weights_of_any_width_come_back(tmp_path_factory, seed, name, thirds):
    bits = parse_bits(name)
    weight = on_grid(np.random.default_rng(seed), (2, 3 * thirds), bits)
    stored = compress_tensors({"a.weight": weight}, {"a.weight": bits})
    found = read_back(tmp_path_factory.mktemp("any") / "a", stored)
    assert found["a.weight"].read().tobytes() == weight.tobytes()


def test_words_are_those_of_the_format(tmp_path):
    """Multiples are offset by 8 or 128, the first input in the lowest bits, and what is left of a row is zero bits."""
    weight = np.array([[-8, -7, -1, 0, 1, 7, 3, 5, 2]], np.float32)
    stored = compress_tensors({"a.weight": weight}, {"a.weight": parse_bits("int4:9")})
    # -8 is the largest, of which the scale is 1.
    assert stored["a.weight_scale"].tolist() == [[1.0]]
    assert stored["a.weight_packed"].view(np.uint32).tolist() == [[0xDBF98710, 0xA]]
    weight = np.array([[-127, -1, 0, 1, 126]], np.float32)
    stored = compress_tensors({"a.weight": weight}, {"a.weight": BITS["int8"]})
    assert stored["a.weight_packed"].view(np.uint32).tolist() == [[0x81807F01, 0xFE]]
    assert stored["a.weight_shape"].tolist() == [1, 5]


def test_zeros_of_a_negative_scale_are_positive(tmp_path):
    """A dense copy of the model has zeros of one sign."""
    weight = np.array([[8, -7, 0, 0, 0, 0, 0, 0]], np.float32)
    stored = compress_tensors({"a.weight": weight}, {"a.weight": parse_bits("int4:8")})
    assert stored["a.weight_scale"].tolist() == [[-1.0]]
    assert read_back(tmp_path / "a", stored)["a.weight"].read().tobytes() == weight.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_scales_of_other_writers_are_read_without_rounding(tmp_path, dtype):
    scale = np.array([[0.01], [3.0]], dtype)
    stored = {
        "a.weight_packed": np.array([[0x76543210], [-1]], np.int32),
        "a.weight_scale": scale,
        "a.weight_shape": np.array([2, 8]),
    }
    expected = scale.astype(np.float32) * np.array([np.arange(-8, 0), [7] * 8], np.float32)
    np.testing.assert_array_equal(read_back(tmp_path / "a", stored)["a.weight"].read(), expected)


@pytest.mark.parametrize(
    ("weight", "bits", "text"),
    [
        (np.full((2, 8), 0.1, np.float32) * np.arange(8), "int8", "a.weight: .* groups lie on no grid of 'int8'"),
        (np.zeros((2, 20), np.float32), "int4:8", "a.weight: .* do not tile 20"),
        (np.zeros((2, 4), np.float32), "int8", r"a.weight \[2, 4\] cannot be stored in few bits: .* at least 5 inputs"),
        (np.zeros((2, 8, 8), np.float32), "int8", "needs two axes"),
        (np.zeros((2, 32), np.float32), "q5_0", "have 5 bits, compressed-tensors is written with 4 or 8"),
    ],
)
def test_what_is_not_written(weight, bits, text):
    with pytest.raises(ValueError, match=text):
        compress_tensors({"a.weight": weight}, {"a.weight": parse_bits(bits)})


def test_other_names_are_not_written():
    weight = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match=r"its name must end in \.weight"):
        compress_tensors({"experts": weight}, {"experts": BITS["int8"]})
    with pytest.raises(ModelError, match=r"a tensor called a\.weight_scale cannot be stored"):
        compress_tensors({"a.weight_scale": weight}, {})


def test_the_configuration_says_the_grid_and_which_linears_have_none():
    bits, linears = {f"{name}.weight": parse_bits("int4:32") for name in "ab"}, ["a", "lm_head", "b", "c"]
    config = quantization_config(bits, linears)
    assert config == json.loads(json.dumps(config))
    assert config["ignore"] == ["lm_head", "c"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 32)
    assert read_quantization({"quantization_config": config}) == Bits("int4:32", -8, 7, 32)
    config = quantization_config({"a.weight": BITS["int8"]}, linears)
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert read_quantization({"quantization_config": config}) == Bits("int8", -128, 127, None)
    for grids, text in [
        ({}, "given none"),
        ({"a.weight": BITS["int4"], "b.weight": BITS["int8"]}, "one grid for all layers, given int4, int8"),
        ({"a.weight": BITS["int8"], "embed.weight": BITS["int8"]}, "embed.weight is the weight of no linear module"),
        ({"a.weight": BITS["q5_0"]}, "'q5_0' have 5 bits"),
    ]:
        with pytest.raises(ValueError, match=text):
            quantization_config(grids, linears)


# Folders -------------------------------------------------------------------------------


def write_compressed(
    folder: Path,
    rng: np.random.Generator,
    name: str = "int4:32",
    shards: int = 1,
    changes: dict[str, np.ndarray | None] | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """A tiny model in few bits but for one linear and the head; returns its dense tensors.

    `changes` to the stored tensors, of which None takes one out; `config` replaces the quantization_config.
    """
    fields, bits = tiny_config(tie_word_embeddings=False), parse_bits(name)
    tensors = random_tensors(fields, rng)
    grids = {f"{linear}.weight": bits for linear in LINEARS if linear != DENSE}
    tensors |= {key: on_grid(rng, tensors[key].shape, bits) for key in grids}
    stored: dict[str, np.ndarray | None] = {**compress_tensors(tensors, grids), **(changes or {})}
    said = quantization_config(grids, [*LINEARS, "lm_head"]) if config is None else config
    present = {key: value for key, value in stored.items() if value is not None}
    write_folder(folder, fields | {"quantization_config": said}, present, shards)
    return tensors


@pytest.mark.parametrize(("name", "shards"), [("int8", 1), ("int4:16", 3)])
def test_a_folder_reads_as_the_dense_one(tmp_path, rng, name, shards):
    """Also where the parts of a tensor lie in different shards, as transformers may put them."""
    tensors = write_compressed(tmp_path / "few", rng, name, shards)
    write_folder(tmp_path / "dense", tiny_config(tie_word_embeddings=False), tensors)
    few, dense = open_source(tmp_path / "few"), open_source(tmp_path / "dense")
    assert few.config == dense.config
    assert {key: (info.shape, info.dtype) for key, info in few.tensors.items()} == {
        key: (info.shape, info.dtype) for key, info in dense.tensors.items()
    }
    for key, tensor in few.tensors.items():
        assert isinstance(tensor, CompressedTensor) == ("proj" in key and DENSE not in key), key
        assert few.read(key).tobytes() == dense.read(key).tobytes() == tensors[key].tobytes()
        np.testing.assert_array_equal(np.concatenate(list(few.pieces(key))), tensors[key])
    open_model(tmp_path / "few").check_finite()
    tokens = rng.integers(0, 40, (2, 20)).astype(np.int32)
    logits = [np.asarray(run(load_decoder(tmp_path / folder), tokens)) for folder in ("few", "dense")]
    np.testing.assert_array_equal(*logits)


def test_a_copy_is_a_dense_folder(tmp_path, rng):
    tensors = write_compressed(tmp_path / "few", rng)
    copy_model(open_model(tmp_path / "few"), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    copied = open_source(tmp_path / "out")
    assert all(copied.read(key).tobytes() == value.tobytes() for key, value in tensors.items())


UP = "model.layers.1.mlp.up_proj.weight"
GOOD = np.zeros((64, 4), np.int32)
# Changes to the tensors of a folder of int4:32, whose UP is [64, 32], and what is told.
REFUSED: dict[str, tuple[dict[str, np.ndarray | None], tuple[str, ...]]] = {
    "no words": ({UP + "_packed": None}, (f"missing: {UP}_packed",)),
    "no scales and no shape": ({UP + "_scale": None, UP + "_shape": None}, (f"missing: {UP}_scale, {UP}_shape",)),
    "parts of nothing": ({"x.weight_scale": np.ones((2, 1))}, ("missing: x.weight_packed, x.weight_shape",)),
    "dense too": ({UP: np.zeros((64, 32), np.float32)}, (f"{UP} is stored dense and in few bits",)),
    "other words": ({UP + "_packed": GOOD.astype(np.int64)}, (f"{UP}_packed is int64 [64, 4], expected int32",)),
    "folded words": ({UP + "_packed": GOOD.reshape(-1)}, (f"{UP}_packed is int32 [256], expected int32 with two",)),
    "words too few": (
        {UP + "_packed": GOOD[:, 1:]},
        (f"{UP}_packed is [64, 3], the shape [64, 32] needs [64, 4] for 4 bits or [64, 8] for 8 bits",),
    ),
    "rows too few": ({UP + "_packed": GOOD[1:]}, (f"{UP}_packed is [63, 4], the shape [64, 32] needs",)),
    "whole scales": ({UP + "_scale": np.ones((64, 1), np.int32)}, (f"{UP}_scale is int32 [64, 1], expected two axes",)),
    "wide scales": (
        {UP + "_scale": np.ones((64, 1))},
        (f"{UP}_scale is float64 [64, 1], expected two axes in one of",),
    ),
    "flat scales": ({UP + "_scale": np.ones(64, np.float32)}, (f"{UP}_scale is float32 [64], expected two axes",)),
    "scales that do not tile": (
        {UP + "_scale": np.ones((64, 3), np.float32)},
        (f"{UP}_scale is [64, 3], which does not divide the shape [64, 32]",),
    ),
    "no scale": ({UP + "_scale": np.ones((64, 0), np.float32)}, (f"{UP}_scale is [64, 0], which does not divide",)),
    "scales too few": ({UP + "_scale": np.ones((1, 1), np.float32)}, (f"{UP}_scale is [1, 1], which does not divide",)),
    "a shape of 32 bits": (
        {UP + "_shape": np.array([64, 32], np.int32)},
        (f"{UP}_shape is int32 [2], expected int64",),
    ),
    "a shape of three": ({UP + "_shape": np.array([64, 32, 1])}, (f"{UP}_shape is int64 [3], expected int64 [2]",)),
    **{
        f"the shape {shape}": ({UP + "_shape": np.array(shape)}, (f"{UP}_shape holds {shape}",))
        for shape in ([-64, 32], [64, -32], [64, 0], [64, 4], [2**62, 2**62], [0, 2**62])
    },
    "a longer shape": ({UP + "_shape": np.array([64, 2**40])}, (f"{UP}_packed is [64, 4], the shape",)),
    "another group": (
        {UP + "_scale": np.ones((64, 2), np.float32)},
        (f"{UP} has 4 bits and a scale for each 16 of 32 inputs, the configuration says int4:32",),
    ),
    "other bits": ({UP + "_packed": np.zeros((64, 8), np.int32)}, (f"{UP} has 8 bits and a scale for each 32 of 32",)),
    "many": (
        {
            UP + "_packed": None,
            "x.weight_shape": np.array([2, 8]),
            "model.layers.0.mlp.up_proj.weight_packed": GOOD[1:],
            "model.layers.0.mlp.up_proj.weight_scale": np.ones((63, 1), np.float32),
        },
        ("is corrupt (4 problems)", f"\n  missing: {UP}_packed", "\n  missing: x.weight_packed, x.weight_scale"),
    ),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_parts_that_do_not_fit_come_in_one_error(tmp_path, rng, changes, words):
    write_compressed(tmp_path, rng, changes=changes)
    with pytest.raises(ModelError) as caught:
        open_source(tmp_path)
    for text in (str(tmp_path), *words):
        assert text in str(caught.value)


def test_parts_that_nothing_reads_are_refused(tmp_path, rng):
    """Zero points and an order of the inputs would change the weights."""
    for part in ("_zero_point", "_g_idx"):
        write_compressed(tmp_path / part, rng, changes={UP + part: np.zeros(32, np.int32)})
        with pytest.raises(ModelError, match=f"extra: {UP}{part}"):
            open_model(tmp_path / part)


def test_a_file_of_any_size_is_looked_at_quickly(tmp_path):
    """Of no outputs, so that the file has no bytes of what its shape says."""
    stored = {
        "a.weight_packed": np.zeros((0, 2**28), np.int32),
        "a.weight_scale": np.zeros((0, 1), np.float32),
        "a.weight_shape": np.array([0, 2**31]),
    }
    with pytest.raises(ModelError, match="weight_shape holds"):
        read_back(tmp_path / "a", stored)
    found = read_back(
        tmp_path / "a", stored | {"a.weight_packed": np.zeros((0, 1), np.int32), "a.weight_shape": np.array([0, 8])}
    )
    assert found["a.weight"].read().shape == (0, 8)


GROUP = quantization_config({"a.weight": parse_bits("int4:32")}, ["a"])["config_groups"]["group_0"]
# Changes to a good quantization_config, to its group, and to the weights of it.
LEFT: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "another method": ({"quant_method": "gptq"}, {}, {}),
    "another format": ({"format": "int-quantized"}, {}, {}),
    "another format of the group": ({}, {"format": "marlin-24"}, {}),
    "not compressed": ({"quantization_status": "initialized"}, {}, {}),
    "a cache": ({"kv_cache_scheme": {"num_bits": 8}}, {}, {}),
    "sparse": ({"sparsity_config": {"format": "sparse-bitmask"}}, {}, {}),
    "transformed": ({"transform_config": {"config_groups": {}}}, {}, {}),
    "two groups": ({"config_groups": {"a": GROUP, "b": GROUP}}, {}, {}),
    "no group": ({"config_groups": {}}, {}, {}),
    "a group that is a list": ({"config_groups": {"W4A16": ["Linear"]}}, {}, {}),
    "activations": ({}, {"input_activations": {"num_bits": 8}}, {}),
    "outputs": ({}, {"output_activations": {"num_bits": 8}}, {}),
    "no weights": ({}, {"weights": None}, {}),
    **{
        f"{name} {value!r}": ({}, {}, {name: value})
        for name, values in {
            "num_bits": (3, 5, 2, 16, True, "4", None),
            "type": ("float", None),
            "symmetric": (False, None),
            "strategy": ("tensor", "block", "token", None),
            "group_size": (None, 0, -1, 32.0, "32", True),
            "dynamic": (True, "local"),
            "actorder": ("group", True),
            "block_structure": ([1, 32],),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize(("whole", "group", "weights"), LEFT.values(), ids=LEFT)
def test_any_other_quantization_is_refused_by_the_family(tmp_path, rng, whole, group, weights):
    good = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    changed = GROUP | {"weights": GROUP["weights"] | weights} | group
    config = good | {"config_groups": {"group_0": changed}} | whole
    write_folder(tmp_path, tiny_config(quantization_config=config), random_tensors(tiny_config(), rng))
    assert open_source(tmp_path).config["quantization_config"] == config
    with pytest.raises(ModelError, match=r"quantization_config=.* \(supported: None\)"):
        open_model(tmp_path)


# As llm-compressor writes it.
OTHERS = """{
    "config_groups": {
        "group_0": {
            "input_activations": null,
            "output_activations": null,
            "targets": ["Linear"],
            "weights": {
                "actorder": null,
                "block_structure": null,
                "dynamic": false,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": true,
                "type": "int"
            }
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": 1.89,
    "ignore": ["lm_head", "model.layers.1.mlp.down_proj"],
    "kv_cache_scheme": null,
    "quant_method": "compressed-tensors",
    "quantization_status": "frozen",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.14.0"
}"""


def test_a_configuration_of_another_tool_is_read(tmp_path, rng):
    tensors = write_compressed(tmp_path, rng, config=json.loads(OTHERS))
    np.testing.assert_array_equal(open_model(tmp_path).source.read(UP), tensors[UP])
