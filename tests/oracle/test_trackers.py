"""`sparseopt run --log` with MLflow and Weights & Biases themselves: what they have stored is read back."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.experiments.inputs import TOY

pytestmark = pytest.mark.oracle


@pytest.fixture
def logged(tmp_path, command, monkeypatch):
    """Run a sweep of two toys with a tracker, without a network; gives their folders by name."""
    monkeypatch.chdir(tmp_path)
    config = {"name": "toy", "title": "A toy", "task": TOY, "sweep": {"grid": {"scale": [1.0, 2.0]}}}
    Path("toy.yaml").write_text(yaml.safe_dump(config))

    def run(tracker: str) -> dict[str, Path]:
        status, _, err = command("run", "toy.yaml", "--allow-package", "tests", "--output", "runs", "--log", tracker)
        assert status == 0, err
        assert "nothing more is logged" not in err
        return {f"scale={scale}": tmp_path / "runs" / "toy" / f"scale={scale}" for scale in (1, 2)}

    return run


def means(folder: Path) -> dict[str, float]:
    """The figures of a run that are numbers, as its summary has them."""
    figures = json.loads((folder / "summary.json").read_text())["figures"]
    return {name: each["mean"] for name, each in figures.items() if isinstance(each, dict)}


def test_mlflow_stores_settings_figures_and_the_page_of_each_run(tmp_path, logged, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more than mlflow-skinny
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    mlflow = pytest.importorskip("mlflow", reason="SKIPPED: needs mlflow (make test-oracle)")
    folders = logged("mlflow")
    client: Any = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("Default").experiment_id
    stored = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert stored.keys() == folders.keys()
    for name, run in stored.items():
        assert run.info.status == "FINISHED"
        assert float(run.data.params["scale"]) == float(name.removeprefix("scale="))
        assert run.data.metrics == pytest.approx(means(folders[name]))
        page = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="report.html")
        assert Path(page).read_bytes() == (folders[name] / "report.html").read_bytes()


def wandb_records(file: Path) -> Iterator[Any]:
    """What a run without a network has written: messages in the log format of LevelDB, behind a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:  # the end of a block
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a message whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb_stores_settings_figures_and_the_page_of_each_run(tmp_path, logged, monkeypatch):
    pytest.importorskip("wandb", reason="SKIPPED: needs wandb (make test-oracle)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folders, stored = logged("wandb"), {}
    for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):
        records = {each.WhichOneof("record_type"): each for each in wandb_records(file)}
        stored[records["run"].run.display_name] = records
    assert stored.keys() == folders.keys()
    for name, records in stored.items():
        assert records["run"].run.project == "sparseopt"
        config = {each.key: json.loads(each.value_json) for each in records["run"].run.config.update}
        assert config["scale"] == float(name.removeprefix("scale="))
        history = {each.nested_key[0]: json.loads(each.value_json) for each in records["history"].history.item}
        assert {key: value for key, value in history.items() if key[0] != "_"} == pytest.approx(means(folders[name]))
        (page,) = records["artifact"].artifact.manifest.contents
        assert (page.path, page.size) == ("report.html", (folders[name] / "report.html").stat().st_size)
        assert records["exit"].exit.exit_code == 0
