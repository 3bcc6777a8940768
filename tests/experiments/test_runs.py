"""Runs and `sparseopt run`: folders consistent at any time, resumable, never overwritten without `--again`, shared."""

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
from sparseopt.experiments.runs import check_all, execute, fingerprint, load_run, plan, records_in, run_all, state_of
from sparseopt.system.run_folder import FORMAT, LOCK, FolderInUse, State
from tests.experiments.inputs import TOY, quiet
from tests.system.pages import whole_page

ROOT = Path(__file__).parents[2]
ALLOW = ("--allow-package", "tests")
THREE = {"grid": {"scale": [1.0, 2.0, 3.0]}}


def toys(**fields):
    return expand({"name": "toy", "task": TOY, **fields}, allow_code=True)


def toy(**fields):
    (run,) = toys(**fields)
    return run


def start(runs, output):
    return run_all(plan(runs, output), output, lambda planned: quiet)


def files_in(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def run(tmp_path, command):
    """`sparseopt run` of toys with these values, into `tmp_path/runs`."""

    def run(*arguments, **values):
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump({"name": "toy", "title": "A toy", "task": TOY, **values}))
        return command("run", path, *ALLOW, "--output", tmp_path / "runs", *arguments)

    return run


def test_a_run_leaves_config_header_records_and_summary(tmp_path):
    outcome = execute(toy(seed=3), tmp_path, quiet)
    assert (outcome.error, outcome.done) == (None, 4)
    folder = tmp_path / "toy"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["count"] == 4
    assert config == expand(config, allow_code=True)[0].task.model_dump(mode="json", exclude_none=True)
    header = json.loads((folder / "run.json").read_text())
    assert (header["format"], header["seed"]) == (FORMAT, 3)
    assert "jax" in header["versions"]
    assert header["machine"]["cores"] == os.cpu_count()
    assert header["machine"]["processor"]
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["unit"] for r in records] == ["unit-0", "unit-1", "unit-2", "unit-3"]
    assert (records[2]["value"], records[2]["nothing"]) == (2, None)
    figures = json.loads((folder / "summary.json").read_text())["figures"]
    assert figures["value"] == {"mean": 1.5, "std": pytest.approx(1.25**0.5)}
    assert figures["kind"] == "toy"


def test_a_finished_run_is_kept_unless_asked_and_titles_do_not_count(tmp_path):
    log = tmp_path / "log"
    run = toy(log=str(log))
    assert [execute(run, tmp_path, quiet).done for _ in range(2)] == [4, 0]
    assert execute(toy(log=str(log), title="another title"), tmp_path, quiet).done == 0
    assert len(log.read_text().splitlines()) == 4
    # What a run did not write stays when it is repeated.
    (tmp_path / "toy" / "notes").mkdir()
    (tmp_path / "toy" / "notes" / "thesis.tex").write_text("years")
    assert execute(run, tmp_path, quiet, again=True).done == 4
    assert len(log.read_text().splitlines()) == 8
    assert (tmp_path / "toy" / "notes" / "thesis.tex").read_text() == "years"


# What stands in run.json of a folder with results, and what is said of it.
OLD = "finish or read it with the version that wrote it, or choose another folder"
UNUSABLE = {
    "other settings": (None, r"holds the results of other settings .*\(settings.scale: 2.0 there, 1.0 here\)"),
    "cut": ("{", "is not valid JSON"),
    "deep": ("[" * 100_000, "is not valid JSON"),
    "a list": ("[]", "holds no JSON object"),
    "version 0.1.0": ('{"fingerprint": "0123"}', f"has the format of sparseopt 0.1.0, and .* only format 3: {OLD}"),
    "format 2": ('{"format": 2, "fingerprint": {}}', f"has format 2, and this version reads only format 3: {OLD}"),
    "no fingerprint": ('{"format": 3}', "has format 3"),
}


@pytest.mark.parametrize(("start", "words"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_folder_with_other_results_is_refused_with_what_to_do_and_replaced_on_request(tmp_path, start, words):
    folder = tmp_path / "toy"
    execute(toy(scale=2.0), tmp_path, quiet)
    if start is not None:
        (folder / "run.json").write_text(start)
        with pytest.raises(ValueError, match=f"cannot be read: .*{words}"):
            load_run(folder, allow_code=True)
    before = files_in(folder)
    planned = plan([toy()], tmp_path)
    assert planned[0].state is State.OTHER
    for begin in (lambda: check_all(planned, again=False), lambda: execute(toy(), tmp_path, quiet)):
        with pytest.raises(ValueError, match=f"{words}.*; give another --output, or --again"):
            begin()
    assert files_in(folder) == before
    check_all(planned, again=True)
    assert execute(toy(), tmp_path, quiet, again=True).done == 4


def test_a_folder_of_something_else_or_of_a_sweep_is_never_touched(tmp_path):
    (tmp_path / "a" / "toy").mkdir(parents=True)
    (tmp_path / "a" / "toy" / "thesis.tex").write_text("years")
    sweep = toys(sweep=THREE)
    start(sweep, tmp_path / "b")
    for output, words in (
        (tmp_path / "a", "holds no run: it has no run.json"),
        (tmp_path / "b", "holds the runs of a sweep, and this is a single run"),
    ):
        planned = plan([toy()], output)
        assert (planned[0].state, planned[0].why) == (State.OTHER, f"{output / 'toy'} {words}")
        for again in (False, True):
            with pytest.raises(ValueError, match=f"(?s)nothing was run:.*{words}; give another --output, or empty it"):
                check_all(planned, again=again)
            with pytest.raises(ValueError, match=f"{words}; give another --output, or empty it"):
                execute(toy(), output, quiet, again=again)
    assert files_in(tmp_path / "a" / "toy") == {"thesis.tex": b"years"}
    assert all(state_of(tmp_path / "b" / run.subfolder, fingerprint(run.task))[0] is State.FINISHED for run in sweep)


@pytest.mark.parametrize("name", [LOCK, "records.jsonl"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_in_a_folder_is_not_written_through(tmp_path, name, exists):
    folder, target = tmp_path / "toy", tmp_path / "thesis.tex"
    folder.mkdir()
    if exists:
        target.write_text("years")
    (folder / name).symlink_to(target)
    with pytest.raises(ValueError, match=rf"has links to other places \({name}\), which no run creates"):
        execute(toy(), tmp_path, quiet, again=True)
    assert target.exists() == exists
    assert not exists or target.read_text() == "years"


def test_the_finished_runs_of_a_sweep_are_logged_once(tmp_path, run, trackers):
    for _ in range(2):
        assert run("--log", "mlflow", sweep=THREE)[0] == 0
    told = trackers["mlflow"]
    kinds = ["start_run", "log_params", "log_metrics", "log_artifact", "end_run"]
    assert [what for what, _ in told] == 3 * kinds
    assert told[0][1] == {"run_name": "scale=1"}
    assert told[1][1][0]["scale"] == 1.0
    summary = json.loads((tmp_path / "runs/toy/scale=1/summary.json").read_text())
    assert told[2][1][0] == {name: each["mean"] for name, each in summary["figures"].items() if isinstance(each, dict)}
    assert "A toy" in whole_page(tmp_path / "runs/toy/scale=1/report.html").words


def test_a_sweep_is_planned_shared_by_shards_kept_and_never_mixed_with_other_settings(tmp_path, run, command):
    status, out, _ = run("count=2", "--dry-run", sweep=THREE)
    assert (status, out.count("new")) == (0, 3)
    assert f"3 runs, in {tmp_path / 'runs' / 'toy'}, 0 finished" in out
    assert "cores" not in out
    assert not (tmp_path / "runs").exists()
    for shard, done in (("1/2", 2), ("2/2", 1)):
        status, out, _ = run("--shard", shard, sweep=THREE)
        assert (status, out.count("done")) == (0, done)
        assert f"(shard {shard})" in out
    status, out, _ = run(sweep=THREE)
    assert (status, out.count("kept")) == (0, 3)
    assert "3 runs, finished before" in out
    status, out, _ = command("report", tmp_path / "runs", *ALLOW, "--output", tmp_path / "report")
    assert status == 0
    assert "A toy" in out
    assert "3 ± 2.2" in out
    for place, name in (("report", "report"), ("runs/toy", "run")):
        page = whole_page(tmp_path / place / "report.html")
        assert [row[-1] for row in page.tables[0][1:]] == ["1.5 ± 1.1", "3 ± 2.2", "4.5 ± 3.4"]
        assert page.command.startswith(f"sparseopt {name} ")
    status, _, err = run("count=9", sweep=THREE)
    assert (status, err.count("holds the results of other settings")) == (2, 3)
    assert run("count=9", "--again", sweep=THREE)[0] == 0


def test_a_single_run_has_its_page_in_its_folder_also_without_matplotlib(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for more, kept in (([], 0), ([], 1), (["--again"], 0)):
        status, out, _ = run("count=2", *more)
        assert (status, out.count("kept ")) == (0, kept)
        page = whole_page(tmp_path / "runs" / "toy" / "report.html")
        assert page.tables == [[["value"], ["0.5 ± 0.5"]]]
        assert "figures: none, since matplotlib is not installed" in page.words
        assert page.command.endswith(" ".join(["count=2", *more]))


def test_shards_are_disjoint_and_complete():
    runs = toys(sweep={"grid": {"seed": list(range(7))}})
    parts = [runs_module.take_shard(runs, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(run.id for part in parts for run in part) == sorted(run.id for run in runs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(ValueError, match=r"--shard must be i/n"):
            runs_module.take_shard(runs, wrong)


def test_a_failed_run_keeps_its_records_and_the_others_go_on(tmp_path, run):
    sweep = {"list": [{"fail_at": 2}, {"scale": 3.0}]}
    status, out, err = run(sweep=sweep)
    assert status == 1
    assert (out.count("FAILED"), out.count("done")) == (1, 1)
    assert "RuntimeError: the toy broke" in out
    assert "1 of 2 runs failed" in err
    failed, other = toys(title="A toy", sweep=sweep)
    folder = tmp_path / "runs" / failed.subfolder
    assert (folder / "error.txt").read_text().startswith("unit-2: RuntimeError")
    assert len(records_in(folder)[0]) == 2
    assert state_of(folder, fingerprint(failed.task)) == (State.UNFINISHED, "")
    assert state_of(tmp_path / "runs" / other.subfolder, fingerprint(other.task))[0] is State.FINISHED


def test_a_picture_that_cannot_be_drawn_fails_its_run_alone_and_is_drawn_later(tmp_path, monkeypatch):
    runs, draw = toys(sweep={"grid": {"scale": [1.0, 2.0]}}), runs_module.draw

    def broken(kind, finished, *rest):
        if finished[0].task.scale == 1:
            raise ValueError("no axis")
        return draw(kind, finished, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(runs_module, "draw", broken)
        outcomes = start(runs, tmp_path)
    assert [outcome.error for outcome in outcomes] == ["drawing: ValueError: no axis", None]
    assert (outcomes[0].folder / "error.txt").read_text() == "drawing: ValueError: no axis\n"
    assert [(outcome.error, outcome.done) for outcome in start(runs, tmp_path)] == [(None, 0), (None, 0)]


# In place of the second line of four; a last line that was cut, and a line that stands twice.
TORN = {
    "cut": '{"unit": "un', "empty": "", "without its unit": '{"value": 3}', "deep": "[" * 100_000, "bytes": "\x00\x85{",
}  # fmt: skip


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("torn", [*TORN, "cut at the end"])
def test_a_torn_line_is_named_and_its_unit_alone_run_again(tmp_path, run, torn, finished):
    log = tmp_path / "log"
    sweep = {"log": str(log), "sweep": {"list": [{"scale": 2.0}, {"scale": 3.0}]}}
    run(**sweep)
    folder = tmp_path / "runs" / "toy" / "scale=2"
    lines = (folder / "records.jsonl").read_text().split("\n")
    among = torn in TORN
    lines = [lines[0], TORN[torn], *lines[2:]] if among else [lines[0], lines[0], *lines[1:3], lines[3][:9]]
    (folder / "records.jsonl").write_text("\n".join(lines))
    if not finished:
        (folder / "summary.json").unlink()
    elif among:
        with pytest.raises(ValueError, match=r"line 2 of records.jsonl holds no record; `sparseopt run`"):
            load_run(folder, allow_code=True)
    status, out, _ = run(**sweep)
    assert (status, out.count("done"), out.count("kept")) == (0, 1, 1)
    assert [row[0] for row in whole_page(folder.parent / "report.html").tables[0]] == ["scale", "2", "3"]
    number, unit = (2, 1) if among else (5, 3)
    assert f"line {number} of {folder / 'records.jsonl'} held no record; its unit was run again" in out
    assert log.read_text().splitlines()[8:] == [f"2 unit-{unit}"]
    # A line that stands twice counts once.
    assert [r["value"] for r in load_run(folder, allow_code=True).records] == ([0, 4, 6, 2] if among else [0, 2, 4, 6])


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
    assert state_of(folder, fingerprint(run.task))[0] is State.NEW
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
    run, held = toy(), []

    def observer(text, done, total):
        if not held:
            with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()} on .*; wait for it"):
                execute(run, tmp_path, quiet)
            held.append(text)

    execute(run, tmp_path, observer)
    assert held
    assert execute(run, tmp_path, quiet).done == 0


@pytest.mark.processes
def test_a_sweep_killed_again_and_again_loses_and_doubles_nothing(tmp_path):
    """SIGKILL after different numbers of records, twice within a write's reach of another; then a start to the end."""
    log, output, config = tmp_path / "log", tmp_path / "runs", tmp_path / "killed.yaml"
    values = {"name": "killed", "task": TOY, "count": 5, "pause": 0.04, "log": str(log), "sweep": THREE}
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
