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
pytestmark = pytest.mark.processes


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


def alone(folder, name):
    """The record of one process."""
    (planned,) = load_config(folder / f"{name}.yaml")
    return record(execute(planned, folder / "alone", quiet).folder)


def record(run):
    (line,) = (run / "records.jsonl").read_text().splitlines()
    return json.loads(line)


def begun(config, output, folder, *more):
    """A process for each tuple of further arguments."""
    call = [sys.executable, "-m", "sparseopt", "run", str(config), "--output", str(output), "--distributed"]
    return start([[*call, *arguments] for arguments in more], folder, free_port())


def test_a_killed_process_ends_all_and_the_same_command_goes_on_behind_the_last_block(tmp_path, folder, done):
    config, output, whole = folder / "prune.yaml", tmp_path / "runs", alone(folder, "prune")
    running = begun(config, output, tmp_path, *[()] * 4)
    until = time.monotonic() + 200
    while not list((output / "prune" / "model").glob("*block-0001*")) and time.monotonic() < until:
        assert all(process.poll() is None for process in running), (tmp_path / "err-0").read_text()
        time.sleep(0.02)
    running[2].kill()
    ended = wait(running, tmp_path)
    assert [process.status for process in ended] == [1, 1, -signal.SIGKILL, 1]
    told = [("another process has ended or was lost" in each.err, "Traceback" in each.err) for each in ended]
    assert told[:2] + told[3:] == [(True, False)] * 3
    assert not (output / "prune" / "summary.json").exists()
    shutil.copytree(output, tmp_path / "one")

    again = wait(begun(config, output, tmp_path, *[()] * 4), tmp_path)
    assert [process.status for process in again] == [0] * 4, again[0].err
    # So does one process.
    done("run", config, "--output", tmp_path / "one")
    for place, processes in ((output, 4), (tmp_path / "one", 1)):
        summary = json.loads((place / "prune" / "model" / "summary.json").read_text())
        assert (1 <= summary["resumed_blocks"] < BLOCKS, summary["processes"]) == (True, processes)
        found = record(place / "prune")
        # The same counts, errors alike to rounding, the same loss of the model.
        counts = [[(line["layer"], line["zeros"], line["steps"]) for line in each["layers"]] for each in (found, whole)]
        assert counts[0] == counts[1]
        ours, theirs = ([line["relative_error"] for line in each["layers"]] for each in (found, whole))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3)
        assert found["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-3)


def test_a_fit_by_two_processes_is_that_of_one(tmp_path, folder):
    output = tmp_path / "runs"
    ended = wait(begun(folder / "denoise.yaml", output, tmp_path, (), ()), tmp_path)
    assert [process.status for process in ended] == [0, 0], ended[0].err
    # Only the first speaks.
    assert ["denoise" in process.out for process in ended] == [True, False]
    found, wanted = record(output / "denoise"), alone(folder, "denoise")
    assert found["status"] == "CONVERGED"
    assert found["objective"] == pytest.approx(wanted["objective"], rel=2e-6)
    header = json.loads((output / "denoise" / "run.json").read_text())
    assert (header["devices"], header["processes"]) == ("all", 2)
    with np.load(output / "denoise" / "picture-repeat-0.npz") as ours:
        assert ours["fitted"].shape == (40, 40)


def test_processes_with_another_setting_stop_before_any_work(tmp_path, folder):
    output = tmp_path / "runs"
    ended = wait(begun(folder / "prune.yaml", output, tmp_path, (), ("sparsity=0.6",)), tmp_path)
    assert [process.status for process in ended] == [2, 2]
    said = "not all processes were given the same settings: process 1 of 2 and process 0 differ"
    assert all(said in process.err for process in ended)
    assert not output.exists()
