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
from sparseopt.system.run_folder import FORMAT, LOCK, FolderInUse, State, claimed
from tests.experiments.inputs import TOY, quiet
from tests.experiments.toy import Toy
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


def test_a_run_leaves_config_header_records_and_summary_and_is_kept_unless_asked(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "toy"
    run = toy(seed=3, log=str(log))
    outcome = execute(run, tmp_path, quiet)
    assert (outcome.error, outcome.done) == (None, 4)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["count"] == 4
    assert config == expand(config, allow_code=True)[0].task.model_dump(mode="json", exclude_none=True)
    header = json.loads((folder / "run.json").read_text())
    assert (header["format"], header["seed"], header["devices"], header["processes"]) == (FORMAT, 3, 1, 1)
    assert "jax" in header["versions"]
    assert header["machine"]["cores"] == os.cpu_count()
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["unit"] for r in records] == ["unit-0", "unit-1", "unit-2", "unit-3"]
    assert (records[2]["value"], records[2]["nothing"]) == (2, None)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["units"] == 4
    assert summary["figures"]["value"] == {"mean": 1.5, "std": pytest.approx(1.25**0.5)}
    assert summary["figures"]["kind"] == "toy"
    # Titles do not count.
    for same in (run, toy(seed=3, log=str(log), title="another title")):
        assert execute(same, tmp_path, quiet).done == 0
    assert len(log.read_text().splitlines()) == 4
    # What a run did not write stays when it is repeated.
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.tex").write_text("years")
    assert execute(run, tmp_path, quiet, again=True).done == 4
    assert len(log.read_text().splitlines()) == 8
    assert (folder / "notes" / "thesis.tex").read_text() == "years"


# What stands in run.json of a folder with results, and what is said of it.
UNUSABLE = {
    "other settings": (None, r"other settings .*settings.scale: 2.0 there, 1.0 here"),
    "cut": ("{", "is not valid JSON"),
    "deep": ("[" * 100_000, "is not valid JSON"),
    "a list": ("[]", "holds no JSON object"),
    "version 0.1.0": ('{"fingerprint": "0123"}', "the format of sparseopt 0.1.0, .* only format 3"),
    "format 2": ('{"format": 2, "fingerprint": {}}', "format 2, .* only format 3"),
    "no fingerprint": ('{"format": 3}', "has format 3"),
}


@pytest.mark.parametrize(("text", "words"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_folder_with_other_results_is_refused_and_replaced_on_request(tmp_path, text, words):
    folder = tmp_path / "toy"
    execute(toy(scale=2.0), tmp_path, quiet)
    if text is not None:
        (folder / "run.json").write_text(text)
        with pytest.raises(ValueError, match=f"cannot be read: .*{words}"):
            load_run(folder, allow_code=True)
    before = files_in(folder)
    planned = plan([toy()], tmp_path)
    assert planned[0].state is State.OTHER
    for begin in (lambda: check_all(planned, again=False), lambda: execute(toy(), tmp_path, quiet)):
        with pytest.raises(ValueError, match=f"{words}.*--again"):
            begin()
    assert files_in(folder) == before
    check_all(planned, again=True)
    assert execute(toy(), tmp_path, quiet, again=True).done == 4


def test_a_folder_of_something_else_or_of_a_sweep_is_never_touched(tmp_path):
    (tmp_path / "a" / "toy").mkdir(parents=True)
    (tmp_path / "a" / "toy" / "thesis.tex").write_text("years")
    sweep = toys(sweep=THREE)
    start(sweep, tmp_path / "b")
    for name, words in (("a", "holds no run"), ("b", "runs of a sweep, and this is a single run")):
        planned = plan([toy()], tmp_path / name)
        assert (planned[0].state, words in planned[0].why) == (State.OTHER, True)
        for again in (False, True):
            with pytest.raises(ValueError, match=f"(?s)nothing was run:.*{words}.*or empty it"):
                check_all(planned, again=again)
            with pytest.raises(ValueError, match=f"{words}.*or empty it"):
                execute(toy(), tmp_path / name, quiet, again=again)
    assert files_in(tmp_path / "a" / "toy") == {"thesis.tex": b"years"}
    assert all(state_of(tmp_path / "b" / run.subfolder, fingerprint(run.task))[0] is State.FINISHED for run in sweep)


def test_a_folder_that_another_process_holds_or_that_has_links_is_not_written_to(tmp_path):
    folder, target = tmp_path / "toy", tmp_path / "thesis.tex"
    words = f"in use by process {os.getpid()} on "
    with claimed(folder), pytest.raises(FolderInUse, match=words):
        execute(toy(), tmp_path, quiet)
    target.write_text("years")
    folder.mkdir()
    for name, place in (("records.jsonl", target), (LOCK, tmp_path / "absent")):
        (folder / name).symlink_to(place)
        with pytest.raises(ValueError, match=rf"links to other places \({name}\)"):
            execute(toy(), tmp_path, quiet, again=True)
        (folder / name).unlink()
    assert (target.read_text(), (tmp_path / "absent").exists()) == ("years", False)


def test_the_finished_runs_of_a_sweep_are_logged_once(tmp_path, run, trackers):
    for _ in range(2):
        assert run("--log", "mlflow", sweep=THREE)[0] == 0
    told = trackers["mlflow"]
    kinds = ["start_run", "log_params", "log_metrics", "log_artifact", "end_run"]
    assert [what for what, _ in told] == 3 * kinds
    assert told[0][1] == {"run_name": "scale=1"}
    assert told[1][1][0]["scale"] == 1.0
    assert told[2][1][0] == {"value": 1.5}
    assert "A toy" in whole_page(tmp_path / "runs/toy/scale=1/report.html").words


def test_a_sweep_is_planned_shared_by_shards_kept_and_never_mixed_with_other_settings(tmp_path, run, command):
    status, out, _ = run("count=2", "--dry-run", sweep=THREE)
    assert (status, out.count("new")) == (0, 3)
    assert f"3 runs, in {tmp_path / 'runs' / 'toy'}, 0 finished" in out
    assert not (tmp_path / "runs").exists()
    for shard, done in (("1/2", 2), ("2/2", 1)):
        status, out, _ = run("--shard", shard, sweep=THREE)
        assert (status, out.count("done"), f"(shard {shard})" in out) == (0, done, True)
    status, out, _ = run(sweep=THREE)
    assert (status, out.count("kept"), "3 runs, finished before" in out) == (0, 3, True)
    status, out, _ = command("report", tmp_path / "runs", *ALLOW, "--output", tmp_path / "report")
    assert (status, "A toy" in out, "3 ± 2.2" in out) == (0, True, True)
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
        with pytest.raises(ValueError, match=f"--shard must be i/n.*given '{wrong}'"):
            runs_module.take_shard(runs, wrong)


def test_a_failed_run_keeps_its_records_and_the_others_go_on(tmp_path, run, monkeypatch):
    def broken(runs):
        if runs[0].task.scale == 2:
            raise ValueError("no axis")
        return {}

    sweep = {"list": [{"fail_at": 2}, {"scale": 2.0}, {"scale": 3.0}]}
    failed, undrawn, other = toys(title="A toy", sweep=sweep)
    with monkeypatch.context() as patch:
        patch.setattr(Toy, "draw", broken)
        status, out, err = run(sweep=sweep)
    assert (status, out.count("FAILED"), out.count("done")) == (1, 2, 1)
    assert "RuntimeError: the toy broke" in out
    assert "2 of 3 runs failed" in err
    folder = tmp_path / "runs" / failed.subfolder
    assert (folder / "error.txt").read_text().startswith("unit-2: RuntimeError")
    assert len(records_in(folder)[0]) == 2
    assert state_of(folder, fingerprint(failed.task)) == (State.UNFINISHED, "")
    # A figure is drawn later.
    told = tmp_path / "runs" / undrawn.subfolder / "error.txt"
    assert told.read_text() == "drawing: ValueError: no axis\n"
    outcomes = start([undrawn, other], tmp_path / "runs")
    assert [(outcome.error, outcome.done) for outcome in outcomes] == [(None, 0), (None, 0)]
    assert not told.exists()


# In place of the second line of four; a last line that was cut, and a line that stands twice.
TORN = {"cut": '{"unit": "un', "empty": "", "without its unit": '{"value": 3}', "deep": "[" * 100_000, "bytes": "\x00{"}


@pytest.mark.parametrize(("torn", "finished"), [*((torn, True) for torn in TORN), ("cut", False), ("at the end", True)])
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
        with pytest.raises(ValueError, match=r"line 2 of records.jsonl holds no record"):
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
    ("left", "state"), [({".run.json.tmp"}, State.NEW), ({"run.json", ".config.yaml.tmp"}, State.UNFINISHED)]
)
def test_a_start_killed_before_its_first_unit_is_made_good(tmp_path, left, state):
    run, folder = toy(), tmp_path / "toy"
    execute(run, tmp_path, quiet)
    for file in folder.iterdir():
        if file.name not in left:
            file.unlink()
    for name in left - {"run.json"}:
        (folder / name).write_text("cut")
    assert state_of(folder, fingerprint(run.task))[0] is state
    outcome = execute(run, tmp_path, quiet)
    assert (outcome.done, outcome.error) == (4, None)
    assert load_run(folder, allow_code=True).task == run.task
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.processes
def test_a_sweep_killed_again_and_again_loses_and_doubles_nothing(tmp_path):
    """SIGKILL after different numbers of records, twice within a write's reach of another; then a start to the end."""
    log, output, config = tmp_path / "log", tmp_path / "runs", tmp_path / "killed.yaml"
    values = {"name": "killed", "task": TOY, "count": 5, "pause": 0.04, "log": str(log), "sweep": THREE}
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "sparseopt", "run", str(config), "--output", str(output), "--allow-code"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def finished_units():
        files = output.rglob("records.jsonl")
        return {f"{f.parent.name.removeprefix('scale=')} {unit}" for f in files for unit in records_in(f.parent)[0]}

    for stop_at in (3, 8, 12):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        while len(finished_units()) < stop_at and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "the sweep ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    survived, before = finished_units(), Counter(log.read_text().splitlines())
    last = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    records = [json.loads(line) for f in output.rglob("records.jsonl") for line in f.read_text().splitlines()]
    assert Counter(r["unit"] for r in records) == {f"unit-{i}": 3 for i in range(5)}
    assert sorted(r["value"] for r in records) == sorted(s * i for s in (1, 2, 3) for i in range(5))
    assert len(list(output.rglob("summary.json"))) == 3
    after = Counter(log.read_text().splitlines())
    assert [key for key in survived if after[key] != before[key]] == [], "a recorded unit was done again"
