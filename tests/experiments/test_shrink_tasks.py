"""The task `shrink` end to end on a tiny model."""

import json
from pathlib import Path

import pytest

from sparseopt.experiments.config import ConfigError, expand, load_config
from sparseopt.experiments.report import gather
from sparseopt.experiments.runs import check_all, execute, plan, run_all
from sparseopt.models import open_model, sizes_of
from sparseopt.pruning import ShrinkRecipe, perplexity, shrink_model
from sparseopt.pruning.text.windows import text_windows
from tests.experiments.test_prune_tasks import quiet


@pytest.fixture
def shrink(settings):
    return {
        **settings, "task": "shrink", "evaluation": settings["calibration"], "evaluation_windows": 2,
        "evaluation_seqlen": 32, "heldout_windows": 2, "method": "wanda", "multiple": 16,
    }  # fmt: skip


def test_a_sweep_reports_perplexity_by_size(tmp_path, shrink):
    sweep = {"list": [{"method": "dense"}, {"channels": 0.75}, {"channels": 0.5}, {"layers": 0.67, "heads": 0.5}]}
    output = tmp_path / "runs"
    planned = plan(expand({**shrink, "sweep": sweep}), output)
    check_all(planned, again=False)
    outcomes = run_all(planned, output, lambda p: quiet)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    (section,) = gather([output])
    found = {(r["label"], r["channels"]): r for run in section.runs for r in run.records}
    assert {key: (r["kv_heads"], r["blocks"], r["experts"]) for key, r in found.items()} == {
        ("dense", 64): (2, 3, None),
        ("wanda channels", 48): (2, 3, None),
        ("wanda channels", 32): (2, 3, None),
        ("wanda heads+layers", 64): (1, 2, None),
    }
    kinds = (("dense", 64), ("wanda channels", 48), ("wanda channels", 32), ("wanda heads+layers", 64))
    dense, most, half, other = (found[kind] for kind in kinds)
    # A channel is a row of gate and up and a column of down, in three blocks of width 32.
    assert dense["parameters"] - most["parameters"] == most["parameters"] - half["parameters"] == 16 * 3 * 32 * 3
    assert len(other["removed"]) == 1
    assert dense["removed"] == []
    assert min(record["perplexity"] for record in found.values()) > 1
    assert 0 < most["mean_relative_error"] < half["mean_relative_error"]
    axis = type(section.runs[0].task).draw(section.runs)["perplexity"]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("parameters (millions)", "perplexity", "log")
    lines = {line.get_label(): line.get_xdata() for line in axis.get_lines()}
    assert set(lines) == {"dense", "wanda channels", "wanda heads+layers"}
    assert list(lines["wanda channels"]) == [half["parameters"] / 1e6, most["parameters"] / 1e6]
    assert (outcomes[1].folder / "layer-errors.png").is_file()
    assert not (outcomes[1].folder / "model").exists()


def test_the_figures_are_those_of_shrink_model_and_the_model_is_kept_on_request(tmp_path, shrink):
    (run,) = expand({**shrink, "layers": 0.67, "train_epochs": 0, "keep_model": True})
    outcome = execute(run, tmp_path / "runs", quiet)
    assert outcome.error is None
    record = json.loads((outcome.folder / "records.jsonl").read_text())
    fields = {name: shrink[name] for name in ("method", "calibration", "windows", "seqlen", "heldout_windows")}
    report = shrink_model(shrink["source"], tmp_path / "out", ShrinkRecipe(layers=0.67, train_epochs=0, **fields))
    made = open_model(tmp_path / "out")
    ids, _ = text_windows(made.source, shrink["evaluation"], "evaluation", 2, 32)
    assert record["perplexity"] == perplexity(made, ids)
    assert record["removed"] == list(report.shape.removed)
    assert record["layers"] == []
    assert record["stored_bytes"] == report.stored_bytes
    assert sizes_of(open_model(outcome.folder / "model")) == sizes_of(made)
    # Without layers there are no errors to draw.
    assert not list(outcome.folder.glob("*.png"))


def test_what_the_model_cannot_have_ends_a_run_before_any_work(tmp_path, shrink):
    sweep = {"list": [{"method": "dense"}, {"channels": 0.75, "layers": 0.5}, {"experts": 0.5}]}
    with pytest.raises(ValueError, match=r"layers 0.5 would keep 1.5 of 3 blocks[\s\S]*experts 0.5 is for mixtures"):
        check_all(plan(expand({**shrink, "sweep": sweep}), tmp_path / "runs"), again=False)
    assert not (tmp_path / "runs").exists()
    for fields, message in (
        ({}, "nothing would go"),
        ({"channel": 0.5}, "did you mean 'channels'?"),
        ({"channels": 1.5}, "channels: input should be less than or equal to 1, given 1.5"),
        ({"method": "wunda"}, "did you mean 'wanda'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            expand({**shrink, **fields})
        assert message in str(caught.value)


def test_the_project_s_config_is_a_sweep_over_channels():
    runs = load_config(Path(__file__).parents[2] / "configs" / "shrink.yaml")
    assert [(run.task.label, run.task.channels) for run in runs] == [
        ("dense", 1.0), ("best channels", 0.75), ("best channels", 0.5),
    ]  # fmt: skip


def test_a_budget_of_time_is_refused_with_what_to_use(shrink):
    with pytest.raises(ConfigError, match="latency: has ended: `parameters` is the budget of a smaller model"):
        expand({**shrink, "latency": 0.8})
