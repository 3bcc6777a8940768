"""The task `prune` end to end on a tiny model, with a custom penalty and a custom method."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

from sparseopt.experiments.config import ConfigError, expand
from sparseopt.experiments.report import gather
from sparseopt.experiments.runs import check_all, execute, fingerprint, plan, records_in, run_all
from sparseopt.experiments.tasks import model as model_task
from sparseopt.pruning import audit_pattern, audit_sparsity, prune_models
from sparseopt.pruning.base.records import Passed
from tests.models.files.test_hub import store
from tests.models.tiny import random_tensors, tiny_config


@pytest.fixture
def prune(settings):
    text = settings["calibration"]
    return {
        **settings, "task": "prune", "evaluation": text, "evaluation_windows": 2, "evaluation_seqlen": 32,
        "heldout_windows": 2,
    }  # fmt: skip


def quiet(text, done, total):
    del done, total, text


def test_a_sweep_over_methods_reports_perplexity_and_exact_sparsity(tmp_path, prune):
    sweep = {
        "list": [
            {"method": "dense"},
            {"method": "magnitude"},
            {"method": "sparseopt.pruning.Wanda"},
            {"penalty": {"name": "tests.experiments.toy.CappedL1", "weight": 1.0}},
        ]
    }
    output = tmp_path / "runs"
    planned = plan(expand({**prune, "sparsity": 0.25, "sweep": sweep}, allow_code=True), output)
    check_all(planned, again=False)
    outcomes = run_all(planned, output, lambda p: quiet)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    (section,) = gather([output], ["tests"])
    rows = {record["label"]: record for run in section.runs for record in run.records}
    assert set(rows) == {"dense", "magnitude", "Wanda", "maiht tuned CappedL1(weight=1)"}
    assert rows["dense"]["sparsity"] == 0
    for label in rows.keys() - {"dense"}:
        assert rows[label]["sparsity"] == 0.25
        assert rows[label]["perplexity"] > 0
        assert rows[label]["unconverged"] == 0
        assert len(rows[label]["layers"]) == 21
    assert rows["Wanda"]["mean_relative_error"] < rows["magnitude"]["mean_relative_error"]
    axes = type(section.runs[0].task).draw(section.runs)["perplexity"]
    assert {line.get_label() for line in axes[0].get_lines()} >= {"magnitude", "Wanda"}
    assert (outcomes[1].folder / "layer-errors.png").is_file()
    assert not (outcomes[1].folder / "model").exists()


def test_the_model_is_kept_on_request(tmp_path, prune):
    (run,) = expand({**prune, "method": "magnitude", "keep_model": True})
    outcome = execute(run, tmp_path, quiet)
    from sparseopt.models import open_model

    assert {audit.sparsity for audit in audit_sparsity(open_model(outcome.folder / "model"))} == {0.5}

    # A start that was killed between pruning and scoring: the model is scored as it is.
    record = json.loads((outcome.folder / "records.jsonl").read_text())
    made = [file.stat().st_mtime_ns for file in sorted((outcome.folder / "model").iterdir())]
    for name in ("records.jsonl", "summary.json"):
        (outcome.folder / name).unlink()
    assert execute(run, tmp_path, quiet).error is None
    assert [file.stat().st_mtime_ns for file in sorted((outcome.folder / "model").iterdir())] == made
    again = json.loads((outcome.folder / "records.jsonl").read_text())
    assert again | {"unit_seconds": 0} == record | {"unit_seconds": 0}


def test_a_kept_model_is_packed_on_request(tmp_path, prune):
    (run,) = expand({**prune, "method": "magnitude", "keep_model": True, "pack": True})
    outcome = execute(run, tmp_path, quiet)
    assert outcome.error is None
    record = json.loads((outcome.folder / "records.jsonl").read_text())
    assert record["stored_bytes"] < record["dense_bytes"]
    assert (outcome.folder / "model" / "model.packed.index.json").is_file()


def test_a_pattern_reaches_the_weights(tmp_path, prune):
    (run,) = expand({**prune, "method": "wanda", "pattern": "2:4", "keep_model": True})
    assert run.task.pattern == "2:4"
    assert run.task.label == "wanda 2:4"
    outcome = execute(run, tmp_path, quiet)
    assert outcome.error is None
    assert all(audit.exact for audit in audit_pattern(outcome.folder / "model", "2:4"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"method": "wunda"}, "did you mean 'wanda'?"),
        ({"method": "sparseopt.pruning.Wonda"}, "did you mean 'Wanda'?"),
        ({"sparsity": 1.0}, "sparsity: input should be less than 1, given 1.0"),
        ({"pattern": "2:x"}, "  pattern: unknown pattern '2:x'; known are 'unstructured'"),
        ({"pattern": "1:4", "sparsity": 0.5}, "  pattern: pattern '1:4' has sparsity 0.75, which contradicts"),
        ({"preset": "pape"}, "did you mean 'paper'?"),
    ],
)
def test_mistakes_are_named(prune, fields, expected):
    with pytest.raises(ConfigError) as caught:
        expand({**prune, **fields})
    assert expected in str(caught.value)


def test_the_texts_count_in_a_fingerprint(tmp_path, prune, monkeypatch):
    """ "pydoc" is another text in another version of Python, and a file can be edited; no model is opened for it."""
    from pydoc_data.topics import topics

    file = tmp_path / "text.txt"
    file.write_text("a line\n" * 10)

    def marks(**fields):
        (run,) = expand({**prune, "source": "nobody/nothing", "evaluation": "pydoc", **fields})
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


def test_a_model_that_changed_is_another_input(tmp_path, prune, monkeypatch):
    def marks(source):
        (run,) = expand({**prune, "source": str(source)})
        return run.task.inputs()["source"]

    folder = Path(shutil.copytree(prune["source"], tmp_path / "mine"))
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


def test_the_evaluation_reads_the_text_of_the_calibration_in_the_same_way(tmp_path, prune):
    text = f"jsonl:{tmp_path / 'rows.jsonl'}"
    (tmp_path / "rows.jsonl").write_text('{"body": "the quick brown fox jumps over the lazy dog again"}\n' * 60)
    fields = {"method": "wanda", "calibration": text, "column": "body", "documents": "separate"}
    (other,), (same,) = expand({**prune, **fields}), expand({**prune, **fields, "evaluation": text})
    alike = {"split": None, "column": "body", "documents": "separate"}
    assert [run.task.reading("evaluation") for run in (other, same)] == [{}, alike]
    for run in (other, same):
        run.task.check()
        assert run.task.inputs().keys() == {"source", "calibration", "evaluation"}
    (wrong,) = expand({**prune, **fields, "column": "text"})
    with pytest.raises(ValueError, match=r"calibration text: .*has no column 'text'; its columns are body"):
        wrong.task.check()


def test_what_is_missing_is_found_before_any_run(tmp_path, prune):
    runs = expand({**prune, "sweep": {"grid": {"source": [str(tmp_path / "none"), prune["source"]]}}})
    with pytest.raises(ValueError, match="none"):
        check_all(plan(runs, tmp_path / "runs"), again=False)
    assert not (tmp_path / "runs").exists()


def test_what_the_model_or_the_texts_cannot_do_ends_a_run_before_any_work(tmp_path, prune, command):
    sweep = {"list": [{"method": "dense"}, {"method": "wanda"}, {"method": "magnitude"}]}
    long = {"seqlen": 257, "evaluation_windows": 900, "pattern": "3:7", "sweep": sweep}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**prune, **long}))
    status, _, err = command("run", tmp_path / "tiny.yaml", "--output", tmp_path / "runs")
    assert status == 2
    assert "nothing was run: " in err
    for mistake in (
        "q_proj: pattern '3:7' needs a number of inputs divisible by 7",
        "calibration text: a window of 257 tokens is longer than the 256 positions",
        f"evaluation text: the second half of {prune['evaluation']}: 900 windows of 32 tokens need",
    ):
        assert err.count(mistake) == 1
    assert not (tmp_path / "runs").exists()
    (dense,) = expand({**prune, "method": "dense", "windows": 900, "calibration": "file:/nowhere"})
    dense.task.check()  # it reads no calibration text


def test_every_window_begins_with_bos_where_the_config_says_yes(tmp_path, prune):
    # Without quotes yes and no are truth values in YAML 1.1.
    fields = {**prune, "method": "dense", "bos": yaml.safe_load("yes")}
    (behind,), (without,) = expand(fields), expand({**fields, "bos": yaml.safe_load("no")})
    assert (behind.task.bos, without.task.bos) == ("yes", "no")
    behind.task.check()
    outcomes = [execute(run, tmp_path / run.task.bos, quiet) for run in (behind, without)]
    records = [json.loads((outcome.folder / "records.jsonl").read_text()) for outcome in outcomes]
    assert [record["bos"] for record in records] == [1, None]
    assert records[0]["perplexity"] != records[1]["perplexity"]
    (tmp_path / "source" / "tokenizer_config.json").write_text('{"bos_token": null}')
    with pytest.raises(ValueError, match="has no BOS token"):
        behind.task.check()
    (layer,) = expand({**fields, "bos": "yes", "method": "wanda"})
    with pytest.raises(ValueError, match="has no BOS token"):
        layer.task.check()
    with pytest.raises(ConfigError, match="bos"):
        expand({**fields, "bos": "always"})


def models(outcomes):
    """The bytes of the shards of each run's model."""
    folders = [outcome.folder / "model" for outcome in outcomes]
    return [{file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))} for folder in folders]


def watch_passes(monkeypatch):
    """The methods in each call of `prune_models`, in order."""
    passes = []

    def watched(source, recipes, **others):
        passes.append([recipe.method for recipe, _ in recipes])
        return prune_models(source, recipes, **others)

    monkeypatch.setattr(model_task, "prune_models", watched)
    return passes


METHODS = ["wanda", "sparsegpt", "admm"]


def test_runs_of_one_model_and_text_share_a_pass_and_are_what_each_is_alone(tmp_path, prune, monkeypatch):
    """Method best sees variants of the windows that the others see."""
    methods = [*METHODS, "best"]
    items = [{"method": "dense"}, *({"method": method} for method in methods), {"method": "wanda", "seqlen": 16}]
    runs = expand({**prune, "keep_model": True, "sweep": {"list": items}})
    alone = [execute(run, tmp_path / "alone", quiet) for run in runs]
    passes = watch_passes(monkeypatch)
    together = run_all(plan(runs, tmp_path / "together"), tmp_path / "together", lambda p: quiet)
    # The last has other windows.
    assert passes == [methods, ["wanda"]]
    assert [(outcome.error, outcome.apart, outcome.done) for outcome in together] == [(None, None, 1)] * 6
    assert models(together) == models(alone)
    of_time = {"unit_seconds", "seconds", "peak_memory_bytes", "layers"}
    of_time |= {f"{part}_seconds" for part in ("solver", "survey", "reconstruction", "compile")}
    for ours, theirs in zip(together, alone, strict=True):
        one, other = (records_in(outcome.folder)[0]["model"] for outcome in (ours, theirs))
        assert one | dict.fromkeys(of_time) == other | dict.fromkeys(of_time)
    passes.clear()
    run_all(plan(runs, tmp_path / "together"), tmp_path / "together", lambda p: quiet)
    assert passes == []


def test_a_pass_that_was_killed_resumes_and_finished_runs_take_no_part(tmp_path, prune, monkeypatch):
    runs = expand({**prune, "keep_model": True, "sweep": {"grid": {"method": METHODS}}})
    alone = [execute(run, tmp_path / "alone", quiet) for run in runs]
    output = tmp_path / "together"
    shutil.copytree(alone[1].folder, output / runs[1].subfolder)
    passes = watch_passes(monkeypatch)

    def killed(text, done, total):
        if "block 2/3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(plan(runs, output), output, lambda p: killed)
    outcomes = run_all(plan(runs, output), output, lambda p: quiet)
    assert passes == [["wanda", "admm"], ["wanda", "admm"]]
    assert [outcome.done for outcome in outcomes] == [1, 0, 1]
    summaries = [json.loads((outcome.folder / "model" / "summary.json").read_text()) for outcome in outcomes]
    assert [(summary["resumed_blocks"], summary["plans"]) for summary in summaries] == [(2, 2), (0, 1), (2, 2)]
    assert models(outcomes) == models(alone)


def test_a_run_that_breaks_a_shared_pass_fails_alone(tmp_path, prune, monkeypatch):
    runs = expand({**prune, "keep_model": True, "sweep": {"grid": {"method": METHODS}}})
    alone = [execute(run, tmp_path / "alone", quiet) for run in runs]

    def broken(source, recipes, *, observer, **others):
        def told(event, done, total):
            if event == Passed(1, 3) and any(recipe.method == "sparsegpt" for recipe, _ in recipes):
                raise RuntimeError("the layer broke")
            observer(event, done, total)

        return prune_models(source, recipes, observer=told, **others)

    with monkeypatch.context() as patch:
        patch.setattr(model_task, "prune_models", broken)
        outcomes = run_all(plan(runs, tmp_path), tmp_path, lambda p: quiet)
    assert [outcome.error for outcome in outcomes] == [None, "model: RuntimeError: the layer broke", None]
    assert [outcome.apart for outcome in outcomes] == ["RuntimeError: the layer broke", None, None]
    summary = json.loads((outcomes[2].folder / "model" / "summary.json").read_text())
    assert (summary["resumed_blocks"], summary["plans"]) == (2, 1)
    outcomes = run_all(plan(runs, tmp_path), tmp_path, lambda p: quiet)
    assert [(outcome.error, outcome.done) for outcome in outcomes] == [(None, 0), (None, 1), (None, 0)]
    assert models(outcomes) == models(alone)
