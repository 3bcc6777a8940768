"""`sparseopt run CONFIG --distributed` in real processes: the results of one, a lost process, a different config."""

import json
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import yaml

from sparseopt.experiments.config import load_config
from sparseopt.experiments.runs import execute
from tests.experiments.inputs import WINDOWS, quiet, write_inputs
from tests.processes import free_port, start, wait

BLOCKS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, a text, and two configs: prune the model, and smooth a picture by Doge-ADMM."""
    folder = tmp_path_factory.mktemp("distributed")
    source, text = write_inputs(folder, num_hidden_layers=BLOCKS)
    texts = {"source": str(source), "calibration": text, "evaluation": text}
    prune = {"name": "prune", "task": "prune", **texts, **WINDOWS, "preset": "paper", "keep_model": True}
    picture = {"picture": {"name": "camera", "size": 40}}
    denoise = {"name": "denoise", "task": "denoise", **picture, "method": "doge", "tol": 1e-6}
    for values in (prune, denoise):
        (folder / f"{values['name']}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The records of one process."""

    def run(name):
        (planned,) = load_config(folder / f"{name}.yaml")
        outcome = execute(planned, folder / "alone", quiet)
        assert outcome.error is None
        return record(outcome.folder)

    return run


def record(run):
    (line,) = (run / "records.jsonl").read_text().splitlines()
    return json.loads(line)


def launched(config, output, *more):
    return [sys.executable, "-m", "sparseopt", "run", str(config), "--output", str(output), "--distributed", *more]


def together(count, config, output, folder, *more):
    return wait(start([launched(config, output, *more)] * count, folder, free_port()), folder)


def same_layers(found, wanted):
    """The same counts, errors alike to rounding, the same loss of the model."""
    assert [(line["layer"], line["zeros"], line["steps"]) for line in found["layers"]] == [
        (line["layer"], line["zeros"], line["steps"]) for line in wanted["layers"]
    ]
    ours, theirs = ([line["relative_error"] for line in each["layers"]] for each in (found, wanted))
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-3)


@pytest.mark.processes
def test_a_killed_process_ends_all_and_the_same_command_goes_on_behind_the_last_block(tmp_path, folder, alone, command):
    config, output = folder / "prune.yaml", tmp_path / "runs"
    running = start([launched(config, output)] * 4, tmp_path, free_port())
    model = output / "prune" / "model"
    until = time.monotonic() + 200
    while not list(model.glob("*block-0001*")) and time.monotonic() < until:
        assert all(process.poll() is None for process in running), (tmp_path / "err-0").read_text()
        time.sleep(0.02)
    running[2].kill()
    began = time.monotonic()
    ended = wait(running, tmp_path)
    assert time.monotonic() - began < 30
    assert [process.status for process in ended] == [1, 1, -signal.SIGKILL, 1]
    for index in (0, 1, 3):
        assert ended[index].err.count(f"error: process {index} of 4: another process has ended or was lost") == 1
        assert "Traceback" not in ended[index].err
    assert not (output / "prune" / "summary.json").exists()

    shutil.copytree(output, tmp_path / "one goes on")
    again = together(4, config, output, tmp_path)
    assert [process.status for process in again] == [0] * 4, again[0].err
    assert 1 <= json.loads((model / "summary.json").read_text())["resumed_blocks"] < BLOCKS
    same_layers(record(output / "prune"), alone("prune"))

    # So does one process.
    status, _, err = command("run", config, "--output", tmp_path / "one goes on")
    assert status == 0, err
    run = tmp_path / "one goes on" / "prune"
    summary = json.loads((run / "model" / "summary.json").read_text())
    assert 1 <= summary["resumed_blocks"] < BLOCKS
    assert summary["processes"] == 1
    same_layers(record(run), alone("prune"))


@pytest.mark.processes
def test_two_processes_share_a_pass_of_a_sweep(tmp_path, folder):
    values = yaml.safe_load((folder / "prune.yaml").read_text()) | {"preset": None, "keep_model": False}
    config, output = tmp_path / "sweep.yaml", tmp_path / "runs"
    sweep = {"grid": {"method": ["wanda", "magnitude"]}}
    config.write_text(yaml.safe_dump(values | {"sweep": sweep}))
    ended = together(2, config, output, tmp_path)
    assert [process.status for process in ended] == [0, 0], ended[0].err
    assert ended[0].out.count("done ") == 2
    for run in load_config(config):
        outcome = execute(run, tmp_path / "alone", quiet)
        same_layers(record(output / run.subfolder), record(outcome.folder))


@pytest.mark.processes
def test_a_fit_by_two_processes_is_that_of_one(tmp_path, folder, alone):
    output = tmp_path / "runs"
    ended = together(2, folder / "denoise.yaml", output, tmp_path)
    assert [process.status for process in ended] == [0, 0], ended[0].err
    # Only the first speaks.
    assert "done   denoise" in ended[0].out
    assert "denoise" not in ended[1].out
    found, wanted = record(output / "denoise"), alone("denoise")
    assert found["status"] == "CONVERGED"
    assert found["objective"] == pytest.approx(wanted["objective"], rel=2e-6)
    header = json.loads((output / "denoise" / "run.json").read_text())
    assert (header["devices"], header["processes"]) == ("all", 2)
    with np.load(output / "denoise" / "picture-repeat-0.npz") as ours:
        assert ours["fitted"].shape == (40, 40)


@pytest.mark.processes
def test_processes_with_another_setting_stop_before_any_work(tmp_path, folder):
    config, output = folder / "prune.yaml", tmp_path / "runs"
    commands = [launched(config, output, *(["sparsity=0.6"] if index == 1 else [])) for index in range(2)]
    ended = wait(start(commands, tmp_path, free_port()), tmp_path)
    assert [process.status for process in ended] == [2, 2]
    said = (
        "not all processes were given the same settings: process 1 of 2 and process 0 differ; start all with the same "
        "command, files and version"
    )
    assert all(said in process.err for process in ended)
    assert not output.exists()
