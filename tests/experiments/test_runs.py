"""Run folders: consistent at any time, resumable, never overwritten without `--again`, shared by shards."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from sparseopt.experiments import runs as runs_module
from sparseopt.experiments.config import expand
from sparseopt.experiments.runs import (
    check_all,
    execute,
    fingerprint,
    load_run,
    plan,
    records_in,
    run_all,
    state_of,
    take_shard,
)
from sparseopt.shell.show_experiments import SweepProgress
from sparseopt.system.run_folder import FolderInUse, State

TOY = "tests.experiments.toy.Toy"
ROOT = Path(__file__).parents[2]


def quiet(text, done, total):
    del done, total, text


def toy(**fields):
    (run,) = expand({"name": "toy", "task": TOY, **fields}, allow_code=True)
    return run


def test_a_run_leaves_config_header_records_and_summary(tmp_path):
    run = toy(seed=3)
    outcome = execute(run, tmp_path, quiet)
    assert outcome.error is None
    assert outcome.done == 4
    folder = tmp_path / "toy"
    assert yaml.safe_load((folder / "config.yaml").read_text())["count"] == 4
    header = json.loads((folder / "run.json").read_text())
    assert header["seed"] == 3
    assert "jax" in header["versions"]
    assert header["machine"]["cores"] == os.cpu_count()
    assert header["machine"]["processor"]
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["unit"] for r in records] == ["unit-0", "unit-1", "unit-2", "unit-3"]
    assert records[2]["value"] == 2
    assert records[2]["nothing"] is None
    figures = json.loads((folder / "summary.json").read_text())["figures"]
    assert figures["value"] == {"mean": 1.5, "std": pytest.approx(1.25**0.5)}
    assert figures["kind"] == "toy"
    assert (yaml.safe_load((folder / "config.yaml").read_text())) == expand(
        yaml.safe_load((folder / "config.yaml").read_text()), allow_code=True
    )[0].task.model_dump(mode="json", exclude_none=True)


def test_a_finished_run_is_kept_unless_asked(tmp_path):
    log = tmp_path / "log"
    run = toy(log=str(log))
    execute(run, tmp_path, quiet)
    assert execute(run, tmp_path, quiet).done == 0
    assert len(log.read_text().splitlines()) == 4
    assert execute(run, tmp_path, quiet, again=True).done == 4
    assert len(log.read_text().splitlines()) == 8


def test_other_settings_never_overwrite_and_titles_do_not_count(tmp_path):
    execute(toy(), tmp_path, quiet)
    kept = (tmp_path / "toy" / "records.jsonl").read_text()
    with pytest.raises(ValueError, match=r"\(settings.scale: 1.0 there, 2.0 here\); give another --output, or --again"):
        execute(toy(scale=2.0), tmp_path, quiet)
    assert (tmp_path / "toy" / "records.jsonl").read_text() == kept
    assert execute(toy(title="another title"), tmp_path, quiet).done == 0
    assert execute(toy(scale=2.0), tmp_path, quiet, again=True).done == 4


def test_a_folder_of_something_else_is_never_touched(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "thesis.tex").write_text("years")
    run = toy()
    state, why = state_of(tmp_path / "toy", fingerprint(run.task))
    assert (state, why) == (State.OTHER, f"{tmp_path / 'toy'} holds no run: it has no run.json")
    with pytest.raises(ValueError, match="nothing was run"):
        check_all(plan([run], tmp_path), again=False)
    with pytest.raises(ValueError, match=r"it has no run\.json; give another --output, or empty it"):
        check_all(plan([run], tmp_path), again=True)
    with pytest.raises(ValueError, match="or empty it"):
        execute(run, tmp_path, quiet, again=True)
    assert (tmp_path / "toy" / "thesis.tex").read_text() == "years"


def test_what_a_run_did_not_write_stays_when_it_is_repeated(tmp_path):
    execute(toy(), tmp_path, quiet)
    (tmp_path / "toy" / "notes").mkdir()
    (tmp_path / "toy" / "notes" / "thesis.tex").write_text("years")
    assert execute(toy(scale=2.0), tmp_path, quiet, again=True).done == 4
    assert (tmp_path / "toy" / "notes" / "thesis.tex").read_text() == "years"


def test_the_runs_of_a_sweep_are_not_replaced_by_a_single_run(tmp_path):
    sweep = expand({"name": "toy", "task": TOY, "sweep": {"grid": {"scale": [1.0, 2.0]}}}, allow_code=True)
    run_all(plan(sweep, tmp_path), tmp_path, lambda planned: quiet)
    with pytest.raises(ValueError, match="holds the runs of a sweep, and this is a single run; give another --output"):
        execute(toy(), tmp_path, quiet, again=True)
    assert all(state_of(tmp_path / run.subfolder, fingerprint(run.task))[0] is State.FINISHED for run in sweep)


def in_the_layout_of_version_0_1_0(folder):
    """A finished folder as that version wrote it: no format, the fingerprint a hash, the lock left behind."""
    start = json.loads((folder / "run.json").read_text())
    del start["format"]
    (folder / "run.json").write_text(json.dumps(start | {"fingerprint": "0123456789abcdef"}, indent=2) + "\n")
    (folder / ".lock").touch()
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_of_version_0_1_0_is_refused_with_what_to_do(tmp_path):
    run, folder = toy(), tmp_path / "toy"
    execute(run, tmp_path, quiet)
    before = in_the_layout_of_version_0_1_0(folder)
    text = r"has the format of sparseopt 0\.1\.0.*finish or read it with the version that wrote it, or choose another"
    with pytest.raises(ValueError, match=rf"{text} folder; give another --output, or --again"):
        check_all(plan([run], tmp_path), again=False)
    with pytest.raises(ValueError, match=text):
        execute(run, tmp_path, quiet)
    with pytest.raises(ValueError, match=rf"cannot be read: .*{text}"):
        load_run(folder, allow_code=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert execute(run, tmp_path, quiet, again=True).done == 4


def test_a_failed_run_keeps_its_records_and_the_others_go_on(tmp_path):
    runs = expand({"name": "toy", "task": TOY, "sweep": {"list": [{"fail_at": 2}, {"scale": 3.0}]}}, allow_code=True)
    outcomes = run_all(plan(runs, tmp_path), tmp_path, lambda planned: quiet)
    assert "RuntimeError: the toy broke" in outcomes[0].error
    assert (outcomes[0].folder / "error.txt").read_text().startswith("unit-2: RuntimeError")
    assert len(records_in(outcomes[0].folder)[0]) == 2
    assert outcomes[1].error is None
    assert state_of(outcomes[0].folder, fingerprint(runs[0].task)) == (State.UNFINISHED, "")


def test_a_picture_that_cannot_be_drawn_fails_its_run_alone_and_is_drawn_later(tmp_path, monkeypatch):
    runs = expand({"name": "toy", "task": TOY, "sweep": {"grid": {"scale": [1.0, 2.0]}}}, allow_code=True)
    draw = runs_module.draw

    def broken(kind, finished, *rest):
        if finished[0].task.scale == 1:
            raise ValueError("no axis")
        return draw(kind, finished, *rest)

    monkeypatch.setattr(runs_module, "draw", broken)
    outcomes = run_all(plan(runs, tmp_path), tmp_path, lambda planned: quiet)
    assert [outcome.error for outcome in outcomes] == ["drawing: ValueError: no axis", None]
    assert (outcomes[0].folder / "error.txt").read_text() == "drawing: ValueError: no axis\n"
    monkeypatch.setattr(runs_module, "draw", draw)
    outcomes = run_all(plan(runs, tmp_path), tmp_path, lambda planned: quiet)
    assert [(outcome.error, outcome.done) for outcome in outcomes] == [(None, 0), (None, 0)]


def test_a_line_cut_in_the_middle_is_done_again_and_a_doubled_one_counts_once(tmp_path):
    log = tmp_path / "log"
    run = toy(log=str(log))
    execute(run, tmp_path, quiet)
    folder = tmp_path / "toy"
    (folder / "summary.json").unlink()
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text(lines[0] + lines[0] + lines[1] + lines[2][:9])
    assert execute(run, tmp_path, quiet).done == 2
    assert list(records_in(folder)[0]) == ["unit-0", "unit-1", "unit-2", "unit-3"]
    assert len(log.read_text().splitlines()) == 6


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("torn", ['{"unit": "un', "", '{"value": 3}', "[" * 100_000, "\x00\x85{"])
def test_a_torn_line_among_others_is_named_and_its_unit_alone_run_again(tmp_path, capsys, torn, finished):
    log = tmp_path / "log"
    runs = expand(
        {"name": "toy", "task": TOY, "log": str(log), "sweep": {"list": [{"scale": 2.0}, {"scale": 3.0}]}},
        allow_code=True,
    )
    shown = SweepProgress(2)

    def sweep():
        return run_all(plan(runs, tmp_path), tmp_path, lambda planned: quiet, ended=shown.ended)

    folder = sweep()[0].folder
    lines = (folder / "records.jsonl").read_text().split("\n")
    (folder / "records.jsonl").write_text("\n".join([lines[0], torn, *lines[2:]]))
    if finished:
        with pytest.raises(ValueError, match=r"line 2 of records.jsonl holds no record; `sparseopt run`"):
            load_run(folder, allow_code=True)
    else:
        (folder / "summary.json").unlink()
    outcomes = sweep()
    assert [(outcome.done, outcome.lost) for outcome in outcomes] == [(1, (2,)), (0, ())]
    assert log.read_text().splitlines()[8:] == ["2 unit-1"]
    assert [r["value"] for r in load_run(folder, allow_code=True).records] == [0, 4, 6, 2]
    said = " ".join(capsys.readouterr().out.split())
    assert f"line 2 of {folder / 'records.jsonl'} held no record; its unit was run again" in said


@pytest.mark.parametrize(
    ("whole_files", "left", "state"),
    [(0, {".run.json.tmp"}, State.NEW), (1, {"run.json", ".config.yaml.tmp"}, State.UNFINISHED)],
)
def test_a_start_killed_before_its_first_unit_is_made_good(tmp_path, monkeypatch, whole_files, left, state):
    replace, unlink, done = Path.replace, Path.unlink, []

    def kept(file, missing_ok=False):
        if file.suffix != ".tmp":  # who is killed clears nothing away
            unlink(file, missing_ok)

    def killed(file, target):
        if len(done) == whole_files:
            raise KeyboardInterrupt
        done.append(target)
        return replace(file, target)

    run, folder = toy(), tmp_path / "toy"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", kept)
        with pytest.raises(KeyboardInterrupt):
            execute(run, tmp_path, quiet)
    assert {file.name for file in folder.iterdir()} == left
    assert state_of(folder, fingerprint(run.task))[0] is state
    outcome = execute(run, tmp_path, quiet)
    assert (outcome.done, outcome.error) == (4, None)
    assert load_run(folder, allow_code=True).task == run.task
    assert not list(folder.glob(".*.tmp"))


def test_two_processes_never_share_a_folder(tmp_path):
    run = toy()
    held = []

    def observer(text, done, total):
        if not held:
            with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()}"):
                execute(run, tmp_path, quiet)
            held.append(text)

    execute(run, tmp_path, observer)
    assert held
    assert execute(run, tmp_path, quiet).done == 0


def test_shards_are_disjoint_and_complete():
    runs = expand({"name": "toy", "task": TOY, "sweep": {"grid": {"seed": list(range(7))}}}, allow_code=True)
    parts = [take_shard(runs, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(run.id for part in parts for run in part) == sorted(run.id for run in runs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(ValueError, match=r"--shard must be i/n"):
            take_shard(runs, wrong)


@pytest.mark.processes
def test_a_sweep_killed_again_and_again_loses_and_doubles_nothing(tmp_path):
    """SIGKILL after different numbers of records, twice within a write's reach of another; then a start to the end."""
    log, output, config = tmp_path / "log", tmp_path / "runs", tmp_path / "killed.yaml"
    values = {
        "name": "killed", "task": TOY, "count": 5, "pause": 0.04, "log": str(log),
        "sweep": {"grid": {"scale": [1.0, 2.0, 3.0]}},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "sparseopt", "run", str(config), "--output", str(output), "--allow-code"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def finished_units():
        return sum(len(records_in(f.parent)[0]) for f in output.rglob("records.jsonl"))

    for stop_at in (3, 8, 12):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        while finished_units() < stop_at and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "the sweep ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    survived = {
        (folder.parent.name, unit) for folder in output.rglob("records.jsonl") for unit in records_in(folder.parent)[0]
    }
    executions_before = Counter(log.read_text().splitlines())
    last = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    records = [json.loads(line) for f in output.rglob("records.jsonl") for line in f.read_text().splitlines()]
    assert Counter(r["unit"] for r in records) == {f"unit-{i}": 3 for i in range(5)}
    assert sorted(r["value"] for r in records) == sorted(s * i for s in (1, 2, 3) for i in range(5))
    assert len(list(output.rglob("summary.json"))) == 3
    executions = Counter(log.read_text().splitlines())
    for run, unit in survived:
        key = f"{run.removeprefix('scale=')} {unit}"
        assert executions[key] == executions_before[key], "a recorded unit was done again"
