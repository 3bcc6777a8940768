"""Packing: exact round trips, inconsistent files are refused, a packed folder reads as the dense one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparseopt.models import (
    OUTER_TAG,
    ModelError,
    ShardedWriter,
    block_tag,
    load_decoder,
    open_model,
    open_source,
    pack_folder,
    unpack_folder,
)
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
from tests.jitted import run
from tests.models.tiny import random_tensors, tiny_config, write_folder

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
def test_every_bit_comes_back(array: np.ndarray) -> None:
    bitmask, values = pack_array(array)
    back = unpack_array(bitmask, values, array.shape)
    assert back.tobytes() == array.tobytes()
    assert (back.shape, back.dtype) == (array.shape, array.dtype)
    assert bitmask.shape == (-(-array.size // 8),)
    assert values.dtype == array.dtype
    assert packed_nbytes(array) == bitmask.nbytes + values.nbytes


def test_a_negative_zero_is_kept_and_a_zero_is_not() -> None:
    bitmask, values = pack_array(np.array([0.0, -0.0, 3.0, 0.0], np.float32))
    assert values.tobytes() == np.array([-0.0, 3.0], np.float32).tobytes()
    assert bitmask.tolist() == [0b0110_0000]


def test_entries_go_in_c_order_whatever_the_memory_layout(rng: np.random.Generator) -> None:
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
def test_halves_that_do_not_fit(bitmask: list[int], values: list[float], text: str) -> None:
    with pytest.raises(ModelError) as caught:
        unpack_array(np.array(bitmask, np.uint8), np.array(values, np.float32), (3, 4))
    assert text in str(caught.value)


def half_zero(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    """Exactly half of the entries zero."""
    flat = rng.permutation(np.prod(shape)) + 1.0
    flat[flat > flat.size // 2] = 0
    return flat.reshape(shape).astype(dtype)


def test_what_does_not_become_smaller_stays_dense(rng: np.random.Generator) -> None:
    tensors = {
        "pruned": half_zero(rng, (16, 8)),
        "norm": np.ones(16, ml_dtypes.bfloat16),
        # A sixteenth of zeros pays for the bitmask of 16 bits an entry and wins nothing.
        "even": np.array([0] + [1] * 15, ml_dtypes.bfloat16),
        "nothing": np.zeros((0, 4), np.float32),
    }
    stored, metadata = pack_tensors(tensors)
    assert stored.keys() == {"pruned.bitmask", "pruned.values", "norm", "even", "nothing"}
    assert stored["pruned.bitmask"].nbytes + stored["pruned.values"].nbytes == 0.5625 * tensors["pruned"].nbytes
    assert json.loads(metadata["shapes"]) == {"pruned": [16, 8]}
    with pytest.raises(ModelError, match=r"called x\.values cannot be packed"):
        pack_tensors({"x.values": tensors["norm"]})


@pytest.fixture
def packed_file(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, dict[str, np.ndarray], dict[str, str]]:
    """A good file, with what it holds: tests write a changed one."""
    stored, metadata = pack_tensors({"w": half_zero(rng, (6, 4)), "norm": np.ones(4, np.float32)})
    write_tensors(tmp_path / "packed-a.safetensors", stored, metadata)
    return tmp_path / "packed-a.safetensors", stored, metadata


def test_a_packed_file_is_one_of_safetensors(packed_file: tuple) -> None:
    file, stored, metadata = packed_file
    with safetensors.safe_open(file, "numpy") as theirs:
        assert set(theirs.keys()) == set(stored)
        assert theirs.metadata() == metadata == read_metadata(file)
    tensors = read_packed_header(file)
    assert isinstance(tensors["w"], PackedTensor)
    assert (tensors["w"].shape, tensors["w"].dtype) == ((6, 4), np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(tensors["norm"].read(), np.ones(4))


def without(name: str) -> Callable:
    return lambda stored, metadata: ({k: v for k, v in stored.items() if k != name}, metadata)


def with_half(name: str, value: np.ndarray) -> Callable:
    return lambda stored, metadata: (stored | {name: value}, metadata)


def with_text(name: str, text: str) -> Callable:
    return lambda stored, metadata: (stored, metadata | {name: text})


CORRUPT = {
    "no bitmask": (without("w.bitmask"), "missing: w.bitmask"),
    "no values": (without("w.values"), "missing: w.values"),
    "no halves": (lambda s, m: ({"norm": s["norm"]}, m), "missing: w.bitmask, w.values"),
    "short bitmask": (
        with_half("w.bitmask", np.zeros(2, np.uint8)),
        "w.bitmask is uint8 [2], the shape [6, 4] needs uint8 [3]",
    ),
    "wide bitmask": (with_half("w.bitmask", np.zeros(3, np.int16)), "w.bitmask is int16 [3]"),
    "folded bitmask": (with_half("w.bitmask", np.zeros((3, 1), np.uint8)), "w.bitmask is uint8 [3, 1]"),
    "too many values": (with_half("w.values", np.ones(25, np.float16)), "w.values is [25], expected one axis of at"),
    "folded values": (with_half("w.values", np.ones((3, 4), np.float16)), "w.values is [3, 4], expected one axis"),
    "twice": (with_half("w", np.ones((6, 4), np.float32)), "w is stored dense and packed"),
    "unannounced": (with_half("v.values", np.ones(3, np.float32)), "v.values belongs to no tensor with a shape"),
    "other shape": (with_text("shapes", '{"w": [6, 6]}'), "the shape [6, 6] needs uint8 [5]"),
    "more shapes": (with_text("shapes", '{"w": [6, 4], "u": [8]}'), "missing: u.bitmask, u.values"),
    "no shapes": (lambda s, m: (s, {k: v for k, v in m.items() if k != "shapes"}), "no table of dense shapes"),
    "shapes no JSON": (with_text("shapes", "{"), "no table of dense shapes"),
    "shapes a list": (with_text("shapes", "[1]"), "no table of dense shapes"),
    "shapes numbers": (with_text("shapes", '{"w": 24}'), "no table of dense shapes"),
    "negative": (with_text("shapes", '{"w": [-6, -4]}'), "(w: an impossible shape)"),
    "truth": (with_text("shapes", '{"w": [24, true]}'), "(w: an impossible shape)"),
    "fraction": (with_text("shapes", '{"w": [6, 4.0]}'), "(w: an impossible shape)"),
    "text": (with_text("shapes", '{"w": "64"}'), "(w: an impossible shape)"),
    "huge": (with_text("shapes", f'{{"w": [{2**40}, {2**40}]}}'), "(w: an impossible shape)"),
    "many axes": (with_text("shapes", json.dumps({"w": [6, 4] + [1] * 63})), "(w: an impossible shape)"),
    "other format": (with_text("format", "pt"), "is not packed: its format is 'pt', expected 'sparseopt-packed'"),
    "later version": (with_text("version", "2"), "version '2' of the format, this sparseopt reads '1'"),
}


@pytest.mark.parametrize(("change", "text"), CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_header_is_refused_by_name(packed_file: tuple, change: Callable, text: str) -> None:
    file, stored, metadata = packed_file
    write_tensors(file, *change(stored, metadata))
    with pytest.raises(ModelError) as caught:
        read_packed_header(file)
    assert text in str(caught.value)
    assert str(file) in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(packed_file: tuple) -> None:
    file, stored, metadata = packed_file
    changed = {"w.bitmask": np.zeros(2, np.uint8), "w.values": np.ones(25, np.int8), "x.bitmask": np.zeros(1, np.uint8)}
    write_tensors(file, stored | changed, metadata)
    with pytest.raises(ModelError, match=r"corrupt \(3 problems\)"):
        read_packed_header(file)


def test_a_bitmask_of_other_values_is_refused_when_it_is_read(packed_file: tuple) -> None:
    file, stored, metadata = packed_file
    write_tensors(file, stored | {"w.values": stored["w.values"][:-1]}, metadata)
    tensor = read_packed_header(file)["w"]
    with pytest.raises(ModelError, match=r"w in .*packed-a\.safetensors is corrupt: the bitmask has 12 ones and .* 11"):
        tensor.read()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="became shorter"):
        tensor.read()


@pytest.mark.parametrize("metadata", [[1], {"a": 1}, "text", None])
def test_metadata_that_are_no_texts(tmp_path: Path, metadata: Any) -> None:
    raw = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "packed-a.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ModelError, match="corrupt header"):
        read_metadata(tmp_path / "packed-a.safetensors")


def copy_model(source: Path, output: Path, **options: Any) -> ShardedWriter:
    model = open_model(source)
    writer = ShardedWriter(output, model.source, **options)
    for tag, keys in [
        (OUTER_TAG, model.outer_keys()),
        *((block_tag(i), list(model.block_keys(i).values())) for i in range(model.num_blocks)),
    ]:
        writer.write(tag, {key: model.source.read(key) for key in keys})
    writer.finish()
    return writer


def is_linear(name: str) -> bool:
    return "proj" in name


@pytest.fixture
def half(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A bfloat16 folder whose linears are half zero, in two shards, with a tokenizer file and one that stays behind."""
    config = tiny_config(dtype="bfloat16")
    tensors = random_tensors(config, rng)
    tensors = {k: half_zero(rng, v.shape, np.float32) if is_linear(k) else v for k, v in tensors.items()}
    folder = write_folder(tmp_path / "source", config, tensors, shards=2)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    copy_model(folder, tmp_path / "half", dtype=ml_dtypes.bfloat16)
    (tmp_path / "half" / "LICENSE").write_text("goes along")
    return tmp_path / "half"


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_packed_folder_reads_as_the_dense_one(tmp_path: Path, half: Path) -> None:
    writer = copy_model(half, tmp_path / "packed", pack=True)
    assert sorted(files_of(tmp_path / "packed")) == [
        "LICENSE",
        "config.json",
        PACKED_INDEX,
        "packed-block-0000.safetensors",
        "packed-block-0001.safetensors",
        "packed-block-0002.safetensors",
        "packed-outer.safetensors",
        "tokenizer_config.json",
    ]
    dense, packed = open_source(half), open_source(tmp_path / "packed")
    assert packed.config == dense.config
    assert packed.sidecars() == dense.sidecars()
    assert list(packed.tensors) == list(dense.tensors)
    for name, info in dense.tensors.items():
        found = packed.tensors[name]
        assert (found.shape, found.dtype) == (info.shape, info.dtype), name
        assert packed.read(name).tobytes() == dense.read(name).tobytes(), name
        assert isinstance(found, PackedTensor) == is_linear(name), name
    # 13,824 of the 27,648 weights of the linears are kept, at 2 bytes, and 1 bit each says which.
    linears = sum(dense.read(name).nbytes for name in dense.tensors if is_linear(name))
    rest = sum(dense.read(name).nbytes for name in dense.tensors if not is_linear(name))
    assert (writer.dense_bytes, writer.stored_bytes) == (linears + rest, 0.5625 * linears + rest)
    index = json.loads((tmp_path / "packed" / PACKED_INDEX).read_text())
    assert index["metadata"] == {
        "total_size": writer.stored_bytes,
        "format": FORMAT,
        "version": "1",
        "dense_size": writer.dense_bytes,
    }


def test_pack_and_unpack_give_the_files_back(tmp_path: Path, half: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    done = pack_folder(half, tmp_path / "packed", observer=lambda *step: seen.append(step))
    assert seen == [("shards", 1, 4), ("shards", 2, 4), ("shards", 3, 4), ("shards", 4, 4)]
    assert done.stored_bytes / done.dense_bytes < 0.6
    back = unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert back.stored_bytes == back.dense_bytes == done.dense_bytes
    assert files_of(tmp_path / "back") == files_of(half)


def test_a_packed_model_computes_the_same(tmp_path: Path, half: Path, rng: np.random.Generator) -> None:
    pack_folder(half, tmp_path / "packed")
    tokens = rng.integers(0, 30, (2, 12)).astype(np.int32)
    dense, packed = (np.asarray(run(load_decoder(folder), tokens)) for folder in (half, tmp_path / "packed"))
    assert dense.tobytes() == packed.tobytes()


def test_refusals_before_work(tmp_path: Path, half: Path) -> None:
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


def test_a_packed_folder_that_is_not_whole(tmp_path: Path, half: Path) -> None:
    folder = tmp_path / "packed"
    pack_folder(half, folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="holds a packed model and a dense one"):
        open_source(folder)
    (folder / "model.safetensors").unlink()
    index = json.loads((folder / PACKED_INDEX).read_text())
    (folder / PACKED_INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"w": "../x.safetensors"}}))
    with pytest.raises(ModelError, match="outside the folder"):
        open_source(folder)
    shard = (folder / "packed-outer.safetensors").read_bytes()
    (folder / PACKED_INDEX).write_text(json.dumps(index))
    (folder / "packed-outer.safetensors").write_bytes(shard[:-1])
    with pytest.raises(ModelError, match="truncated"):
        open_source(folder)
    (folder / "packed-outer.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks shards .* packed-outer\.safetensors"):
        open_source(folder)
    (folder / PACKED_INDEX).unlink()
    with pytest.raises(ModelError, match=r"packed shards and no model\.packed\.index\.json"):
        open_source(folder)


def test_one_flipped_bit_in_a_bitmask_is_noticed(tmp_path: Path, half: Path) -> None:
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


def test_an_interrupt_leaves_no_index(tmp_path: Path, half: Path) -> None:
    def interrupt(_: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_folder(half, tmp_path / "packed", observer=interrupt)
    assert sorted(f.name for f in (tmp_path / "packed").iterdir()) == [
        "packed-block-0000.safetensors",
        "packed-outer.safetensors",
    ]
