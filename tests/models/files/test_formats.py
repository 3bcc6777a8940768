"""Every file format reads as the model that was written to it: tensors, pieces, configuration, logits and copies."""

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

from sparseopt.models import load_decoder, open_model, open_source, unread
from sparseopt.models.files import safetensors
from sparseopt.models.files.gguf.architectures import ARCHITECTURES
from sparseopt.models.files.safetensors import write_tensors
from tests.jitted import run
from tests.models.tiny import (
    CONFIGS,
    copy_model,
    random_tensors,
    tiny_config,
    write_architecture,
    write_folder,
)


class Written(NamedTuple):
    """A model as files, and what must be read from them."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    atol: float = 0.0  # of vectors: Gemma's norms have been through + 1 and - 1 in float32


Write = Callable[[Path, np.random.Generator], Written]


def as_folder(dtype: Any, shards: int, place: Path, rng: np.random.Generator) -> Written:
    config = tiny_config(dtype=np.dtype(dtype).name)
    tensors = random_tensors(config, rng, dtype)
    if shards > 1:
        return Written(write_folder(place / "model", config, tensors, shards), config, tensors)
    folder = write_folder(place / "model", config, {})
    write_tensors(folder / "model.safetensors", tensors)
    return Written(folder, config, tensors)


def as_gguf(architecture: str, kind: Kind, place: Path, rng: np.random.Generator) -> Written:
    config = CONFIGS[architecture]
    tensors = random_tensors(config, rng)
    file = write_architecture(place / "m.gguf", architecture, config, tensors, kind)
    # Rows are quantised on their own, so that their order does not change their values.
    stored = {
        name: gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind) if value.ndim == 2 else value
        for name, value in tensors.items()
    }
    dtype = {Kind.F16: "float16", Kind.BF16: "bfloat16"}.get(kind, "float32")
    return Written(file, config | {"dtype": dtype}, stored, 2e-7 if architecture.startswith("gemma") else 0.0)


FORMATS: dict[str, Write] = {
    "one file": partial(as_folder, np.float32, 1),
    "three shards": partial(as_folder, np.float32, 3),
    **{np.dtype(t).name: partial(as_folder, t, 1) for t in (np.float16, ml_dtypes.bfloat16, np.float64)},
}
KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1)
FORMATS |= {f"{name} {kind.name}": partial(as_gguf, name, kind) for name in CONFIGS for kind in KINDS}
COMPUTING = [name for name in FORMATS if "F32" in name]


@pytest.fixture(scope="module", params=FORMATS)
def written(request, tmp_path_factory):
    return FORMATS[request.param](tmp_path_factory.mktemp("format"), np.random.default_rng(0))


def test_every_architecture_is_a_format():
    assert set(CONFIGS) == set(ARCHITECTURES)


def test_configuration_and_tensors_come_back_and_parts_are_float32(written):
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


def test_pieces_are_the_tensor(written, tmp_path, monkeypatch):
    """Read and dequantised in many pieces or at once, also where rows change places; so is a copy."""
    source = open_source(written.path)
    whole = {name: source.read(name) for name in source.tensors}
    write_tensors(tmp_path / "whole", unread(source, whole))
    monkeypatch.setattr(safetensors, "SLICE", 3 * 32 * 4)
    embedding = next(name for name in whole if "embed" in name)
    assert len(list(source.pieces(embedding))) > 3
    for name, expected in whole.items():
        np.testing.assert_array_equal(np.concatenate(list(source.pieces(name))), expected, err_msg=name)
        np.testing.assert_array_equal(source.read(name), expected, err_msg=name)
        np.testing.assert_array_equal(unread(source, [name])[name].read(), expected, err_msg=name)
    write_tensors(tmp_path / "pieces", unread(source, whole))
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_copy_is_the_same_to_the_byte(written, tmp_path):
    """A quantised source is written as float32, with its tokenizer."""
    model = open_model(written.path)
    copy_model(model, tmp_path / "out")
    copy = open_model(tmp_path / "out")
    assert copy.config == model.config
    assert copy.source.config == model.source.config
    assert copy.source.sidecars() == model.source.sidecars()
    assert set(copy.source.tensors) == set(model.source.tensors)
    for name in copy.source.tensors:
        assert copy.source.read(name).tobytes() == model.source.read(name).tobytes(), name


@pytest.mark.parametrize("written", COMPUTING, indirect=True)
def test_it_computes_what_a_folder_of_its_tensors_does(written, tmp_path, rng):
    folder = write_folder(tmp_path / "folder", written.config, {})
    write_tensors(folder / "model.safetensors", written.tensors)
    assert open_model(written.path).config == open_model(folder).config
    # Beyond the window of 8 tokens that sliding blocks have.
    tokens = rng.integers(0, 49, (2, 20))
    found, expected = (run(load_decoder(path), tokens) for path in (written.path, folder))
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5 if written.atol else 0, rtol=0)
