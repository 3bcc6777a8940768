"""The files of a model folder: allowed and refused links."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from sparseopt.models import ModelError, ShardedWriter, load_tokenizer, open_model, open_source
from sparseopt.models.files.folder import file_in, read_json
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.whole_runs import TOKENIZER

REFUSED = "outside its folder, and is not followed"


@pytest.fixture
def cached(tmp_path: Path, rng: np.random.Generator) -> Path:
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
        with pytest.raises(ModelError, match=REFUSED):
            file_in(cached, "link.json")


def test_blobs_that_are_a_link_are_no_way_out(tmp_path):
    secret, snapshot = tmp_path / "secret", tmp_path / "models--lab--tiny" / "snapshots" / "abc"
    secret.mkdir()
    (secret / "0").write_text("{}")
    snapshot.mkdir(parents=True)
    (tmp_path / "models--lab--tiny" / "blobs").symlink_to(secret)
    (snapshot / "config.json").symlink_to("../../blobs/0")
    with pytest.raises(ModelError, match=REFUSED):
        open_source(snapshot)


def test_links_to_elsewhere_are_followed_if_asked_for(tmp_path, rng, command):
    config = tiny_config(num_hidden_layers=1)
    elsewhere = write_folder(tmp_path / "disk", config, random_tensors(config, rng), 2)
    (elsewhere / "tokenizer.json").write_text(TOKENIZER)
    (linked := tmp_path / "linked").mkdir()
    for file in elsewhere.iterdir():
        (linked / file.name).symlink_to(file)
    with pytest.raises(ModelError, match=r"is not followed.*--follow-links"):
        open_source(linked)
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
        with pytest.raises(ModelError, match=REFUSED):
            file_in(folder, name)
    for name in ("", "..", "a/b", "/a", "a\\b", "a\x00", "x" * 256):
        with pytest.raises(ModelError, match="is no file in the folder"):
            file_in(folder, name)
    with contextlib.suppress(ModelError):  # newer Pythons resolve a link to itself to itself
        assert not file_in(folder, "e").is_file()


def test_an_export_writes_through_no_link(tmp_path, rng):
    tensors = random_tensors(tiny_config(), rng)
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
