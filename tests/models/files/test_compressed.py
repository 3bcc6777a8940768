"""Few bits in the format of compressed-tensors: exact round trips, folders that read as dense ones, what is refused.

`tests.oracle.test_compressed` has the package itself read such folders.
"""

import json

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
from tests.fuzz.damage import refused
from tests.jitted import run
from tests.models.tiny import copy_model, random_tensors, tiny_config, write_folder

# All linears of the tiny model.
PARTS = [*(f"self_attn.{letter}_proj" for letter in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
LINEARS = [f"model.layers.{index}.{name}" for index in range(3) for name in PARTS]
DENSE = "model.layers.1.mlp.down_proj"
UP = "model.layers.1.mlp.up_proj.weight"


def on_grid(rng, shape, bits):
    """A weight on a grid, a third of it zeros, with a group of zeros only."""
    sizes = np.exp2(rng.normal(-2, 1, (shape[0], shape[1] // (bits.group or shape[1]))))
    scales = (sizes / bits.high).astype(np.float16)
    scales[0, 0] = 0
    multiples = rng.integers(bits.low, bits.high, (*scales.shape, bits.group or shape[1]), endpoint=True)
    multiples[rng.random(multiples.shape) < 1 / 3] = 0
    multiples[0, 0] = 0
    return (scales.astype(np.float32)[..., None] * multiples.astype(np.float32)).reshape(shape)


def read_back(file, stored, bits=None):
    write_tensors(file, stored)
    return join_parts(file, read_header(file), bits)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    grid=st.sampled_from(["int8", "int4:1", "int4:3", "int4:10", "int4:32"]),
    outputs=st.integers(1, 7),
    groups=st.integers(1, 9),
    rows=st.integers(1, 8),
)
def test_every_weight_comes_back_whole_and_in_pieces(tmp_path_factory, seed, grid, outputs, groups, rows):
    bits, norm = parse_bits(grid), np.ones(3, ml_dtypes.bfloat16)
    inputs = (bits.group or 1) * groups
    inputs *= -(-5 // inputs)  # at least 5
    weight = on_grid(np.random.default_rng(seed), (outputs, inputs), bits)
    stored = compress_tensors({"a.weight": weight, "norm.weight": norm}, {"a.weight": bits})
    per_word = 4 if grid == "int8" else 8
    assert {name: (value.dtype, value.shape) for name, value in stored.items()} == {
        "a.weight_packed": (np.int32, (outputs, -(-inputs // per_word))),
        "a.weight_scale": (np.float32, (outputs, inputs // (bits.group or inputs))),
        "a.weight_shape": (np.int64, (2,)),
        "norm.weight": (norm.dtype, (3,)),
    }
    found = read_back(tmp_path_factory.mktemp("any") / "a", stored, bits)
    tensor = found["a.weight"]
    assert isinstance(tensor, CompressedTensor)
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == (weight.shape, np.float32, weight.nbytes)
    assert tensor.read().tobytes() == weight.tobytes()
    assert found["norm.weight"].read().tobytes() == norm.tobytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "SLICE", rows * 4 * inputs)
        pieces = list(tensor.pieces())
    assert {len(piece) for piece in pieces[:-1]} <= {rows}
    np.testing.assert_array_equal(np.concatenate(pieces), weight)


def test_words_are_those_of_the_format_and_zeros_have_one_sign(tmp_path):
    """Multiples are offset by 8 or 128, the first input in the lowest bits, and what is left of a row is zero bits."""
    for values, grid, scale, words in (
        # -8 is the largest, of which the scale is 1.
        ([-8, -7, -1, 0, 1, 7, 3, 5, 2], "int4:9", 1.0, [0xDBF98710, 0xA]),
        ([8, -7, 0, 0, 0, 0, 0, 0], "int4:8", -1.0, [0x888888F0]),
        ([-127, -1, 0, 1, 126], "int8", 1.0, [0x81807F01, 0xFE]),
    ):
        weight = np.array([values], np.float32)
        stored = compress_tensors({"a.weight": weight}, {"a.weight": parse_bits(grid)})
        assert stored["a.weight_scale"].tolist() == [[scale]]
        assert stored["a.weight_packed"].view(np.uint32).tolist() == [words]
        assert stored["a.weight_shape"].tolist() == [1, len(values)]
        # No zero is negative, as in a dense copy.
        assert read_back(tmp_path / "a", stored)["a.weight"].read().tobytes() == weight.tobytes()


def test_scales_of_other_writers_are_read_without_rounding_and_a_weight_may_have_no_outputs(tmp_path):
    packed, values = np.array([[0x76543210], [-1]], np.int32), np.array([np.arange(-8, 0), [7] * 8], np.float32)
    for dtype, outputs in ((np.float16, 2), (ml_dtypes.bfloat16, 2), (np.float32, 0)):
        scale = np.array([[0.01], [3.0]], dtype)[:outputs]
        stored = {
            "a.weight_packed": packed[:outputs],
            "a.weight_scale": scale,
            "a.weight_shape": np.array([outputs, 8]),
        }
        found = read_back(tmp_path / "a", stored)["a.weight"].read()
        np.testing.assert_array_equal(found, scale.astype(np.float32) * values[:outputs])


@pytest.mark.parametrize(
    ("name", "weight", "bits", "text"),
    [
        ("a.weight", np.full((2, 8), 0.1, np.float32) * np.arange(8), "int8", "a.weight: .* no grid of 'int8'"),
        ("a.weight", np.zeros((2, 20), np.float32), "int4:8", "a.weight: .* do not tile 20"),
        ("a.weight", np.zeros((2, 4), np.float32), "int8", r"a.weight \[2, 4\].* at least 5 inputs"),
        ("a.weight", np.zeros((2, 8, 8), np.float32), "int8", "needs two axes"),
        ("a.weight", np.zeros((2, 32), np.float32), "q5_0", "have 5 bits, .* 4 or 8"),
        ("experts", np.zeros((2, 8), np.float32), "int8", r"experts .* must end in \.weight"),
        ("a.weight_scale", np.zeros((2, 8), np.float32), "int8", r"called a\.weight_scale cannot be stored"),
    ],
)
def test_what_is_not_written(name, weight, bits, text):
    with pytest.raises(ValueError, match=text):
        compress_tensors({name: weight}, {name: parse_bits(bits)})


def test_the_configuration_says_the_grid_and_which_linears_have_none():
    linears = ["a", "lm_head", "b", "c"]
    for name, strategy, read in (
        ("int4:32", ("group", 32), Bits("int4:32", -8, 7, 32)),
        ("int8", ("channel", None), Bits("int8", -128, 127, None)),
    ):
        config = quantization_config({f"{linear}.weight": parse_bits(name) for linear in "ab"}, linears)
        assert config == json.loads(json.dumps(config))
        assert config["ignore"] == ["lm_head", "c"]
        weights = config["config_groups"]["group_0"]["weights"]
        assert (weights["num_bits"], (weights["strategy"], weights["group_size"])) == (int(name[3]), strategy)
        assert read_quantization({"quantization_config": config}) == read
    for grids, text in [
        ({}, "given none"),
        ({"a.weight": BITS["int4"], "b.weight": BITS["int8"]}, "one grid for all layers, given int4, int8"),
        ({"a.weight": BITS["int8"], "embed.weight": BITS["int8"]}, "embed.weight is the weight of no linear module"),
        ({"a.weight": BITS["q5_0"]}, "'q5_0' have 5 bits"),
    ]:
        refused(ValueError, text, quantization_config, grids, linears)


# Parts of a tensor on the grid int4:32, which is [64, 32], of which None takes one out; and what is told.
WORDS = np.zeros((64, 4), np.int32)
MISFITS = [
    ("_packed", None, "missing: a.weight_packed"),
    ("", np.zeros((64, 32), np.float32), "a.weight is stored dense and in few bits"),
    ("_packed", WORDS.astype(np.int64), "a.weight_packed is int64 [64, 4], expected int32"),
    ("_packed", WORDS.reshape(-1), "a.weight_packed is int32 [256], expected int32 with two"),
    ("_packed", WORDS[:, 1:], "a.weight_packed is [64, 3], the shape [64, 32] needs [64, 4] for 4 bits or [64, 8]"),
    ("_packed", WORDS[1:], "a.weight_packed is [63, 4], the shape [64, 32]"),
    ("_packed", np.zeros((64, 8), np.int32), "a.weight has 8 bits and a scale for each 32 of 32 inputs"),
    ("_scale", np.ones((64, 1), np.int32), "a.weight_scale is int32 [64, 1]"),
    ("_scale", np.ones((64, 1)), "a.weight_scale is float64 [64, 1]"),
    ("_scale", np.ones(64, np.float32), "a.weight_scale is float32 [64]"),
    *(
        ("_scale", np.ones(shape, np.float32), f"a.weight_scale is {list(shape)}, which does not divide")
        for shape in ((64, 3), (64, 0), (1, 1))
    ),
    ("_scale", np.ones((64, 2), np.float32), "a.weight has 4 bits and a scale for each 16 of 32 inputs"),
    ("_shape", np.array([64, 32], np.int32), "a.weight_shape is int32 [2]"),
    ("_shape", np.array([64, 32, 1]), "a.weight_shape is int64 [3]"),
    *(
        ("_shape", np.array(shape), f"a.weight_shape holds {shape}")
        for shape in ([-64, 32], [64, -32], [64, 0], [64, 4], [2**62, 2**62], [0, 2**62])
    ),
    ("_shape", np.array([64, 2**40]), "a.weight_packed is [64, 4], the shape"),
]


@pytest.mark.parametrize(("part", "array", "text"), MISFITS)
def test_a_part_that_does_not_fit_is_named(tmp_path, part, array, text):
    stored = {"a.weight_packed": WORDS, "a.weight_scale": np.ones((64, 1), np.float32)}
    changed = {**stored, "a.weight_shape": np.array([64, 32]), f"a.weight{part}": array}
    with pytest.raises(ModelError) as caught:
        read_back(tmp_path / "a", {key: value for key, value in changed.items() if value is not None}, BITS["int4"])
    assert str(tmp_path / "a") in str(caught.value)
    assert text in str(caught.value)


def write_compressed(folder, rng, name="int4:32", shards=1, changes=None, config=None):
    """A tiny model in few bits but for one linear and the head; returns its dense tensors.

    `changes` to the stored tensors, of which None takes one out; `config` replaces the quantization_config.
    """
    fields, bits = tiny_config(tie_word_embeddings=False), parse_bits(name)
    tensors = random_tensors(fields, rng)
    grids = {f"{linear}.weight": bits for linear in LINEARS if linear != DENSE}
    tensors |= {key: on_grid(rng, tensors[key].shape, bits) for key in grids}
    stored = {**compress_tensors(tensors, grids), **(changes or {})}
    said = quantization_config(grids, [*LINEARS, "lm_head"]) if config is None else config
    present = {key: value for key, value in stored.items() if value is not None}
    write_folder(folder, fields | {"quantization_config": said}, present, shards)
    return tensors


@pytest.mark.parametrize(("name", "shards"), [("int8", 1), ("int4:16", 3)])
def test_a_folder_reads_as_the_dense_one_and_its_copy_is_one(tmp_path, rng, name, shards):
    """Also where the parts of a tensor lie in different shards, as transformers may put them."""
    tensors = write_compressed(tmp_path / "few", rng, name, shards)
    write_folder(tmp_path / "dense", tiny_config(tie_word_embeddings=False), tensors)
    copy_model(open_model(tmp_path / "few"), tmp_path / "copy")
    few, dense, copied = (open_source(tmp_path / each) for each in ("few", "dense", "copy"))
    assert few.config == dense.config
    assert copied.config == dense.config == json.loads((tmp_path / "copy" / "config.json").read_text())
    for key, tensor in few.tensors.items():
        assert (tensor.shape, tensor.dtype) == (dense.tensors[key].shape, dense.tensors[key].dtype)
        assert isinstance(tensor, CompressedTensor) == ("proj" in key and DENSE not in key), key
        assert few.read(key).tobytes() == copied.read(key).tobytes() == tensors[key].tobytes()
        np.testing.assert_array_equal(np.concatenate(list(few.pieces(key))), tensors[key])
    assert set(few.tensors) == set(copied.tensors) == set(tensors)
    open_model(tmp_path / "few").check_finite()
    tokens = rng.integers(0, 40, (2, 20)).astype(np.int32)
    logits = [np.asarray(run(load_decoder(tmp_path / folder), tokens)) for folder in ("few", "dense")]
    np.testing.assert_array_equal(*logits)


def test_all_that_is_wrong_with_a_folder_comes_in_one_error_and_no_part_is_left_unread(tmp_path, rng):
    other = "model.layers.0.mlp.up_proj.weight"
    changes = {UP + "_packed": None, "x.weight_shape": np.array([2, 8]), other + "_packed": WORDS[1:]}
    write_compressed(tmp_path / "many", rng, changes=changes | {other + "_scale": np.ones((63, 1), np.float32)})
    with pytest.raises(ModelError, match=r"is corrupt \(4 problems\)") as caught:
        open_source(tmp_path / "many")
    for text in (f"\n  missing: {UP}_packed", "\n  missing: x.weight_packed, x.weight_scale"):
        assert text in str(caught.value)
    # Zero points and an order of the inputs would change the weights.
    for part in ("_zero_point", "_g_idx"):
        write_compressed(tmp_path / part, rng, changes={UP + part: np.zeros(32, np.int32)})
        refused(ModelError, f"extra: {UP}{part}", open_model, tmp_path / part)


# As llm-compressor writes it.
WEIGHTS = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4}
WEIGHTS |= {"observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"}
GROUP = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": WEIGHTS}
OTHERS = {
    "config_groups": {"group_0": GROUP},
    "format": "pack-quantized",
    "global_compression_ratio": 1.89,
    "ignore": ["lm_head", DENSE],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "frozen",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.14.0",
}
# Values with which the folder is not of this form: of its fields, of those of its group, and of those of its weights.
LEFT = {
    "whole": {
        "quant_method": ("gptq",),
        "format": ("int-quantized",),
        "quantization_status": ("initialized",),
        "kv_cache_scheme": ({"num_bits": 8},),
        "sparsity_config": ({"format": "sparse-bitmask"},),
        "transform_config": ({"config_groups": {}},),
        "config_groups": ({}, {"a": GROUP, "b": GROUP}, {"W4A16": ["Linear"]}),
    },
    "group": {
        "format": ("marlin-24",),
        "input_activations": ({"num_bits": 8},),
        "output_activations": ({"num_bits": 8},),
        "weights": (None,),
    },
    "weights": {
        "num_bits": (3, 5, 2, 16, True, "4", None),
        "type": ("float", None),
        "symmetric": (False, None),
        "strategy": ("tensor", "block", "token", None),
        "group_size": (None, 0, -1, 32.0, "32", True),
        "dynamic": (True, "local"),
        "actorder": ("group", True),
        "block_structure": ([1, 32],),
    },
}


def test_a_configuration_of_another_tool_is_read_and_any_other_quantization_is_refused(tmp_path, rng):
    tensors = write_compressed(tmp_path / "good", rng, config=OTHERS)
    np.testing.assert_array_equal(open_model(tmp_path / "good").source.read(UP), tensors[UP])
    changes = [(level, name, v) for level, fields in LEFT.items() for name, values in fields.items() for v in values]
    for level, name, value in changes:
        whole, group, weights = ({name: value} if level == each else {} for each in LEFT)
        config = OTHERS | {"config_groups": {"group_0": GROUP | {"weights": WEIGHTS | weights} | group}} | whole
        assert read_quantization({"quantization_config": config}) is None, (name, value)
    write_folder(tmp_path / "bad", tiny_config(quantization_config=config), random_tensors(tiny_config(), rng))
    assert open_source(tmp_path / "bad").config["quantization_config"] == config
    refused(ModelError, r"quantization_config=.* \(supported: None\)", open_model, tmp_path / "bad")
