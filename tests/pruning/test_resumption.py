"""Folders of runs: what is finished is kept, what is unfinished goes on, and anything else is left as it is.

That a run broken off anywhere gives the same bytes is a test of `test_whole_runs`.
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

from sparseopt.pruning import LayerRecord, Recipe, Stopped, memory, prune_model, shrink_model
from sparseopt.pruning.base.records import Passed, Replay
from sparseopt.pruning.recipe.shrink_recipe import ShrinkRecipe
from sparseopt.shell import prune_progress
from sparseopt.shell.prune import RESUMABLE, stop_asked
from sparseopt.shell.prune_progress import PruneProgress
from sparseopt.system.files import temporary_of
from sparseopt.system.run_folder import LOCK, RECORDS, RUN, FolderError, write_start
from tests.models.tiny import CONFIGS, random_tensors, tiny_config, write_architecture, write_folder
from tests.pruning.whole_runs import TOKENIZER, Broken, breaking_at, ended_by, model_bytes, written
from tests.tiers import often

FIELDS = {"method": "wanda", "heldout_windows": 0}


@pytest.fixture(scope="module")
def recipe(tokens):
    return Recipe(**FIELDS, calibration=tokens)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, source, recipe):
    """The folder of an unbroken run; tests copy it."""
    return prune_model(source, tmp_path_factory.mktemp("finished") / "out", recipe).output


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, source, recipe):
    """That of a run that was broken off in its last block."""
    folder = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.raises(Broken):
        prune_model(source, folder, recipe, observer=breaking_at(15))
    return folder


def no_summary(folder):
    (folder / "summary.json").unlink()


def half_a_record(folder):
    """And a shard without all its records, and half a shard."""
    records = (folder / RECORDS).read_text().splitlines(keepends=True)
    (folder / RECORDS).write_text("".join(records[:13]) + records[13][:40])
    temporary_of(folder / "model-block-0002.safetensors").write_bytes(b"half")


def half_a_fingerprint(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    temporary_of(folder / RUN).write_text('{"wei')


@pytest.mark.parametrize(
    ("start", "change", "blocks"),
    [
        ("unfinished", half_a_record, 1),
        ("finished", no_summary, 3),
        ("unfinished", half_a_fingerprint, 0),
    ],
)
def test_a_folder_of_a_run_that_was_killed_is_finished(
    tmp_path, source, recipe, finished, request, start, change, blocks
):
    folder = shutil.copytree(request.getfixturevalue(start), tmp_path / "out")
    change(folder)
    report = prune_model(source, folder, recipe)
    assert report.resumed_blocks == blocks
    assert model_bytes(folder) == model_bytes(finished)
    assert report.sparsity == 0.5
    lines = [[json.loads(line) for line in (place / RECORDS).open()] for place in (folder, finished)]
    assert [line["layer"] for line in lines[0]] == [line["layer"] for line in lines[1]]
    if change is no_summary:
        assert lines[0] == lines[1] == [record.as_dict() | {"shape": list(record.shape)} for record in report.layers]
    assert {LOCK, temporary_of(folder / RUN).name}.isdisjoint(file.name for file in folder.iterdir())


def test_files_of_others_in_the_folder_of_a_killed_run_stay(tmp_path, source, recipe, finished, unfinished):
    folder = shutil.copytree(unfinished, tmp_path / "out")
    (folder / "model-block-0002.safetensors").write_bytes(b"half")
    others = {
        name: name.encode() for name in ("adapter.safetensors", "mine.gguf", "draft.tmp", "model-mine.safetensors")
    }
    for name, content in others.items():
        (folder / name).write_bytes(content)
    assert prune_model(source, folder, recipe).resumed_blocks == 2
    assert model_bytes(folder) == model_bytes(finished) | others


def older_version(folder):
    start = json.loads((folder / RUN).read_text())
    (folder / RUN).write_text(json.dumps(start["fingerprint"], indent=2))


def older_and_unfinished(folder):
    older_version(folder)
    no_summary(folder)


ANOTHER = r"another run was started.*choose another folder[\s\S]*"
FULL = r"not empty \(it holds a model\); choose another[\s\S]*"
OLDER = r"the format of sparseopt 0\.1\.0.*finish or read it with the version that"
# The folder, what is changed in it, what is changed in the call, and the words of the refusal.
LEFT = {
    "another sparsity": ("unfinished", None, {"sparsity": 0.6}, ANOTHER + r"recipe.sparsity: 0.5 there, 0.6 here"),
    "another method": (
        "unfinished", None, {"method": "magnitude"}, ANOTHER + r"recipe.method: 'wanda' there, 'magnitude' here"
    ),
    "other linears": ("unfinished", None, {"ignore": ["v_proj"]}, ANOTHER + "recipe.ignore: "),
    "other tokens": ("unfinished", None, {"calibration": "reversed"}, ANOTHER + r"tokens: '\w+' there, '\w+' here"),
    "another model": ("unfinished", None, {"source": "another"}, ANOTHER + r"weights: '\w+' there, '\w+' here"),
    "version 0.1.0": ("finished", older_version, {}, OLDER),
    "version 0.1.0, unfinished": ("finished", older_and_unfinished, {}, OLDER),
    "no shard": (
        "finished",
        lambda folder: (folder / "model-block-0001.safetensors").unlink(),
        {}, FULL + "shard or records of block 1 are missing",
    ),
    "no outer shard": (
        "finished",
        lambda folder: (folder / "model-outer.safetensors").unlink(),
        {}, FULL + "the tensors outside the blocks are missing",
    ),
    "records cut short": (
        "finished",
        lambda folder: os.truncate(folder / RECORDS, 900),
        {}, FULL + "shard or records of block 0 are missing",
    ),
    "no summary of a run": (
        "finished",
        lambda folder: (folder / "summary.json").write_text("{}"),
        {}, FULL + "summary.json is not that of a pruning run",
    ),
    "no fingerprint": ("finished", lambda folder: (folder / RUN).unlink(), {}, FULL),
    "another fingerprint": (
        "finished",
        lambda folder: write_start(folder, {"weights": "another"}),
        {}, FULL + "weights: 'another' there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_a_folder_that_is_not_that_of_the_same_run_is_left_as_it_is(tmp_path, source, tokens, request, name):
    start, change, changes, words = LEFT[name]
    folder = shutil.copytree(request.getfixturevalue(start), tmp_path / "out")
    if change is not None:
        change(folder)
    before, given = written(folder), {**FIELDS, "calibration": tokens} | changes
    if given.pop("source", None):
        tensors = random_tensors(tiny_config(), np.random.default_rng(9))
        source = write_folder(tmp_path / "other", tiny_config(), tensors)
    if isinstance(given["calibration"], str):
        given["calibration"] = tokens[::-1].copy()
    with pytest.raises(FolderError, match=words):
        prune_model(source, folder, Recipe(**given))
    assert written(folder) == before


def test_a_folder_in_use_is_refused_and_a_stale_lock_is_not(tmp_path, source, recipe):
    folder = tmp_path / "out"
    folder.mkdir()
    with (folder / LOCK).open("w") as lock:
        lock.write("process 12345 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FolderError, match="is in use by process 12345 on elsewhere; wait for it"):
            prune_model(source, folder, recipe)
    # Its owner has ended: the file is still there, and nobody holds it.
    assert (folder / LOCK).exists()
    assert prune_model(source, folder, recipe).sparsity == 0.5
    assert not (folder / LOCK).exists()


def test_a_finished_run_needs_no_room(tmp_path, source, recipe, finished, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert prune_model(source, folder, recipe).kept


def test_interrupted_runs_of_two_sizes_resume_each(tmp_path, source, tokens):
    fields = {"layers": 0.67, "multiple": 8, "train_epochs": 0, "method": "wanda", "heldout_windows": 2}
    recipes = [ShrinkRecipe(calibration=tokens, channels=share, **fields) for share in (0.75, 0.5)]
    folders = [tmp_path / f"broken-{each.channels}" for each in recipes]
    whole = [shrink_model(source, tmp_path / f"whole-{each.channels}", each) for each in recipes]
    for recipe, folder, report in zip(recipes, folders, whole, strict=True):
        with pytest.raises(Broken):
            shrink_model(source, folder, recipe, observer=breaking_at(2))
        assert shrink_model(source, folder, recipe).shape.removed == report.shape.removed
        assert model_bytes(folder) == model_bytes(report.output)
    with pytest.raises(FolderError, match=r"recipe.channels: 0.75 there, 0.5 here"):
        shrink_model(source, folders[0], recipes[1])


def test_a_run_asked_to_stop_ends_after_a_block_and_resumes(tmp_path, source, recipe, finished):
    asked = iter([False, True])
    with pytest.raises(Stopped, match="stopped after block 2 of 3; the same call resumes there"):
        prune_model(source, tmp_path / "out", recipe, stop=lambda: next(asked))
    assert prune_model(source, tmp_path / "out", recipe).resumed_blocks == 2
    assert model_bytes(tmp_path / "out") == model_bytes(finished)


QWEN2, QUICK = CONFIGS["qwen2"], {"method": "wanda", "score": "none"}
# Fields of a recipe, by the form of its output.
FORMS = {
    "out": ({}, {"train_epochs": 1}, {"bits": "int8"}, {"bits": "int8", "train_epochs": 1}),
    "out.gguf": ({}, {"train_epochs": 1}, {"bits": "q4_0"}, {"bits": "q8_0", "train_epochs": 1}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tokens):
    """One model by the form in which it is read. A file that llama.cpp converts has tokens and no `vocab_size`."""

    @cache
    def source(kind):
        place, tensors = tmp_path_factory.mktemp("sources"), random_tensors(QWEN2, np.random.default_rng(4))
        if kind == "folder":
            write_folder(place, QWEN2, tensors)
            (place / "tokenizer.json").write_text(TOKENIZER)
            return place
        if kind == "compressed-tensors":
            recipe = Recipe(**QUICK, calibration=tokens, sparsity=0.0, bits="int8")
            return prune_model(source("folder"), place / "out", recipe).output
        changes = {"qwen2.vocab_size": QWEN2["vocab_size"]} if kind == "file" else {}
        return write_architecture(place / "in.gguf", "qwen2", QWEN2, tensors, Kind.Q8_0, changes)

    return source


@pytest.mark.parametrize(
    ("kind", "output", "fields"),
    often(
        [
            (kind, output, fields)
            for kind in ("folder", "file", "converted file", "compressed-tensors")
            for output, each in FORMS.items()
            for fields in each
        ],
        ("folder", "out.gguf", {"bits": "q4_0"}),
        ("converted file", "out.gguf", {"bits": "q4_0"}),
    ),
)
def test_every_source_resumes_into_every_form_with_the_same_bytes(tmp_path, tokens, sources, kind, output, fields):
    def files(place):
        found = sorted(file for file in place.rglob("*") if file.suffix in (".safetensors", ".gguf"))
        return {str(file.relative_to(place)): file.read_bytes() for file in found}

    source, recipe = sources(kind), Recipe(**QUICK, calibration=tokens, **fields)
    prune_model(source, tmp_path / "whole" / output, recipe)
    for blocks in (1, 2):
        # The second end comes after a run that was resumed.
        with pytest.raises(Broken):
            prune_model(source, tmp_path / "broken" / output, recipe, observer=ended_by(Passed, blocks))
    assert prune_model(source, tmp_path / "broken" / output, recipe).resumed_blocks == 2
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_a_scheduler_s_signal_is_taken_note_of():
    with stop_asked() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert RESUMABLE == 75


KILLED = """
import os, signal, sys
import numpy as np
from sparseopt.pruning import Recipe, prune_model
source, output, tokens, count = sys.argv[1:]
seen = []
def observer(event, done, total):
    seen.append(event)
    if len(seen) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
prune_model(source, output, Recipe(method="wanda", calibration=np.load(tokens), heldout_windows=0), observer=observer)
"""


@pytest.mark.processes
def test_a_killed_process_loses_only_the_current_block(tmp_path, source, tokens, recipe, finished):
    np.save(tmp_path / "tokens.npy", tokens)
    arguments = [source, tmp_path / "out", tmp_path / "tokens.npy", 19]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert prune_model(source, tmp_path / "out", recipe).resumed_blocks == 2
    assert model_bytes(tmp_path / "out") == model_bytes(finished)


@pytest.fixture
def clock(monkeypatch):
    """A clock for the progress that is told, in seconds, in a list."""
    now = [0.0]
    monkeypatch.setattr(prune_progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def linear(block, name):
    return LayerRecord(block, f"layers.{block}.{name}", (2, 2), 4, 2, 0.1, None, 1, "CONVERGED", 1.0, 0.0, 0, 9)


def test_the_time_left_does_not_count_what_came_before_the_blocks(clock, capsys):
    with PruneProgress("whole", faster=True) as progress:
        clock[0] += 5000
        progress("survey", 1, 1)
        clock[0] += 3
        progress(linear(0, "up"), 1, 2)
        progress(Passed(0, 2), 1, 2)
    said = capsys.readouterr().out
    assert "layer 1/2, block 0, mean relative error 0.10000, 83 min, 3 s left" in said
    assert "effort fast" not in said


def test_compiling_does_not_count_as_work(clock, monkeypatch, capsys):
    monkeypatch.setattr(prune_progress, "Compiled", SimpleNamespace(seconds=0.0))
    with PruneProgress("whole") as progress:
        for done in range(1, 31):
            # The first step of the survey compiles for a minute, the first block for four.
            clock[0] += 62 if done == 2 else 2
            prune_progress.Compiled.seconds += 60 * (done == 2)
            progress("survey, pass", done, 30)
        for block in range(2):
            clock[0] += 250 if block == 0 else 10
            prune_progress.Compiled.seconds += 240 * (block == 0)
            progress(linear(block, "up"), block + 1, 4)
            progress(Passed(block, 4), block + 1, 4)
    said = capsys.readouterr().out.splitlines()[1:]
    passes = [line.removeprefix("whole: survey, pass ") for line in said[:-2]]
    assert passes == ["1/30, 2 s", "3/30, 66 s, 54 s left", *passes[2:]]
    assert passes[-1] == "30/30, 2 min"
    assert len(passes) == 11
    assert [line.rpartition(", ")[2] for line in said[-2:]] == ["30 s left", "20 s left"]


def test_the_time_left_of_a_resumed_run_counts_the_blocks_that_it_finishes_itself(clock, monkeypatch, capsys):
    records = [linear(block, part) for block in range(4) for part in ("up", "down")]
    done = 0
    monkeypatch.setattr(prune_progress, "LONG", 60)
    with PruneProgress("half", faster=True) as progress:
        for block in range(6):
            events = [*([Replay(2)] if block < 2 else []), *records[2 * block : 2 * block + 2], Passed(block, 6)]
            for event in events:
                clock[0] += 10 if event in records[4:] else 1
                done += event in records
                progress(event, done, len(records))
    # Two blocks come again in 8 s, the next two take 21 s each; the last two are not pruned, and take a second each.
    assert capsys.readouterr().out.splitlines()[1:] == [
        "half: layer 2/8, block 0, mean relative error 0.10000, 4 s",
        "half: layer 4/8, block 1, mean relative error 0.10000, 8 s",
        "half: layer 6/8, block 2, mean relative error 0.10000, 29 s, 63 s left",
        "half: about 63 s left; --effort fast takes less",
        "half: layer 8/8, block 3, mean relative error 0.10000, 50 s, 42 s left",
        "half: block 4 has no layer to prune, 51 s, 14 s left",
        "half: block 5 has no layer to prune, 52 s, 0 s left",
    ]
