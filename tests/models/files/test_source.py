"""Reading a folder: memory, what a model must hold, what passes through, allowed links, and what is refused by name."""

import contextlib
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sparseopt.core.base.mesh import allocate, on_device
from sparseopt.models import ModelError, ShardedWriter, load_tokenizer, open_model, open_source
from sparseopt.models.files import safetensors
from sparseopt.models.files.folder import file_in, read_json
from sparseopt.models.files.safetensors import read_header, write_tensors
from tests.fuzz.damage import refused
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.whole_runs import TOKENIZER


def test_a_large_matrix_is_in_memory_once(tmp_path, monkeypatch):
    """JAX takes over what NumPy has read, piece by piece, and cast."""
    config = tiny_config(vocab_size=20_000)
    model = open_model(write_folder(tmp_path, config, random_tensors(config, np.random.default_rng(0), np.float16)))
    monkeypatch.setattr(safetensors, "SLICE", 2**16)
    tracemalloc.start()
    weight = model.embedding().weight[...]
    most, size = tracemalloc.get_traced_memory()[1], 4 * 20_000 * 32
    tracemalloc.stop()
    assert weight.nbytes == size <= most < 1.2 * size


def test_memory_that_begins_well_is_taken_over():
    values = allocate((3, 5))
    values[...] = 7
    assert on_device(values).unsafe_buffer_pointer() == values.ctypes.data
    assert allocate((0, 4), np.int8).shape == (0, 4)


DTYPES = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.int32, np.int64, np.uint8, np.bool_)
ARRAYS = st.dictionaries(
    st.text("ab.é0", min_size=1, max_size=9),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 9)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(ARRAYS)
def test_our_files_are_those_of_the_safetensors_package(tmp_path_factory, kinds):
    folder = tmp_path_factory.mktemp("any")
    arrays = {
        name: np.random.default_rng(seed).integers(0, 2**8, shape).astype(dtype)
        for name, (dtype, shape, seed) in kinds.items()
    }
    write_tensors(folder / "ours", arrays)
    save_file(arrays, folder / "theirs")
    header = read_header(folder / "theirs")
    for found in (load_file(folder / "ours"), {name: stored.read() for name, stored in header.items()}):
        assert set(found) == set(arrays)
        for name, value in arrays.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
            assert found[name].tobytes() == value.tobytes(), name


BLOCK = "model.layers.{}.mlp.up_proj.weight"
SQUARE = np.zeros((2, 2), np.float32)
K_PROJ, NORM = "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"
MISFITS = {BLOCK.format(1): None, BLOCK.format(3): SQUARE, K_PROJ: np.zeros((4, 32), np.float32)}
MISFITS |= {NORM: np.zeros(32, np.int8)}
SAID = (
    "4 problems",
    "missing: model.layers.1.mlp.up_proj.weight [64, 32]",
    "extra: model.layers.3.mlp.up_proj.weight [2, 2]",
    "misshapen: model.layers.0.self_attn.k_proj.weight is [4, 32], expected [16, 32]",
    "not a float: model.norm.weight is int8",
)
# Whether the head is tied, changes to the tensors, of which None takes one out, and what is told.
REFUSED = {
    "all kinds": (True, MISFITS, SAID),
    "many": (True, {BLOCK.format(index): SQUARE for index in range(3, 30)}, ("27 problems", "\n  and 7 more")),
    "no head": (False, {}, ("missing: lm_head.weight [49, 32]",)),
}


@pytest.mark.parametrize(("tied", "changes", "words"), REFUSED.values(), ids=REFUSED)
def test_tensors_that_do_not_fit_come_in_one_error(tmp_path, tensors, tied, changes, words):
    given = {name: value for name, value in (tensors | changes).items() if value is not None}
    with pytest.raises(ModelError) as caught:
        open_model(write_folder(tmp_path, tiny_config(tie_word_embeddings=tied), given))
    for text in words:
        assert text in str(caught.value)


def test_a_second_copy_of_a_tied_head_is_left_and_what_the_decoder_lacks_passes_through(tmp_path, tensors):
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


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path, tensors):
    """transformers would use the stored head."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    model = open_model(write_folder(tmp_path, tiny_config(), tensors))
    for use in (model.head, model.decoder, model.check_finite):
        refused(ModelError, r"lm_head.weight and model.embed_tokens.weight, which differ, .* false", use)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_weight_is_named_and_so_is_a_block_that_is_not_there(tmp_path, tensors, bad):
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 4] = bad
    model = open_model(write_folder(tmp_path, tiny_config(), tensors))
    model.block(1)
    refused(ModelError, r"model.layers.2.self_attn.o_proj.weight .* 1 NaN or infinite", model.block, 2)
    for index in (-1, 3):
        refused(IndexError, "blocks 0 to 2", model.block, index)


def test_of_one_file_and_shards_the_one_file_is_read_as_transformers_does(tmp_path, tensors):
    write_folder(tmp_path, tiny_config(), {name: np.zeros_like(value) for name, value in tensors.items()}, 2)
    write_folder(tmp_path, tiny_config(), tensors)
    source = open_source(tmp_path)
    assert all(source.read(name).tobytes() == tensors[name].tobytes() for name in source.tensors)


OUTSIDE = "outside its folder, and is not followed"


@pytest.fixture
def cached(tmp_path, rng):
    """A snapshot in a cache of the Hugging Face hub: every file is a link to a blob."""
    repository = tmp_path / "hub" / "models--lab--tiny"
    snapshot = write_folder(repository / "snapshots" / "abc", tiny_config(), random_tensors(tiny_config(), rng), 2)
    (snapshot / "tokenizer.json").write_text("{}")
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repository / "blobs" / f"{number}")
        file.symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_hub_s_cache_is_all_links_and_reads_its_own_repository_alone(cached, tmp_path):
    model, repository = open_model(cached), cached.parent.parent
    assert model.num_blocks == 3
    assert model.source.sidecars() == {"tokenizer.json": b"{}"}
    # The cache itself may lie behind a link.
    (tmp_path / "elsewhere").symlink_to(tmp_path / "hub")
    assert open_model(tmp_path / "elsewhere" / "models--lab--tiny" / "snapshots" / "abc").num_blocks == 3
    for name in ("../models--lab--other/blobs/0", "refs/main", "blobs-of-others/0"):
        place = repository / name
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(tiny_config()))
        (cached / "link.json").unlink(missing_ok=True)
        (cached / "link.json").symlink_to(place)
        refused(ModelError, OUTSIDE, file_in, cached, "link.json")
    # Nor are blobs that are a link a way out.
    (repository / "blobs").rename(tmp_path / "secret")
    (repository / "blobs").symlink_to(tmp_path / "secret")
    refused(ModelError, OUTSIDE, open_source, cached)


def test_links_to_elsewhere_are_followed_if_asked_for(tmp_path, rng, command):
    config = tiny_config(num_hidden_layers=1)
    elsewhere = write_folder(tmp_path / "disk", config, random_tensors(config, rng), 2)
    (elsewhere / "tokenizer.json").write_text(TOKENIZER)
    (linked := tmp_path / "linked").mkdir()
    for file in elsewhere.iterdir():
        (linked / file.name).symlink_to(file)
    refused(ModelError, r"is not followed.*--follow-links", open_source, linked)
    source = open_source(linked, follow_links=True)
    assert source.sidecars().keys() == {"tokenizer.json"}
    assert load_tokenizer(source).get_vocab_size() > 0
    (tmp_path / "text.txt").write_text("hello there,\n" * 300)
    text = f"file:{tmp_path / 'text.txt'}"
    prune = ("prune", linked, "--output", tmp_path / "out", "--calibration", text, "--windows", 4, "--seqlen", 24)
    status, _, err = command(*prune)
    assert status == 2
    assert "is not followed" in err
    for call in ((*prune, "--dry-run"), ("eval", linked, "--text", text, "--seqlen", 24, "--windows", 1)):
        status, _, err = command(*call, "--follow-links")
        assert status == 0, err


def test_links_within_a_folder_are_followed_and_chains_out_of_it_are_not(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("{}")
    (tmp_path / "out").write_text("{}")
    for name, target in (("b", "a"), ("c", "../out"), ("d", "c"), ("e", "e")):
        (folder / name).symlink_to(target)
    assert read_json(file_in(folder, "b")) == {}
    for name in ("c", "d"):
        refused(ModelError, OUTSIDE, file_in, folder, name)
    for name in ("", "..", "a/b", "/a", "a\\b", "a\x00", "x" * 256):
        refused(ModelError, "is no file in the folder", file_in, folder, name)
    with contextlib.suppress(ModelError):  # newer Pythons resolve a link to itself to itself
        assert not file_in(folder, "e").is_file()


def test_an_export_writes_through_no_link(tmp_path, tensors):
    source = open_source(write_folder(tmp_path / "in", tiny_config(), tensors))
    secret, output = tmp_path / "secret", tmp_path / "out"
    secret.write_text("kept")
    output.mkdir()
    for name in ("model-all.safetensors", "config.json"):
        (output / name).symlink_to(secret)
        (output / f".{name}.tmp").symlink_to(secret)
    writer = ShardedWriter(output, source, keep=())
    writer.write("all", tensors)
    writer.finish()
    assert secret.read_text() == "kept"
    assert not any(file.is_symlink() for file in output.iterdir())
    assert set(open_source(output).tensors) == set(tensors)
