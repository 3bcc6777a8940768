"""The tasks `prune`, `shrink` and the descent of configs/papers on a tiny model: alone, in a sweep, resumed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

from sparseopt.experiments.config import expand
from sparseopt.experiments.report import gather
from sparseopt.experiments.runs import check_all, execute, fingerprint, plan, records_in, run_all
from sparseopt.experiments.task import find_task
from sparseopt.models import open_model, sizes_of
from sparseopt.pruning import ShrinkRecipe, audit_pattern, audit_sparsity, perplexity, shrink_model
from sparseopt.pruning.base.records import Passed
from sparseopt.pruning.text.windows import text_windows
from tests.experiments.inputs import quiet, watch_runs, write_inputs
from tests.models.files.test_hub import store
from tests.models.tiny import random_tensors, tiny_config

METHODS = ["wanda", "sparsegpt", "admm", "best"]
QUARTER = {"sparsity": 0.25}
PRUNED = {
    **{method: {"method": method} for method in ("dense", *METHODS)},
    "with BOS": {"method": "dense", "bos": "yes"},
    "other windows": {"method": "wanda", "window_choice": "random"},
    "pattern": {"method": "wanda", "pattern": "2:4"},
    "not kept": {"method": "magnitude", "keep_model": False, **QUARTER},
    "by path": {"method": "sparseopt.pruning.Wanda", **QUARTER},
    "own penalty": {"penalty": {"name": "tests.experiments.toy.CappedL1", "weight": 1.0}, **QUARTER},
}
LABELS = {
    "with BOS": "dense", "other windows": "wanda", "pattern": "wanda 2:4",
    "not kept": "magnitude", "by path": "Wanda", "own penalty": "maiht tuned CappedL1(weight=1)",
}  # fmt: skip
# What differs between runs of the same settings.
TIMES = {"unit_seconds", "seconds", "peak_memory_bytes", "layers"} | {
    f"{part}_seconds" for part in ("solver", "survey", "reconstruction", "compile")
}


@pytest.fixture(scope="module")
def prune(settings):
    """All cases as the runs of one sweep."""
    values = {**settings, "task": "prune", "keep_model": True, "sweep": {"list": list(PRUNED.values())}}
    return dict(zip(PRUNED, expand(values, allow_code=True), strict=True))


ALONE = ["dense", *METHODS, "other windows"]


@pytest.fixture(scope="module")
def alone(prune, tmp_path_factory):
    """The outcome of each case, run by itself or, those that nothing is compared with, in one sweep."""
    folder = tmp_path_factory.mktemp("alone")
    outcomes = {case: execute(prune[case], folder, quiet) for case in ALONE}
    others = [case for case in PRUNED if case not in ALONE]
    planned = plan([prune[case] for case in others], folder)
    check_all(planned, again=False)
    return outcomes | dict(zip(others, run_all(planned, folder, lambda p: quiet), strict=True))


def record_of(outcome):
    return records_in(outcome.folder)[0]["model"]


def models(outcomes):
    """The bytes of the shards of each run's model."""
    folders = [outcome.folder / "model" for outcome in outcomes]
    return [{file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))} for folder in folders]


@pytest.mark.parametrize("case", PRUNED)
def test_a_run_has_its_exact_sparsity_its_record_and_its_model_on_request(alone, case):
    outcome, wanted = alone[case], PRUNED[case].get("sparsity", 0.5)
    assert (outcome.error, outcome.done) == (None, 1)
    record, model = record_of(outcome), outcome.folder / "model"
    assert record["label"] == LABELS.get(case, case)
    assert record["perplexity"] > 1
    assert record["bos"] == (1 if case == "with BOS" else None)
    if record["label"] == "dense":
        assert record["sparsity"] == 0
        return
    assert record["sparsity"] == wanted
    assert (record["unconverged"], len(record["layers"])) == (0, 21)
    assert (outcome.folder / "layer-errors.png").is_file()
    assert model.exists() == (case != "not kept")
    if model.exists():
        assert {audit.sparsity for audit in audit_sparsity(open_model(model))} == {wanted}
    assert record["stored_bytes"] == record["dense_bytes"]
    if case == "pattern":
        assert all(audit.exact for audit in audit_pattern(model, "2:4"))


def test_a_report_gathers_the_sweep_and_draws_perplexity(alone):
    (section,) = gather([alone["dense"].folder.parent], ["tests"])
    rows = {record["label"]: record for run in section.runs for record in run.records}
    assert rows["Wanda"]["mean_relative_error"] < rows["magnitude"]["mean_relative_error"]
    axes = type(section.runs[0].task).draw(section.runs)["perplexity"]
    assert {line.get_label() for line in axes[0].get_lines()} >= {"magnitude", "Wanda"}
    assert record_of(alone["with BOS"])["perplexity"] != record_of(alone["dense"])["perplexity"]


def test_a_start_killed_between_pruning_and_scoring_scores_the_model_as_it_is(tmp_path, prune, alone):
    folder = shutil.copytree(alone["wanda"].folder, tmp_path / prune["wanda"].subfolder)
    made = [file.stat().st_mtime_ns for file in sorted((folder / "model").iterdir())]
    for name in ("records.jsonl", "summary.json"):
        (folder / name).unlink()
    outcome = execute(prune["wanda"], tmp_path, quiet)
    assert (outcome.error, outcome.done) == (None, 1)
    assert [file.stat().st_mtime_ns for file in sorted((folder / "model").iterdir())] == made
    assert record_of(outcome) | {"unit_seconds": 0} == record_of(alone["wanda"]) | {"unit_seconds": 0}


def test_runs_of_one_model_and_text_are_what_each_is_alone(tmp_path, prune, alone, monkeypatch):
    """They measure the dense model once."""
    planned = plan([prune[case] for case in ALONE], tmp_path)
    pruned = watch_runs(monkeypatch)
    together = run_all(planned, tmp_path, lambda p: quiet)
    assert pruned == [(method, 0.5) for method in [*METHODS, "wanda"]]
    assert [(outcome.error, outcome.done) for outcome in together] == [(None, 1)] * 6
    assert models(together) == models(alone[case] for case in ALONE)
    for ours, case in zip(together, ALONE, strict=True):
        one, other = record_of(ours), record_of(alone[case])
        assert one | dict.fromkeys(TIMES) == other | dict.fromkeys(TIMES)
    pruned.clear()
    run_all(plan([prune[case] for case in ALONE], tmp_path), tmp_path, lambda p: quiet)
    assert pruned == []


def test_a_sweep_that_was_killed_resumes_and_finished_runs_take_no_part(tmp_path, prune, alone, monkeypatch):
    runs = [prune[method] for method in METHODS[:3]]
    shutil.copytree(alone["wanda"].folder, tmp_path / prune["wanda"].subfolder)
    pruned = watch_runs(monkeypatch)

    def killed(text, done, total):
        if "block 2/3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(plan(runs, tmp_path), tmp_path, lambda p: killed)
    outcomes = run_all(plan(runs, tmp_path), tmp_path, lambda p: quiet)
    assert pruned == [("sparsegpt", 0.5), ("sparsegpt", 0.5), ("admm", 0.5)]
    assert [outcome.done for outcome in outcomes] == [0, 1, 1]
    summaries = [json.loads((outcome.folder / "model" / "summary.json").read_text()) for outcome in outcomes]
    assert [summary["resumed_blocks"] for summary in summaries] == [0, 2, 0]
    assert models(outcomes) == models(alone[method] for method in METHODS[:3])


def test_a_run_that_breaks_fails_alone(tmp_path, prune, alone, monkeypatch):
    runs = [prune[method] for method in METHODS[:3]]

    def broken(recipe, event):
        if event == Passed(1, 3) and recipe.method == "sparsegpt":
            raise RuntimeError("the layer broke")

    with monkeypatch.context() as patch:
        watch_runs(patch, observe=broken)
        outcomes = run_all(plan(runs, tmp_path), tmp_path, lambda p: quiet)
    assert [outcome.error for outcome in outcomes] == [None, "model: RuntimeError: the layer broke", None]
    outcomes = run_all(plan(runs, tmp_path), tmp_path, lambda p: quiet)
    assert [(outcome.error, outcome.done) for outcome in outcomes] == [(None, 0), (None, 1), (None, 0)]
    assert models(outcomes) == models(alone[method] for method in METHODS[:3])


@pytest.fixture(scope="module")
def shrink(settings):
    return {**settings, "task": "shrink", "method": "wanda", "multiple": 8}


def test_a_sweep_over_shapes_reports_perplexity_by_size(tmp_path, shrink):
    all_three = {"channels": 0.75, "heads": 0.5, "layers": 0.67}
    sweep = {"list": [{"method": "dense"}, {"channels": 0.75}, {"channels": 0.5}, all_three]}
    planned = plan(expand({**shrink, "sweep": sweep}), tmp_path)
    check_all(planned, again=False)
    outcomes = run_all(planned, tmp_path, lambda p: quiet)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    (section,) = gather([tmp_path])
    found = {(r["label"], r["channels"]): r for run in section.runs for r in run.records}
    assert {key: (r["kv_heads"], r["blocks"], r["experts"]) for key, r in found.items()} == {
        ("dense", 32): (4, 3, None),
        ("wanda channels", 24): (4, 3, None),
        ("wanda channels", 16): (4, 3, None),
        ("wanda channels+heads+layers", 24): (2, 2, None),
    }
    dense, most, half, other = map(record_of, outcomes)
    # A channel is a row of gate and up and a column of down, in three blocks of width 32.
    assert dense["parameters"] - most["parameters"] == most["parameters"] - half["parameters"] == 8 * 3 * 32 * 3
    assert (len(other["removed"]), dense["removed"]) == (1, [])
    assert min(record["perplexity"] for record in found.values()) > 1
    assert 0 < most["mean_relative_error"] < half["mean_relative_error"]
    axis = type(section.runs[0].task).draw(section.runs)["perplexity"]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("parameters (millions)", "perplexity", "log")
    lines = {line.get_label(): line.get_xdata() for line in axis.get_lines()}
    assert set(lines) == {"dense", "wanda channels", "wanda channels+heads+layers"}
    assert list(lines["wanda channels"]) == [half["parameters"] / 1e6, most["parameters"] / 1e6]
    assert (outcomes[1].folder / "layer-errors.png").is_file()
    assert not (outcomes[1].folder / "model").exists()


def test_the_figures_are_those_of_shrink_model_and_the_model_is_kept_on_request(tmp_path, shrink):
    (run,) = expand({**shrink, "layers": 0.67, "train_epochs": 0, "keep_model": True})
    outcome = execute(run, tmp_path / "runs", quiet)
    assert outcome.error is None
    record = record_of(outcome)
    fields = {name: shrink[name] for name in ("method", "calibration", "windows", "seqlen", "heldout_windows")}
    report = shrink_model(shrink["source"], tmp_path / "out", ShrinkRecipe(layers=0.67, train_epochs=0, **fields))
    made = open_model(tmp_path / "out")
    ids, _ = text_windows(made.source, shrink["evaluation"], "evaluation", 2, 48)
    assert record["perplexity"] == perplexity(made, ids)
    assert record["removed"] == list(report.shape.removed)
    assert record["layers"] == []
    assert record["stored_bytes"] == report.stored_bytes
    assert sizes_of(open_model(outcome.folder / "model")) == sizes_of(made)
    # Without layers there are no errors to draw.
    assert not list(outcome.folder.glob("*.png"))


def test_descent_is_monotone_and_acceleration_ends_lower(tmp_path, settings):
    layer = "model.layers.1.mlp.up_proj"
    fields = {name: settings[name] for name in ("name", "source", "calibration", "windows", "seqlen")}
    (run,) = expand({**fields, "task": "maiht_descent.Descent", "layer": layer, "steps": 60}, allow_code=True)
    outcome = execute(run, tmp_path, quiet)
    assert outcome.error is None
    records = {r["solver"]: r for r in records_in(outcome.folder)[0].values()}
    assert records["maiht"]["objective"] <= records["iht"]["objective"]
    for solver in records.values():
        history = np.load(outcome.folder / f"history-{solver['unit']}.npz")["objective"]
        assert len(history) == 61
        # Rounding of the objective in float32.
        assert np.diff(history).max() <= 1e-5 * history[0]
    assert (outcome.folder / f"descent-{layer}.png").is_file()
    (section,) = gather([outcome.folder], allow_code=True)
    assert [row.labels for row in section.rows] == [{"solver": "maiht"}, {"solver": "iht"}]


# What the model or the texts cannot do: the runs of a sweep, and what is said of them, each once.
LONG = {"seqlen": 257, "evaluation_windows": 900, "pattern": "3:7"}
LAYER = "model.layers.1.mlp.up_pro"
REFUSED = [
    (
        {"task": "prune"},
        [{"method": method, **LONG} for method in ("dense", "wanda", "magnitude")] + [{"source": "/none"}],
        [
            "q_proj: pattern '3:7' needs a number of inputs divisible by 7",
            "calibration text: a window of 257 tokens is longer than the 256 positions",
            "evaluation text: the second half of file:", "900 windows of 48 tokens need", "no model at /none",
        ],
    ),
    (
        {"task": "shrink"},
        [{"method": "dense"}, {"channels": 0.75, "multiple": 8, "layers": 0.5}, {"experts": 0.5}],
        ["layers 0.5 would keep 1.5 of 3 blocks", "experts 0.5 is for mixtures"],
    ),
    ({"task": "maiht_descent.Descent"}, [{"layer": LAYER}, {"layer": LAYER, "steps": 7}], [f"did you mean '{LAYER}j'"]),
]  # fmt: skip


@pytest.mark.parametrize(("task", "runs", "mistakes"), REFUSED)
def test_what_the_model_or_the_texts_cannot_do_is_named_once_before_any_work(
    tmp_path, settings, command, task, runs, mistakes
):
    kind = find_task(task["task"], allow_code=True)
    fields = {name: value for name, value in settings.items() if name in kind.model_fields}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**fields, **task, "sweep": {"list": runs}}))
    status, _, err = command("run", tmp_path / "tiny.yaml", "--output", tmp_path / "runs", "--allow-code")
    assert status == 2
    assert "nothing was run: " in err
    assert [err.count(mistake) for mistake in mistakes] == [1] * len(mistakes), err
    assert not (tmp_path / "runs").exists()


def test_the_dense_model_reads_no_calibration_text(settings):
    fields = {"task": "prune", "method": "dense", "windows": 900, "calibration": "file:/nowhere"}
    (dense,) = expand({**settings, **fields})
    dense.task.check()


def test_the_texts_count_in_a_fingerprint(tmp_path, settings, monkeypatch):
    """ "pydoc" is another text in another version of Python, and a file can be edited; no model is opened for it."""
    from pydoc_data.topics import topics

    file = tmp_path / "text.txt"
    file.write_text("a line\n" * 10)

    def marks(**fields):
        (run,) = expand({**settings, "task": "prune", "source": "nobody/nothing", "evaluation": "pydoc", **fields})
        return fingerprint(run.task)

    fields = [{"calibration": "pydoc"}, {"calibration": f"file:{file}"}, {"method": "dense"}]
    before = [marks(**each) for each in fields]
    assert [marks(**each) for each in fields] == before
    file.write_text("a line\n" * 9 + "edited\n")
    assert [marks(**each) == mark for each, mark in zip(fields, before, strict=True)] == [True, True, True]
    file.write_text("edited\n" + "a line\n" * 9)
    assert [marks(**each) == mark for each, mark in zip(fields, before, strict=True)] == [True, False, True]
    monkeypatch.setitem(topics, "assert", "Said otherwise in another version.\n")
    assert [marks(**each) == mark for each, mark in zip(fields, before, strict=True)] == [False, False, True]
    monkeypatch.setitem(topics, "assignment", "This too.\n")
    assert marks(**fields[2]) != before[2]
    # What cannot be read is said by `check`; a data set on the hub is not fetched to see what is planned.
    assert marks(calibration="file:/nowhere") != marks(calibration="hf:nobody/nothing")


def test_a_model_that_changed_is_another_input(tmp_path, settings, monkeypatch):
    def marks(source):
        (run,) = expand({**settings, "task": "prune", "source": str(source)})
        return run.task.inputs()["source"]

    folder = Path(shutil.copytree(settings["source"], tmp_path / "mine"))
    before = marks(folder)
    assert marks(folder) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert marks(folder) != before
    # On the hub a model is its commit.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    tensors = random_tensors(tiny_config(), np.random.default_rng(0))
    for sha in ("a" * 40, "b" * 40):
        store(tmp_path / "cache", tensors, sha=sha)
        assert marks("lab/tiny") == sha
    assert marks(f"lab/tiny@{'a' * 40}") == "a" * 40


def test_the_evaluation_reads_the_text_of_the_calibration_in_the_same_way(tmp_path, settings):
    text = f"jsonl:{tmp_path / 'rows.jsonl'}"
    (tmp_path / "rows.jsonl").write_text('{"body": "the quick brown fox jumps over the lazy dog again"}\n' * 60)
    fields = {"task": "prune", "method": "wanda", "calibration": text, "column": "body", "documents": "separate"}
    (other,), (same,) = expand({**settings, **fields}), expand({**settings, **fields, "evaluation": text})
    alike = {"split": None, "column": "body", "documents": "separate"}
    assert [run.task.reading("evaluation") for run in (other, same)] == [{}, alike]
    for run in (other, same):
        run.task.check()
        assert run.task.inputs().keys() == {"source", "calibration", "evaluation"}
    (wrong,) = expand({**settings, **fields, "column": "text"})
    with pytest.raises(ValueError, match=r"calibration text: .*has no column 'text'; its columns are body"):
        wrong.task.check()


def test_a_model_without_bos_cannot_be_asked_for_it(tmp_path, settings):
    source, _ = write_inputs(tmp_path)
    (source / "tokenizer_config.json").write_text('{"bos_token": null}')
    for method in ("dense", "wanda"):
        fields = {**settings, "task": "prune", "source": str(source), "method": method}
        # Without quotes yes and no are truth values in YAML 1.1.
        (asked,), (without,) = (expand({**fields, "bos": yaml.safe_load(text)}) for text in ("yes", "no"))
        with pytest.raises(ValueError, match="has no BOS token"):
            asked.task.check()
        without.task.check()
