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
from sparseopt.models import open_model
from sparseopt.pruning import audit_pattern, audit_sparsity, perplexity
from sparseopt.pruning.recipe.shrink_recipe import parameters_of
from sparseopt.pruning.text.windows import text_windows
from tests.experiments.inputs import quiet, watch_runs
from tests.pruning.whole_runs import model_bytes

CAPPED = {"name": "tests.experiments.toy.CappedL1"}
# Runs by what a record calls them; two measure the gradients of the dense model.
PRUNED = {
    "dense": {"method": "dense"},
    "wanda": {"method": "wanda", "window_choice": "random"},
    "sparsegpt": {"method": "sparsegpt", "output_weights": "gradient"},
    "wanda 2:4": {"method": "wanda", "pattern": "2:4", "output_weights": "gradient"},
    "magnitude": {"method": "magnitude", "keep_model": False, "sparsity": 0.25},
    "Wanda": {"method": "sparseopt.pruning.Wanda", "sparsity": 0.25, "bos": "yes"},
    "maiht tuned CappedL1(weight=1)": {"penalty": CAPPED | {"weight": 1.0}, "sparsity": 0.25},
}
LAYER = "model.layers.1.mlp.up_proj"


def together(runs, output, observer=quiet):
    planned = plan(runs, output)
    check_all(planned, again=False)
    return run_all(planned, output, lambda p: observer)


@pytest.fixture(scope="module")
def prune(settings):
    """All cases as the runs of one sweep."""
    values = {**settings, "task": "prune", "keep_model": True, "sweep": {"list": list(PRUNED.values())}}
    return dict(zip(PRUNED, expand(values, allow_code=True), strict=True))


@pytest.fixture(scope="module")
def sweep(prune, tmp_path_factory):
    """The outcome of each case, run in one sweep."""
    return dict(zip(PRUNED, together(list(prune.values()), tmp_path_factory.mktemp("sweep")), strict=True))


def record_of(outcome):
    return records_in(outcome.folder)[0]["model"]


@pytest.mark.parametrize("case", PRUNED)
def test_a_run_has_its_exact_sparsity_its_record_and_its_model_on_request(sweep, case):
    outcome, wanted = sweep[case], PRUNED[case].get("sparsity", 0.5)
    assert (outcome.error, outcome.done) == (None, 1)
    record, folder = record_of(outcome), outcome.folder / "model"
    assert (record["label"], record["bos"]) == (case, 1 if "bos" in PRUNED[case] else None)
    assert record["perplexity"] > 1
    if case == "dense":
        assert record["sparsity"] == 0
        return
    assert (record["sparsity"], record["unconverged"], len(record["layers"])) == (wanted, 0, 21)
    assert (outcome.folder / "layer-errors.png").is_file()
    assert folder.exists() == (case != "magnitude")
    if folder.exists():
        assert {audit.sparsity for audit in audit_sparsity(open_model(folder))} == {wanted}
    assert record["stored_bytes"] == record["dense_bytes"]
    if case == "wanda 2:4":
        assert all(audit.exact for audit in audit_pattern(folder, "2:4"))


def test_a_report_gathers_the_sweep_and_draws_perplexity(sweep):
    (section,) = gather([sweep["dense"].folder.parent], ["tests"])
    rows = {record["label"]: record for run in section.runs for record in run.records}
    assert rows["sparsegpt"]["mean_relative_error"] < rows["wanda"]["mean_relative_error"]
    axes = type(section.runs[0].task).draw(section.runs)["perplexity"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes[0].get_lines()}
    assert lines.keys() == rows.keys()
    assert lines["sparsegpt"] == [[50, rows["sparsegpt"]["perplexity"]]]


def test_a_start_killed_while_it_prunes_or_before_it_scores_goes_on_from_there(tmp_path, prune, sweep, monkeypatch):
    kept = shutil.copytree(sweep["wanda"].folder, tmp_path / prune["wanda"].subfolder)
    for name in ("records.jsonl", "summary.json"):
        (kept / name).unlink()
    made = [file.stat().st_mtime_ns for file in sorted((kept / "model").iterdir())]
    runs, pruned = [prune["wanda"], prune["sparsegpt"]], watch_runs(monkeypatch)
    assert execute(prune["wanda"], tmp_path, quiet).done == 1

    def killed(text, done, total):
        if "block 2/3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(runs, tmp_path, killed)
    assert [file.stat().st_mtime_ns for file in sorted((kept / "model").iterdir())] == made
    assert record_of(sweep["wanda"]) | {"unit_seconds": 0} == records_in(kept)[0]["model"] | {"unit_seconds": 0}
    outcomes = together(runs, tmp_path)
    assert pruned == [("wanda", 0.5), ("sparsegpt", 0.5), ("sparsegpt", 0.5)]
    assert [outcome.done for outcome in outcomes] == [0, 1]
    assert json.loads((outcomes[1].folder / "model" / "summary.json").read_text())["resumed_blocks"] == 2
    assert model_bytes(outcomes[1].folder / "model") == model_bytes(sweep["sparsegpt"].folder / "model")


@pytest.fixture(scope="module")
def shrink(settings):
    return {**settings, "task": "shrink", "method": "wanda", "multiple": 8, "train_epochs": 0}


def test_a_sweep_over_shapes_reports_perplexity_by_size(tmp_path, shrink):
    kept = {"layers": 0.67, "keep_model": True}
    sweep = {"list": [{"method": "dense"}, {"channels": 0.75}, {"channels": 0.5}, kept]}
    outcomes = together(expand({**shrink, "sweep": sweep}), tmp_path)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    (section,) = gather([tmp_path])
    found = {(r["label"], r["channels"]): r for run in section.runs for r in run.records}
    whole = [("dense", 32), ("wanda channels", 24), ("wanda channels", 16)]
    shapes = {key: (r["kv_heads"], r["blocks"], r["experts"]) for key, r in found.items()}
    assert shapes == dict.fromkeys(whole, (4, 3, None)) | {("wanda layers", 32): (4, 2, None)}
    dense, most, half, shorter = map(record_of, outcomes)
    # A channel is a row of gate and up and a column of down, in three blocks of width 32.
    assert dense["parameters"] - most["parameters"] == most["parameters"] - half["parameters"] == 8 * 3 * 32 * 3
    assert (len(shorter["removed"]), dense["removed"]) == (1, [])
    assert min(record["perplexity"] for record in found.values()) > 1
    assert 0 < most["mean_relative_error"] < half["mean_relative_error"]
    axis = type(section.runs[0].task).draw(section.runs)["perplexity"]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("parameters (millions)", "perplexity", "log")
    lines = {line.get_label(): line.get_xdata() for line in axis.get_lines()}
    assert lines.keys() == {"dense", "wanda channels", "wanda layers"}
    assert list(lines["wanda channels"]) == [half["parameters"] / 1e6, most["parameters"] / 1e6]
    assert (outcomes[1].folder / "layer-errors.png").is_file()
    assert not (outcomes[1].folder / "model").exists()
    # The model is kept on request. Without layers there are no errors to draw.
    made = open_model(outcomes[3].folder / "model")
    ids, _ = text_windows(made.source, shrink["evaluation"], "evaluation", 2, 48)
    assert shorter["perplexity"] == perplexity(made, ids)
    assert (shorter["layers"], shorter["parameters"]) == ([], parameters_of(made))
    assert not list(outcomes[3].folder.glob("*.png"))


def test_descent_is_monotone_and_acceleration_ends_lower(tmp_path, settings):
    fields = {name: settings[name] for name in ("name", "source", "calibration", "windows", "seqlen")}
    (run,) = expand({**fields, "task": "maiht_descent.Descent", "layer": LAYER, "steps": 60}, allow_code=True)
    outcome = execute(run, tmp_path, quiet)
    assert outcome.error is None
    records = {r["solver"]: r for r in records_in(outcome.folder)[0].values()}
    assert records["maiht"]["objective"] <= records["iht"]["objective"]
    for solver in records.values():
        history = np.load(outcome.folder / f"history-{solver['unit']}.npz")["objective"]
        assert len(history) == 61
        # Rounding of the objective in float32.
        assert np.diff(history).max() <= 1e-5 * history[0]
    assert (outcome.folder / f"descent-{LAYER}.png").is_file()
    (section,) = gather([outcome.folder], allow_code=True)
    assert [row.labels for row in section.rows] == [{"solver": "maiht"}, {"solver": "iht"}]


# What the model or the texts cannot do: a task, the runs of a sweep, and what is said of them, each once.
LONG = {"seqlen": 257, "evaluation_windows": 900, "pattern": "3:7"}
WORDS = ["divisible by 7", "257 tokens is longer than the 256", "900 windows of 48", "model at /none", "no BOS token"]
# Without quotes, yes is a truth value in YAML 1.1.
LACKING = [*({"method": method, **LONG} for method in ("dense", "wanda")), {"source": "/none"}, {"bos": True}]
REFUSED = [
    ("prune", LACKING, WORDS),
    ("shrink", [{"layers": 0.5}, {"experts": 0.5}], ["layers 0.5 would keep 1.5 of 3", "experts 0.5 is for mixtures"]),
    ("maiht_descent.Descent", [{"layer": LAYER[:-1], "steps": n} for n in (6, 7)], [f"did you mean '{LAYER}'"]),
]


@pytest.mark.parametrize(("task", "runs", "mistakes"), REFUSED)
def test_what_model_or_texts_cannot_do_is_named_once_and_first(tmp_path, settings, command, task, runs, mistakes):
    source = shutil.copytree(settings["source"], tmp_path / "source")
    (source / "tokenizer_config.json").write_text('{"bos_token": null}')
    kind, given = find_task(task, allow_code=True), settings | {"task": task, "source": str(source)}
    fields = {name: value for name, value in given.items() if name in kind.model_fields}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**fields, "sweep": {"list": runs}}))
    status, _, err = command("run", tmp_path / "tiny.yaml", "--output", tmp_path / "runs", "--allow-code")
    assert (status, "nothing was run: " in err) == (2, True)
    assert [err.count(mistake) for mistake in mistakes] == [1] * len(mistakes), err
    assert not (tmp_path / "runs").exists()


def test_the_texts_count_in_a_fingerprint(tmp_path, settings, monkeypatch):
    """ "pydoc" is another text in another version of Python, and a file can be edited; no model is opened for it."""
    from pydoc_data.topics import topics

    file = tmp_path / "text.txt"
    file.write_text("a line\n" * 10)
    # The dense model reads no calibration text.
    cases = [{"calibration": "pydoc"}, {"calibration": f"file:{file}"}, {"method": "dense", "calibration": "pydoc"}]

    def marks(**fields):
        (run,) = expand({**settings, "task": "prune", "source": "nobody/nothing", "evaluation": "pydoc", **fields})
        return fingerprint(run.task)

    def same():
        return [marks(**case) == mark for case, mark in zip(cases, before, strict=True)]

    before = [marks(**case) for case in cases]
    file.write_text("a line\n" * 9 + "edited\n")  # the half that is evaluated
    assert same() == [True, True, True]
    file.write_text("edited\n" + "a line\n" * 9)
    assert same() == [True, False, True]
    monkeypatch.setitem(topics, "assert", "Said otherwise in another version.\n")
    assert same() == [False, False, True]
    monkeypatch.setitem(topics, "assignment", "This too.\n")
    assert same() == [False, False, False]
    # What cannot be read is said by `check`; a data set on the hub is not fetched to see what is planned.
    assert marks(calibration="file:/nowhere") != marks(calibration="hf:nobody/nothing")


def test_a_model_that_changed_is_another_input(tmp_path, settings, monkeypatch):
    def mark(source):
        (run,) = expand({**settings, "task": "prune", "source": str(source)})
        return run.task.inputs()["source"]

    folder = Path(shutil.copytree(settings["source"], tmp_path / "mine"))
    before = mark(folder)
    assert mark(folder) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert mark(folder) != before
    # On the hub a model is its commit, which the cache keeps.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "cache" / "models--lab--tiny"
    (kept / "refs").mkdir(parents=True)
    for sha in ("a" * 40, "b" * 40):
        shutil.copytree(folder, kept / "snapshots" / sha)
        (kept / "refs" / "main").write_text(sha)
        assert mark("lab/tiny") == sha
    assert mark(f"lab/tiny@{'a' * 40}") == "a" * 40


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
    with pytest.raises(ValueError, match=r"calibration text: .*no column 'text'.* body"):
        wrong.task.check()
