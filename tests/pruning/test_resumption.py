"""Interrupted runs: finished work is kept, the rest is repeated, and the result is identical."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparseopt.models import ModelError, pack_folder
from sparseopt.pruning import LayerRecord, Recipe, Stopped, memory, prune_model, prune_models
from sparseopt.pruning.base.records import Passed, Replay
from sparseopt.shell import prune_progress
from sparseopt.shell.prune import RESUMABLE, stop_asked
from sparseopt.shell.prune_progress import PruneProgress
from sparseopt.system.files import temporary_of
from sparseopt.system.run_folder import LOCK, RECORDS, RUN, FolderError, write_start
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.tiers import often


@pytest.fixture(scope="module")
def finished(tmp_path_factory, source, tokens):
    folder = tmp_path_factory.mktemp("finished") / "out"
    prune_model(source, folder, Recipe(method="magnitude", calibration=tokens))
    return folder


RECIPES = {
    "paper": {"preset": "paper", "dtype": "bfloat16"},
    "packed": {"method": "wanda", "pack": True},
    "trained": {"preset": "tuned", "train_epochs": 2, "propagate": 0.5, "variants": 1},
    "allocated": {"method": "admm", "allocation": "owl"},
}


class Broken(Exception):
    """The end of a run, at any moment."""


def breaking_at(count):
    """An observer that ends the run at its `count`-th record."""
    seen = []

    def observer(event, done, total):
        if isinstance(event, LayerRecord):
            seen.append(event)
            if len(seen) == count:
                raise Broken

    return observer


def model_bytes(folder: Path) -> dict[str, bytes]:
    """The files of the model itself."""
    accounts = (RUN, RECORDS, "summary.json", LOCK)
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in accounts}


@pytest.mark.parametrize("name", often(RECIPES, "packed", "trained"))
def test_a_run_interrupted_anywhere_gives_the_same_bytes(tmp_path, source, tokens, name):
    recipe = Recipe(calibration=tokens, heldout_windows=2, **RECIPES[name])
    whole = prune_model(source, tmp_path / "whole", recipe)
    # A block has seven linears: in the first block, at the end of the second, and in the third.
    for count in (3, 14, 16):
        with pytest.raises(Broken):
            prune_model(source, tmp_path / "broken", recipe, observer=breaking_at(count))
        assert not (tmp_path / "broken" / LOCK).exists()
    told = []
    report = prune_model(source, tmp_path / "broken", recipe, observer=lambda event, *_: told.append(event))
    assert report.resumed_blocks == 2
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "whole")
    assert [r.layer for r in report.layers] == [r.layer for r in whole.layers]
    assert [r.zeros for r in report.layers] == [r.zeros for r in whole.layers]
    assert sum(isinstance(event, LayerRecord) for event in told) == 21
    # Each finished block is announced, so that its records are not taken for work.
    events = [event for event in told if isinstance(event, LayerRecord | Replay)]
    assert [i for i, event in enumerate(events) if event == Replay(7)] == [0, 8]
    lines = [json.loads(line) for line in (tmp_path / "broken" / RECORDS).read_text().splitlines()]
    assert sorted(line["layer"] for line in lines if line["kind"] == "layer") == sorted(r.layer for r in whole.layers)


def test_half_a_record_and_a_shard_without_records_are_made_again(tmp_path, source, tokens):
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=0)
    prune_model(source, tmp_path / "whole", recipe)
    folder = tmp_path / "broken"
    with pytest.raises(Broken):
        prune_model(source, folder, recipe, observer=breaking_at(15))
    records = (folder / RECORDS).read_text().splitlines(keepends=True)
    (folder / RECORDS).write_text("".join(records[:13]) + records[13][:40])
    (folder / ".model-block-0007.safetensors.tmp").write_bytes(b"half")
    report = prune_model(source, folder, recipe)
    assert report.resumed_blocks == 1
    assert model_bytes(folder) == model_bytes(tmp_path / "whole")


def test_several_recipes_of_one_pass_resume_each_from_its_own_block(tmp_path, source, tokens):
    recipes = [Recipe(sparsity=s, method="wanda", calibration=tokens, heldout_windows=0) for s in (0.5, 0.75)]
    for recipe in recipes:
        prune_model(source, tmp_path / f"whole-{recipe.sparsity}", recipe)
    plans = [(recipe, tmp_path / f"broken-{recipe.sparsity}") for recipe in recipes]
    # The first plan has finished two blocks, the second one.
    with pytest.raises(Broken):
        prune_models(source, plans, observer=breaking_at(7 * 3 + 2))
    assert [report.resumed_blocks for report in prune_models(source, plans)] == [2, 1]
    for recipe, folder in plans:
        assert model_bytes(folder) == model_bytes(tmp_path / f"whole-{recipe.sparsity}")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparsity": 0.6}, r"recipe.sparsity: 0.5 there, 0.6 here"),
        ({"method": "magnitude"}, r"recipe.method: 'wanda' there, 'magnitude' here"),
        ({"calibration": "other"}, r"tokens: '\w+' there, '\w+' here"),
        ({"source": "other"}, r"weights: '\w+' there, '\w+' here"),
    ],
)
def test_another_run_in_the_folder_is_refused_and_told_what_differs(tmp_path, source, tokens, changes, named):
    fields = {"sparsity": 0.5, "method": "wanda", "calibration": tokens, "heldout_windows": 0}
    with pytest.raises(Broken):
        prune_model(source, tmp_path / "out", Recipe(**fields), observer=breaking_at(9))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    if changes.pop("source", None):
        tensors = random_tensors(tiny_config(), np.random.default_rng(9))
        source = write_folder(tmp_path / "other", tiny_config(), tensors)
    if changes.get("calibration"):
        changes["calibration"] = tokens[::-1].copy()
    with pytest.raises(FolderError, match=rf"another run was started.*choose another folder[\s\S]*{named}"):
        prune_model(source, tmp_path / "out", Recipe(**(fields | changes)))
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_of_version_0_1_0_is_refused_with_what_to_do(tmp_path, finished, source, tokens, complete):
    shutil.copytree(finished, tmp_path / "out")
    start = json.loads((tmp_path / "out" / RUN).read_text())
    (tmp_path / "out" / RUN).write_text(json.dumps(start["fingerprint"], indent=2))  # that version's layout
    if not complete:
        (tmp_path / "out" / "summary.json").unlink()
    before = written(tmp_path / "out")
    with pytest.raises(FolderError, match=r"the format of sparseopt 0\.1\.0.*finish or read it with the version that"):
        prune_model(source, tmp_path / "out", Recipe(method="magnitude", calibration=tokens))
    assert written(tmp_path / "out") == before


def test_a_run_killed_before_its_summary_is_finished_once_more(tmp_path, source, tokens):
    recipe = Recipe(method="wanda", calibration=tokens)
    whole = prune_model(source, tmp_path / "out", recipe)
    before = model_bytes(tmp_path / "out")
    (tmp_path / "out" / "summary.json").unlink()
    report = prune_model(source, tmp_path / "out", recipe)
    assert report.resumed_blocks == 3
    assert [r.as_dict() for r in report.layers] == [r.as_dict() for r in whole.layers]
    assert model_bytes(tmp_path / "out") == before
    assert (tmp_path / "out" / "summary.json").is_file()


def test_a_run_killed_while_it_wrote_its_fingerprint_is_begun_again(tmp_path, source, tokens):
    (tmp_path / "out").mkdir()
    temporary_of(tmp_path / "out" / RUN).write_text('{"wei')
    assert prune_model(source, tmp_path / "out", Recipe(method="magnitude", calibration=tokens)).sparsity == 0.5
    assert not temporary_of(tmp_path / "out" / RUN).exists()


def written(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What lies in a folder, and when it was written."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_a_finished_run_is_not_run_again_and_its_report_returned(tmp_path, source, tokens, monkeypatch):
    recipe = Recipe(method="magnitude", calibration=tokens, train_epochs=1, pack=True)
    report = prune_model(source, tmp_path / "out", recipe)
    before, told = written(tmp_path / "out"), []
    # A finished run needs no room.
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    again = prune_model(source, tmp_path / "out", recipe, observer=lambda event, *_: told.append(event))
    assert again.kept
    assert dataclasses.replace(again, kept=False) == report
    assert again.summary() == report.summary()
    assert told == []
    assert written(tmp_path / "out") == before


def test_of_several_recipes_those_that_are_finished_are_left_out_of_the_pass(tmp_path, source, tokens):
    recipes = [Recipe(sparsity=s, method="wanda", calibration=tokens, heldout_windows=0) for s in (0.5, 0.75)]
    plans = [(recipe, tmp_path / "out" / f"{recipe.sparsity}") for recipe in recipes]
    first, told = prune_model(source, plans[1][1], recipes[1]), []
    reports = prune_models(source, plans, observer=lambda event, _, total: told.append((event, total)))
    assert [report.kept for report in reports] == [False, True]
    assert [report.recipe["sparsity"] for report in reports] == [0.5, 0.75]
    assert reports[1].layers == first.layers
    assert {total for _, total in told} == {21}
    assert [report.kept for report in prune_models(source, plans)] == [True, True]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "model-block-0001.safetensors").unlink(), "shard or records of block 1 are missing"),
        (lambda folder: (folder / "model-outer.safetensors").unlink(), "the tensors outside the blocks are missing"),
        (lambda folder: os.truncate(folder / RECORDS, 900), "shard or records of block 0 are missing"),
        (lambda folder: (folder / "summary.json").write_text("{}"), "summary.json is not that of a pruning run"),
        (lambda folder: (folder / RUN).unlink(), ""),
        (lambda folder: write_start(folder, {"weights": "another"}), "weights: 'another' there"),
    ],
)
def test_a_finished_folder_that_is_not_the_same_run_is_left_as_it_is(tmp_path, finished, source, tokens, spoil, named):
    shutil.copytree(finished, tmp_path / "out")
    spoil(tmp_path / "out")
    before = written(tmp_path / "out")
    with pytest.raises(FolderError, match=rf"not empty \(it holds a model\); choose another[\s\S]*{named}"):
        prune_model(source, tmp_path / "out", Recipe(method="magnitude", calibration=tokens))
    assert written(tmp_path / "out") == before


def test_a_folder_in_use_is_refused_and_a_stale_lock_is_not(tmp_path, source, tokens):
    recipe = Recipe(method="magnitude", calibration=tokens)
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


def test_no_output_lies_in_the_folder_of_the_model(tmp_path, source, tokens):
    (tmp_path / "link").symlink_to(source)
    before = sorted(source.rglob("*"))
    for output in (source / "out", tmp_path / "link" / "deep" / "out"):
        with pytest.raises(ModelError, match=r"the output folder .*out lies in the model's folder .*; choose another"):
            prune_model(source, output, Recipe(method="magnitude", calibration=tokens))
        with pytest.raises(ModelError, match="lies in the model's folder"):
            pack_folder(source, output)
    assert sorted(source.rglob("*")) == before


def test_a_refused_run_leaves_no_folder_behind(tmp_path, source, tokens):
    broken = tokens.copy()
    tensors = random_tensors(tiny_config(), np.random.default_rng(7))
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = np.nan
    bad = write_folder(tmp_path / "bad", tiny_config(), tensors)
    with pytest.raises(ValueError, match="NaN or infinite"):
        prune_model(bad, tmp_path / "out", Recipe(method="magnitude", calibration=broken))
    assert not (tmp_path / "out").exists()


def test_a_run_asked_to_stop_ends_after_a_block_and_resumes(tmp_path, source, tokens):
    recipe = Recipe(method="wanda", calibration=tokens)
    prune_model(source, tmp_path / "whole", recipe)
    asked = iter([False, True])
    with pytest.raises(Stopped, match="stopped after block 2 of 3; the same call resumes there"):
        prune_model(source, tmp_path / "out", recipe, stop=lambda: next(asked))
    assert prune_model(source, tmp_path / "out", recipe).resumed_blocks == 2
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")


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
def test_a_killed_process_loses_only_the_current_block(tmp_path, source, tokens):
    np.save(tmp_path / "tokens.npy", tokens)
    arguments = [source, tmp_path / "out", tmp_path / "tokens.npy", 19]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=0)
    assert prune_model(source, tmp_path / "out", recipe).resumed_blocks == 2
    prune_model(source, tmp_path / "whole", recipe)
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")


def test_the_time_left_does_not_count_what_came_before_the_blocks(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(prune_progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    records = [
        LayerRecord(b, f"layers.{b}.up", (2, 2), 4, 2, 0.1, None, 1, "CONVERGED", 1.0, 0.0, 0, 9) for b in (0, 1)
    ]
    with PruneProgress("whole", faster=True) as progress:
        now[0] += 5000
        progress("survey", 1, 1)
        now[0] += 3
        progress(records[0], 1, 2)
        progress(Passed(0, 2), 1, 2)
    said = capsys.readouterr().out
    assert "layer 1/2, block 0, mean relative error 0.10000, 5003 s, 3 s left" in said
    assert "effort fast" not in said


def test_the_time_left_of_a_resumed_run_counts_the_blocks_that_it_finishes_itself(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(prune_progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    names = [(block, f"model.layers.{block}.{part}") for block in range(4) for part in ("up", "down")]
    records = [LayerRecord(b, name, (2, 2), 4, 2, 0.1, None, 1, "CONVERGED", 1.0, 0.0, 0, 9) for b, name in names]
    done = 0
    monkeypatch.setattr(prune_progress, "LONG", 60)
    with PruneProgress("half", faster=True) as progress:
        for block in range(6):
            events = [*([Replay(2)] if block < 2 else []), *records[2 * block : 2 * block + 2], Passed(block, 6)]
            for event in events:
                now[0] += 10 if event in records[4:] else 1
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
