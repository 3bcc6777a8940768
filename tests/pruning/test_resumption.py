"""Folders of runs: what is finished is kept, what is unfinished goes on, and anything else is left as it is.

That a run broken off anywhere gives the same bytes is a test of `test_whole_runs`; SIGTERM is one of `test_faults`.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from sparseopt.pruning import Recipe, memory, prune_model
from sparseopt.pruning.base.records import Passed
from sparseopt.system.files import temporary_of
from sparseopt.system.run_folder import LOCK, RECORDS, RUN, FolderError, write_start
from tests.models.tiny import random_tensors, tiny_config, write_architecture
from tests.pruning.whole_runs import (
    HELDOUT,
    Broken,
    breaking_at,
    ended_by,
    model_bytes,
    tensors_of,
    write_model,
    written,
)
from tests.tiers import often

pytestmark = pytest.mark.usefixtures("several_batches")
FIELDS = {"method": "wanda", "heldout_windows": HELDOUT}


@pytest.fixture(scope="module")
def recipe(tokens):
    return Recipe(**FIELDS, calibration=tokens)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, source, recipe):
    """The folders of a finished run, and of one that was broken off in its last block; tests copy them."""
    place = tmp_path_factory.mktemp("folders")
    prune_model(source, place / "finished", recipe)
    with pytest.raises(Broken):
        prune_model(source, place / "unfinished", recipe, observer=breaking_at(15))
    return place


def no_summary(folder):
    (folder / "summary.json").unlink()


def half_a_record(folder):
    """And a shard without all its records, half a shard, and files of others."""
    records = (folder / RECORDS).read_text().splitlines(keepends=True)
    (folder / RECORDS).write_text("".join(records[:13]) + records[13][:40])
    (folder / "model-block-0002.safetensors").write_bytes(b"half")
    temporary_of(folder / "model-block-0002.safetensors").write_bytes(b"half")
    for name in ("adapter.safetensors", "mine.gguf", "draft.tmp", "model-mine.safetensors"):
        (folder / name).write_bytes(b"mine")


def half_a_fingerprint(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    temporary_of(folder / RUN).write_text('{"wei')


@pytest.mark.parametrize(
    ("start", "change", "blocks"),
    [("unfinished", half_a_record, 1), ("finished", no_summary, 3), ("unfinished", half_a_fingerprint, 0)],
)
def test_a_folder_of_a_run_that_was_killed_is_finished(tmp_path, source, recipe, folders, start, change, blocks):
    folder = shutil.copytree(folders / start, tmp_path / "out")
    change(folder)
    report = prune_model(source, folder, recipe)
    assert report.resumed_blocks == blocks
    found, whole = model_bytes(folder), model_bytes(folders / "finished")
    others = found.keys() - whole.keys()
    assert {name: found[name] for name in whole} == whole
    # Files of others stay.
    assert len(others) == (4 if change is half_a_record else 0)
    assert all(found[name] == b"mine" for name in others)
    lines, expected = (
        [json.loads(line) for line in (place / RECORDS).open()] for place in (folder, folders / "finished")
    )
    assert [line["layer"] for line in lines] == [line["layer"] for line in expected]
    assert lines == [record.as_dict() | {"shape": list(record.shape)} for record in report.layers]
    assert not (folder / LOCK).exists()


def older_version(folder):
    start = json.loads((folder / RUN).read_text())
    (folder / RUN).write_text(json.dumps(start["fingerprint"], indent=2))


OTHER = r"another run was started.*\s[\s\S]*"
FULL = r"not empty \(it holds a model\)[\s\S]*"
# The folder, what is changed in it, what is changed in the call, and the words of the refusal.
LEFT = {
    "another sparsity": ("unfinished", None, {"sparsity": 0.6}, OTHER + "recipe.sparsity: 0.5 there, 0.6 here"),
    "another method": ("unfinished", None, {"method": "magnitude"}, OTHER + "recipe.method: 'wanda' there"),
    "other linears": ("unfinished", None, {"ignore": ["v_proj"]}, OTHER + "recipe.ignore: "),
    "other tokens": ("unfinished", None, {"calibration": np.ones((7, 24), int)}, OTHER + r"tokens: '\w+' there"),
    "another model": ("unfinished", None, {"source": "another"}, OTHER + r"weights: '\w+' there"),
    "version 0.1.0": ("finished", older_version, {}, r"the format of sparseopt 0\.1\.0"),
    "no shard": ("finished", "model-block-0001.safetensors", {}, FULL + "shard or records of block 1 are missing"),
    "no outer shard": ("finished", "model-outer.safetensors", {}, FULL + "the tensors outside the blocks are missing"),
    "no fingerprint": ("finished", RUN, {}, FULL),
    "records cut short": (
        "finished", lambda folder: os.truncate(folder / RECORDS, 900), {}, FULL + "shard or records of block 0"
    ),
    "no summary of a run": (
        "finished", lambda folder: (folder / "summary.json").write_text("{}"), {}, FULL + "not that of a pruning run"
    ),
    "another fingerprint": (
        "finished", lambda folder: write_start(folder, {"weights": "another"}), {}, FULL + "weights: 'another' there"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_a_folder_that_is_not_that_of_the_same_run_is_left_as_it_is(tmp_path, source, tokens, folders, name):
    start, change, changes, words = LEFT[name]
    folder = shutil.copytree(folders / start, tmp_path / "out")
    if isinstance(change, str):
        (folder / change).unlink()
    elif change is not None:
        change(folder)
    before, given = written(folder), {**FIELDS, "calibration": tokens} | changes
    if given.pop("source", None):
        tensors = tensors_of("square")
        tensors["model.norm.weight"][0] += 1
        source = write_model(tmp_path / "other", "square", tensors)
    with pytest.raises(FolderError, match=words):
        prune_model(source, folder, Recipe(**given))
    assert written(folder) == before


def test_a_folder_in_use_is_refused_and_a_stale_lock_is_not(tmp_path, source, recipe, folders, monkeypatch):
    folder = shutil.copytree(folders / "finished", tmp_path / "out")
    with (folder / LOCK).open("w") as lock:
        lock.write("process 12345 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FolderError, match="is in use by process 12345 on elsewhere"):
            prune_model(source, folder, recipe)
    # Its owner has ended: the file is still there, and nobody holds it. A finished run needs no room.
    assert (folder / LOCK).exists()
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert prune_model(source, folder, recipe).kept
    assert not (folder / LOCK).exists()


@pytest.fixture(scope="module")
def sources(tmp_path_factory, source, tokens):
    """One model by the form in which it is read. A file that llama.cpp converts has tokens and no `vocab_size`."""
    place = tmp_path_factory.mktemp("sources")

    def read(kind):
        if kind == "folder":
            return source
        if kind == "compressed-tensors":
            recipe = Recipe(**FIELDS, calibration=tokens, sparsity=0.0, bits="int8")
            return prune_model(source, place / "out", recipe).output
        changes = {"llama.vocab_size": None} if kind == "converted file" else {}
        config = tiny_config(head_dim=8, vocab_size=64)
        tensors = random_tensors(config, np.random.default_rng(4))
        return write_architecture(place / f"{kind}.gguf", "llama", config, tensors, Kind.Q8_0, changes)

    return cache(read)


@pytest.mark.parametrize(
    ("kind", "output", "fields"),
    often(
        [
            ("converted file", "out.gguf", {"bits": "q4_0"}),
            ("folder", "out.gguf", {"train_epochs": 1}),
            ("file", "out", {"bits": "int8", "train_epochs": 1}),
            ("compressed-tensors", "out", {}),
            ("compressed-tensors", "out.gguf", {"bits": "q8_0", "train_epochs": 1}),
        ],
        ("converted file", "out.gguf", {"bits": "q4_0"}),
    ),
)
def test_every_source_resumes_into_every_form_with_the_same_bytes(tmp_path, tokens, sources, kind, output, fields):
    def files(place):
        found = sorted(file for file in place.rglob("*") if file.suffix in (".safetensors", ".gguf"))
        return {str(file.relative_to(place)): file.read_bytes() for file in found}

    source, recipe = sources(kind), Recipe(**FIELDS, calibration=tokens, score="none", **fields)
    prune_model(source, tmp_path / "whole" / output, recipe)
    for blocks in (1, 2):
        # The second end comes after a run that was resumed.
        with pytest.raises(Broken):
            prune_model(source, tmp_path / "broken" / output, recipe, observer=ended_by(Passed, blocks))
    assert prune_model(source, tmp_path / "broken" / output, recipe).resumed_blocks == 2
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


KILLED = """
import os, signal, sys
import numpy as np
from sparseopt.pruning import Recipe, prune_model
source, output, tokens = sys.argv[1:]
def observer(event, done, total):
    if done == 15:
        os.kill(os.getpid(), signal.SIGKILL)
prune_model(source, output, Recipe(method="wanda", calibration=np.load(tokens), heldout_windows=2), observer=observer)
"""


@pytest.mark.processes
def test_a_killed_process_loses_only_the_current_block(tmp_path, source, tokens, recipe, folders):
    np.save(tmp_path / "tokens.npy", tokens)
    arguments = map(str, (source, tmp_path / "out", tmp_path / "tokens.npy"))
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert prune_model(source, tmp_path / "out", recipe).resumed_blocks == 2
    assert model_bytes(tmp_path / "out") == model_bytes(folders / "finished")
