"""Every file format reads as the model that was written to it: tensors, pieces, configuration and copies."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from sparseopt.models import open_model, unread
from sparseopt.models.files import safetensors
from sparseopt.models.files.gguf.architectures import ARCHITECTURES
from sparseopt.models.files.safetensors import read_header, write_tensors
from tests.models.tiny import CONFIGS, copy_model, random_tensors, tiny_config, write_architecture, write_folder


class Written(NamedTuple):
    """A model as files, and what must be read from them."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    atol: float = 0.0  # of vectors: Gemma's norms have been through + 1 and - 1 in float32


Write = Callable[[Path, np.random.Generator], Written]


def as_folder(dtype, shards, place, rng):
    config = tiny_config(dtype=np.dtype(dtype).name)
    tensors = random_tensors(config, rng, dtype)
    if shards > 1:
        return Written(write_folder(place / "model", config, tensors, shards), config, tensors)
    folder = write_folder(place / "model", config, {})
    write_tensors(folder / "model.safetensors", tensors)
    return Written(folder, config, tensors)


def as_gguf(architecture, kind, place, rng, changes=None):
    config = CONFIGS[architecture] | (changes or {})
    tensors = random_tensors(config, rng)
    file = write_architecture(place / "m.gguf", architecture, config, tensors, kind)
    # Rows are quantised on their own, so that their order does not change their values.
    stored = {
        name: gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind) if value.ndim == 2 else value
        for name, value in tensors.items()
    }
    dtype = {Kind.F16: "float16", Kind.BF16: "bfloat16"}.get(kind, "float32")
    return Written(file, config | {"dtype": dtype}, stored, 2e-7 if architecture.startswith("gemma") else 0.0)


FORMATS = {
    "three shards": partial(as_folder, np.float32, 3),
    **{np.dtype(t).name: partial(as_folder, t, 1) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)},
    **{f"{name} F32": partial(as_gguf, name, Kind.F32) for name in CONFIGS},
    # Rows in pairs, q, k and v in one matrix, norms with 1 added.
    **{
        f"{name} {kind.name}": partial(as_gguf, name, kind)
        for name in ("llama", "gptneox", "gemma3")
        for kind in (Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1)
    },
    "llama with biases": partial(as_gguf, "llama", Kind.F32, changes={"attention_bias": True, "mlp_bias": True}),
    "qwen3 with biases": partial(as_gguf, "qwen3", Kind.F32, changes={"attention_bias": True}),
}


@pytest.fixture(scope="module", params=FORMATS)
def written(request, tmp_path_factory):
    return FORMATS[request.param](tmp_path_factory.mktemp("format"), np.random.default_rng(0))


def test_every_architecture_is_a_format():
    assert set(CONFIGS) == set(ARCHITECTURES)


def test_configuration_and_tensors_come_back_and_parts_are_float32(written, tmp_path):
    model = open_model(written.path)
    source, dtype = model.source, written.config["dtype"]
    assert source.config == written.config
    assert set(source.tensors) == set(written.tensors)
    for name, expected in written.tensors.items():
        found = source.read(name)
        assert found.shape == source.tensors[name].shape == expected.shape, name
        assert found.dtype == source.tensors[name].dtype, name
        assert expected.ndim == 1 or found.dtype.name == dtype, name
        atol = written.atol if expected.ndim == 1 else 0
        found, expected = (array.astype(np.float64) for array in (found, expected))
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=name)
    name = model.family.keys.to_key("layers.1.self_attn.o_proj.weight")
    weight = model.block(1).self_attn.o_proj.weight[...]
    assert weight.dtype == jnp.float32
    np.testing.assert_array_equal(weight, written.tensors[name].astype(np.float32))
    # The decoder is that of a folder of the tensors.
    folder = write_folder(tmp_path, written.config, {})
    write_tensors(folder / "model.safetensors", written.tensors)
    assert model.config == open_model(folder).config


def test_pieces_are_the_tensor_and_a_copy_is_the_same_to_the_byte(written, tmp_path, monkeypatch):
    """Read and dequantised in many pieces or at once, also where rows change places; with the tokenizer."""
    model = open_model(written.path)
    source = model.source
    whole = {name: source.read(name) for name in source.tensors}
    monkeypatch.setattr(safetensors, "SLICE", 3 * 32 * 4)
    embedding = next(name for name in whole if "embed" in name)
    assert len(list(source.pieces(embedding))) > 3
    for name, expected in whole.items():
        np.testing.assert_array_equal(np.concatenate(list(source.pieces(name))), expected, err_msg=name)
        np.testing.assert_array_equal(source.read(name), expected, err_msg=name)
    write_tensors(tmp_path / "pieces", unread(source, whole))
    stored = {name: tensor.read().tobytes() for name, tensor in read_header(tmp_path / "pieces").items()}
    assert stored == {name: value.tobytes() for name, value in whole.items()}
    copy_model(model, tmp_path / "out")
    copy = open_model(tmp_path / "out")
    assert copy.config == model.config
    assert copy.source.config == source.config
    assert copy.source.sidecars() == source.sidecars()
    assert {name: copy.source.read(name).tobytes() for name in copy.source.tensors} == stored
