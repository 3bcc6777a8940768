"""Packing: exact round trips of arrays and folders; `tests.fuzz` refuses files that are inconsistent."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparseopt.models import ModelError, Packed, open_model, open_source, pack_folder, unpack_folder
from sparseopt.models.files.packed import (
    FORMAT,
    PACKED_INDEX,
    PackedTensor,
    pack_array,
    pack_tensors,
    packed_nbytes,
    read_packed_header,
    unpack_array,
)
from sparseopt.models.files.safetensors import read_metadata, write_tensors
from tests.models.tiny import copy_model, random_tensors, tiny_config, write_folder

DTYPES = [np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8)]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any bits at all: zeros of both signs, subnormals, infinities, every NaN."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    unsigned = np.dtype(f"u{dtype.itemsize}")
    sign = 1 << (8 * dtype.itemsize - 1)
    bits = st.one_of(st.sampled_from([0, 0, sign]), hnp.from_dtype(unsigned))
    return draw(hnp.arrays(unsigned, shape, elements=bits)).view(dtype)


@settings(max_examples=300, deadline=None)
@given(arrays())
def test_every_bit_comes_back(array):
    bitmask, values = pack_array(array)
    back = unpack_array(bitmask, values, array.shape)
    assert back.tobytes() == array.tobytes()
    assert (back.shape, back.dtype) == (array.shape, array.dtype)
    assert bitmask.shape == (-(-array.size // 8),)
    assert values.dtype == array.dtype
    assert packed_nbytes(array) == bitmask.nbytes + values.nbytes


def test_a_negative_zero_is_kept_and_entries_go_in_c_order_whatever_the_layout(rng):
    bitmask, values = pack_array(np.array([0.0, -0.0, 3.0, 0.0], np.float32))
    assert values.tobytes() == np.array([-0.0, 3.0], np.float32).tobytes()
    assert bitmask.tolist() == [0b0110_0000]
    array = rng.normal(size=(5, 7)) * (rng.random((5, 7)) < 0.5)
    for view in (array.T, array[::-1, ::2], np.asfortranarray(array)):
        np.testing.assert_array_equal(unpack_array(*pack_array(view), view.shape), view)


@pytest.mark.parametrize(
    ("bitmask", "values", "text"),
    [
        ([0b1100_0000, 0], [1.0], "has 2 ones and there are 1 values"),
        ([0b1000_0000, 0], [1.0, 2.0], "has 1 ones and there are 2 values"),
        ([0b1100_0000], [1.0, 2.0], "has 1 bytes, the shape [3, 4] needs 2"),
        ([0b1000_0000, 0b0000_0001], [1.0, 2.0], "ones after its last entry"),
    ],
)
def test_halves_that_do_not_fit(bitmask, values, text):
    with pytest.raises(ModelError) as caught:
        unpack_array(np.array(bitmask, np.uint8), np.array(values, np.float32), (3, 4))
    assert text in str(caught.value)


def half_zero(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    """Exactly half of the entries zero."""
    flat = rng.permutation(np.prod(shape)) + 1.0
    flat[flat > flat.size // 2] = 0
    return flat.reshape(shape).astype(dtype)


def test_what_does_not_become_smaller_stays_dense_in_a_file_of_safetensors(tmp_path, rng):
    tensors = {
        "pruned": half_zero(rng, (16, 8)),
        "norm": np.ones(16, ml_dtypes.bfloat16),
        # A sixteenth of zeros pays for the bitmask of 16 bits an entry and wins nothing.
        "even": np.array([0] + [1] * 15, ml_dtypes.bfloat16),
        "nothing": np.zeros((0, 4), np.float32),
        "one": np.ones(4, np.float32),
    }
    stored, metadata = pack_tensors(tensors)
    assert stored.keys() == {"pruned.bitmask", "pruned.values", "norm", "even", "nothing", "one"}
    assert stored["pruned.bitmask"].nbytes + stored["pruned.values"].nbytes == 0.5625 * tensors["pruned"].nbytes
    assert json.loads(metadata["shapes"]) == {"pruned": [16, 8]}
    file = tmp_path / "packed-a.safetensors"
    write_tensors(file, stored, metadata)
    with safetensors.safe_open(file, "numpy") as theirs:
        assert set(theirs.keys()) == set(stored)
        assert theirs.metadata() == metadata == read_metadata(file)
    found = read_packed_header(file)
    assert isinstance(found["pruned"], PackedTensor)
    assert (found["pruned"].shape, found["pruned"].dtype) == ((16, 8), np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found["one"].read(), np.ones(4))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelError, match="became shorter"):
        _ = [tensor.read() for tensor in found.values()]
    with pytest.raises(ModelError, match=r"called x\.values cannot be packed"):
        pack_tensors({"x.values": tensors["norm"]})


def is_linear(name: str) -> bool:
    return "proj" in name


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 folder whose linears are half zero, in two shards, with a tokenizer file and one that stays behind."""
    place, rng, config = tmp_path_factory.mktemp("half"), np.random.default_rng(0), tiny_config(dtype="bfloat16")
    tensors = random_tensors(config, rng)
    tensors = {k: half_zero(rng, v.shape, np.float32) if is_linear(k) else v for k, v in tensors.items()}
    folder = write_folder(place / "source", config, tensors, shards=2)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    copy_model(open_model(folder), place / "half", dtype=ml_dtypes.bfloat16)
    (place / "half" / "LICENSE").write_text("goes along")
    return place / "half"


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_packed_folder_has_the_files_and_bytes_of_its_model_and_unpacks_to_the_dense_one(tmp_path, half):
    seen: list[tuple[str, int, int]] = []
    done = pack_folder(half, tmp_path / "packed", observer=lambda *step: seen.append(step))
    assert seen == [("shards", 1, 4), ("shards", 2, 4), ("shards", 3, 4), ("shards", 4, 4)]
    writer = copy_model(open_model(half), tmp_path / "copied", form=Packed())
    assert files_of(tmp_path / "copied") == files_of(tmp_path / "packed")
    shards = [f"packed-{tag}.safetensors" for tag in ("block-0000", "block-0001", "block-0002", "outer")]
    others = ["LICENSE", "config.json", PACKED_INDEX, "tokenizer_config.json"]
    assert sorted(files_of(tmp_path / "packed")) == sorted(others + shards)
    dense, packed = open_source(half), open_source(tmp_path / "packed")
    assert list(packed.tensors) == list(dense.tensors)
    for name in dense.tensors:
        assert isinstance(packed.tensors[name], PackedTensor) == is_linear(name), name
    # 13,824 of the 27,648 weights of the linears are kept, at 2 bytes, and 1 bit each says which.
    linears = sum(dense.read(name).nbytes for name in dense.tensors if is_linear(name))
    rest = sum(dense.read(name).nbytes for name in dense.tensors if not is_linear(name))
    assert (writer.dense_bytes, writer.stored_bytes) == (linears + rest, 0.5625 * linears + rest)
    assert (done.dense_bytes, done.stored_bytes) == (writer.dense_bytes, writer.stored_bytes)
    assert json.loads((tmp_path / "packed" / PACKED_INDEX).read_text())["metadata"] == {
        "total_size": writer.stored_bytes,
        "format": FORMAT,
        "version": "1",
        "dense_size": writer.dense_bytes,
    }
    back = unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert back.stored_bytes == back.dense_bytes == done.dense_bytes
    assert files_of(tmp_path / "back") == files_of(half)


def test_refusals_before_work(tmp_path, half):
    pack_folder(half, tmp_path / "packed")
    for rewrite, source, text in [
        (unpack_folder, half, "is not packed: it has no model.packed.index.json"),
        (pack_folder, tmp_path / "packed", "is packed already"),
        (unpack_folder, tmp_path / "absent", "there is no folder"),
        (pack_folder, half / "config.json", "there is no folder"),
    ]:
        with pytest.raises(ModelError) as caught:
            rewrite(source, tmp_path / "new")
        assert text in str(caught.value)
        assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match=r"not empty \(it holds thesis\.tex\)"):
        unpack_folder(tmp_path / "packed", tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_one_flipped_bit_in_a_bitmask_is_noticed(tmp_path, half):
    pack_folder(half, tmp_path / "packed")
    file = tmp_path / "packed" / "packed-block-0001.safetensors"
    place = read_packed_header(file)["model.layers.1.mlp.up_proj.weight"]
    assert isinstance(place, PackedTensor)
    content = bytearray(file.read_bytes())
    content[place.bitmask.start + 3] ^= 0b0001_0000
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in .* is corrupt"):
        open_model(tmp_path / "packed").check_finite()
    with pytest.raises(ModelError, match="is corrupt"):
        unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()


def test_an_interrupt_leaves_no_index(tmp_path, half):
    def interrupt(_: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_folder(half, tmp_path / "packed", observer=interrupt)
    assert sorted(files_of(tmp_path / "packed")) == ["packed-block-0000.safetensors", "packed-outer.safetensors"]
