"""Comparisons: the figures of the table equal those of separate runs; cells are kept, added, refused."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sparseopt.experiments import comparison, plots, runs
from sparseopt.experiments.config import ConfigError
from sparseopt.experiments.tasks import model as model_task
from sparseopt.models import encode_text, load_tokenizer, open_model
from sparseopt.pruning import Recipe, audit_sparsity, load_text, perplexity, prune_model, prune_models, token_windows
from tests.experiments.test_plots import drawn, texts
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.test_pipeline import TOKENIZER

TEXT = "the quick brown fox jumps over the lazy dog, and then the dog tells the fox all about it.\n" * 60
METHODS, SPARSITIES, PATTERNS = ["wanda", "magnitude"], [0.7, 0.25], ["unstructured", "2:4"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """One block of linears of one shape: few programs to compile."""
    folder = tmp_path_factory.mktemp("comparison")
    config = tiny_config(num_hidden_layers=1, intermediate_size=32, num_key_value_heads=4)
    source = write_folder(folder / "source", config, random_tensors(config, np.random.default_rng(3)))
    (source / "tokenizer.json").write_text(TOKENIZER)
    (folder / "text.txt").write_text(TEXT)
    text = f"file:{folder / 'text.txt'}"
    return {
        "source": str(source), "calibration": text, "windows": 3, "seqlen": 32, "heldout_windows": 2,
        "evaluation": text, "evaluation_windows": 2, "evaluation_seqlen": 48,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, compared(output, settings)[0]


@pytest.fixture
def pruned(monkeypatch):
    """The methods by which models were made, in order."""
    made = []

    def counting(source, recipes, **others):
        made.extend(recipe.method for recipe, folder in recipes if not (folder / "summary.json").is_file())
        return prune_models(source, recipes, **others)

    monkeypatch.setattr(model_task, "prune_models", counting)
    return made


def compared(output, settings, methods=METHODS, shares=SPARSITIES, patterns=PATTERNS, **changes):
    """The table and the outcomes."""
    cells = comparison.build(methods=methods, shares=shares, patterns=patterns, **{**settings, **changes})
    planned = comparison.prepare(cells, output)
    outcomes = runs.run_all(planned, output, lambda cell: lambda text, done, total: None)
    return comparison.tabulate(planned, outcomes, output), outcomes


def names(section):
    return [(row.labels["method"], row.labels["pattern"], round(row.labels["sparsity"], 3)) for row in section.rows]


def test_the_figures_are_those_of_prune_model_and_perplexity(tmp_path, settings, finished):
    _, section = finished
    unstructured, halves = "unstructured", "2:4"
    assert names(section) == [
        ("dense", None, 0),
        ("wanda", unstructured, 0.7), ("wanda", unstructured, 0.25), ("wanda", halves, 0.5),
        ("magnitude", unstructured, 0.7), ("magnitude", unstructured, 0.25), ("magnitude", halves, 0.5),
    ]  # fmt: skip
    model = open_model(settings["source"])
    tokens = encode_text(load_tokenizer(model.source), load_text(settings["evaluation"], "evaluation"))
    ids = token_windows(tokens, 2, 48)
    assert section.rows[0].figures["perplexity"] == perplexity(model, ids)
    for row in (section.rows[1], section.rows[6]):
        pattern, share = row.labels["pattern"], round(row.labels["sparsity"], 3)
        recipe = Recipe(
            sparsity=share, pattern=pattern, method=row.labels["method"], calibration=settings["calibration"],
            windows=3, seqlen=32, heldout_windows=2,
        )  # fmt: skip
        report = prune_model(settings["source"], tmp_path / row.labels["method"], recipe)
        assert row.figures["mean_relative_error"] == np.mean([r.relative_error for r in report.layers])
        assert row.figures["mean_heldout_error"] == pytest.approx(np.mean([r.heldout_error for r in report.layers]))
        assert row.figures["perplexity"] == perplexity(report.output, ids)
        audits = audit_sparsity(report.output)
        assert row.labels["sparsity"] == sum(a.zeros for a in audits) / sum(a.size for a in audits)
        assert 0 < row.figures["solver_seconds"] <= row.figures["whole_seconds"]


def test_table_and_picture_are_written_with_what_was_run(settings, finished):
    output, section = finished
    files = comparison.write(section, output)
    assert [file.name for file in files] == ["comparison.csv", "comparison.md", "comparison.png"]
    with files[0].open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    for line, row in zip(lines, section.rows, strict=True):
        assert line["method"] == row.labels["method"]
        assert float(line["perplexity"]) == row.figures["perplexity"]
        assert (line["calibration_tokens"], line["heldout_tokens"], line["evaluation_tokens"]) == ("96", "64", "96")
        assert (output / line["folder"] / "run.json").is_file()
        assert "jax" in line["versions"]
    text = files[1].read_text()
    assert f"* model: {settings['source']}\n" in text
    assert ", 3 x 32 = 96 tokens, and 64 held out; spread windows\n" in text
    assert ", 2 x 48 = 96 tokens\n" in text
    assert "* measured on: " in text
    assert "* layer errors: uniform tokens\n" in text
    assert text.count("\n| wanda | ") == 3
    assert "![comparison](comparison.png)" in text
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_the_table_says_where_windows_begin_with_bos(settings, finished):
    _, section = finished
    assert "BOS" not in str(section.facts)
    behind = {**section.rows[0].figures, "bos": 7}
    lines = list(map(str, comparison.facts_of(section.runs[0].task, behind, section.rows)))
    assert lines[0] == f"model: {settings['source']}, every window starts with its BOS (token 7)"
    assert f"calibration: the first half of {settings['calibration']}, 3 x 32" in lines[1]
    assert f"evaluation: the second half of {settings['evaluation']}, 2 x 48" in lines[2]


def test_errors_of_different_kinds_are_told_apart(finished):
    _, section = finished
    rows = list(section.rows)
    rows[1] = replace(rows[1], figures={**rows[1].figures, "errors": "residual tokens"})
    facts = dict(comparison.facts_of(section.runs[0].task, rows[0].figures, rows))
    told = "compare only within one kind (residual tokens: wanda; uniform tokens: wanda, magnitude)"
    assert facts["layer errors"] == told


@pytest.mark.parametrize("lost", [["summary.json"], ["summary.json", "config.yaml"]])
def test_a_cell_without_its_record_is_measured_anew_and_the_others_are_kept(tmp_path, settings, finished, pruned, lost):
    output = shutil.copytree(finished[0], tmp_path / "out")
    broken = output / "cells" / "method=magnitude,pattern=2_4"
    for name in lost:
        (broken / name).unlink()
    (broken / "records.jsonl").write_text('{"unit": "mod')  # cut in the middle of a line
    kept = {file: file.read_bytes() for file in output.glob("cells/*/records.jsonl") if file.parent != broken}
    section, outcomes = compared(output, settings)
    assert pruned == ["magnitude"]
    assert [outcome.done for outcome in outcomes] == [0, 0, 0, 0, 0, 0, 1]
    assert {file: file.read_bytes() for file in kept} == kept
    assert section.rows[6].figures["perplexity"] == finished[1].rows[6].figures["perplexity"]
    assert section.rows[:6] == [
        type(row)(row.labels, row.figures, {}, 1, output / row.folder.relative_to(finished[0]))
        for row in finished[1].rows[:6]
    ]


def test_new_cells_join_the_table_of_the_folder(tmp_path, settings, finished, pruned):
    output = shutil.copytree(finished[0], tmp_path / "out")
    section, _ = compared(output, settings, ["magnitude", "wanda"], [0.4], ["2:4", "per-row"])
    assert pruned == ["magnitude", "wanda"]
    assert names(section)[:5] == [
        ("dense", None, 0),
        ("magnitude", "2:4", 0.5), ("magnitude", "per-row", 0.406), ("wanda", "2:4", 0.5), ("wanda", "per-row", 0.406),
    ]  # fmt: skip
    assert sorted(names(section)[5:]) == sorted(n for n in names(finished[1]) if n[1] == "unstructured")


def test_a_failed_cell_is_a_row_with_its_reason_and_is_tried_again(tmp_path, settings, monkeypatch):
    def failing(source, recipes, **others):
        if any(recipe.method == "wanda" for recipe, _ in recipes):
            raise RuntimeError("the solve of\nmodel.layers.0 became non-finite")
        return prune_models(source, recipes, **others)

    monkeypatch.setattr(model_task, "prune_models", failing)
    output = tmp_path / "out"
    section, outcomes = compared(output, settings, patterns=["2:4"])
    reason = "model: RuntimeError: the solve of model.layers.0 became non-finite"
    assert [row.figures.get("error") for row in section.rows] == [None, reason, None]
    assert names(section)[1] == ("wanda", "2:4", 0.5)
    assert [bool(outcome.error) for outcome in outcomes] == [False, True, False]
    files = comparison.write(section, output)
    assert f"| wanda | 2:4 | 0.5 |  |  |  |  |  |  |  |  | {reason} |" in files[1].read_text()
    monkeypatch.setattr(model_task, "prune_models", prune_models)
    section, outcomes = compared(output, settings, patterns=["2:4"])
    assert [outcome.done for outcome in outcomes] == [0, 1, 0]
    assert not any("error" in row.figures for row in section.rows)


def test_a_perplexity_that_is_not_finite_is_said_so(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(model_task, "perplexity", lambda *_, **__: float("inf"))
    section, _ = compared(tmp_path / "out", settings, ["magnitude"], [0.5], ["unstructured"])
    assert [row.figures["perplexity"] for row in section.rows] == ["not finite"] * 2
    files = comparison.write(section, tmp_path / "out")
    assert "| magnitude | unstructured | 0.5 | not finite |" in files[1].read_text()


def test_another_folder_is_refused_with_what_differs(tmp_path, settings, finished, monkeypatch):
    output, _ = finished
    for changes, expected in (
        (
            {"windows": 4, "window_choice": "random", "seed": 7},
            r"(?s)seed: None there, 7 here.*windows: 3 there, 4 here.*another --output",
        ),
        ({"weighting": "residual"}, "weighting: 'uniform' there, 'residual' here"),
        ({"source": "elsewhere"}, "source: .*source' there, 'elsewhere' here"),
    ):
        with pytest.raises(ValueError, match=expected):
            compared(output, settings, **changes)
    with pytest.raises(ValueError, match=r"text\.txt is a file; give --output a folder"):
        compared(Path(settings["calibration"].removeprefix("file:")), settings)
    with monkeypatch.context() as other_code:
        other_code.setattr(runs, "code_digest", lambda: "other")
        with pytest.raises(ValueError, match=r"code: 'sparseopt .*' there, 'sparseopt .*, sources other' here"):
            compared(output, settings)
    copied = shutil.copytree(output, tmp_path / "out")
    (copied / "cells" / "method=dense" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not valid JSON .*; empty the folder"):
        compared(copied, settings)


def test_a_folder_with_other_files_is_left_alone(tmp_path, settings):
    (tmp_path / "comparison.md").write_text("my notes")
    with pytest.raises(ValueError, match="holds no comparison and is not empty; give another --output or empty it"):
        compared(tmp_path, settings)
    assert (tmp_path / "comparison.md").read_text() == "my notes"
    # Version 0.2 wrote the cells alone.
    (tmp_path / "cells").mkdir()
    with pytest.raises(ValueError, match="holds a comparison of an earlier version; give another --output or empty it"):
        compared(tmp_path, settings)


def test_a_model_that_has_changed_is_not_compared_with_the_old_one(tmp_path, settings):
    shutil.copytree(settings["source"], tmp_path / "source")
    changed = settings | {"source": str(tmp_path / "source")}
    compared(tmp_path / "out", changed, ["magnitude"], [0.5], ["unstructured"])
    config = tiny_config(num_hidden_layers=1, intermediate_size=32, num_key_value_heads=4)
    write_folder(tmp_path / "source", config, random_tensors(config, np.random.default_rng(4)))
    with pytest.raises(ValueError, match=r"(?s)inputs\.source: .* there, .* here.*remove these folders"):
        compared(tmp_path / "out", changed, ["magnitude"], [0.5], ["unstructured"])


def test_cells_calibrated_on_another_text_of_the_same_name_are_not_compared(tmp_path, settings):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    changed = settings | {"calibration": f"file:{text}"}
    compared(tmp_path / "out", changed, ["magnitude"], [0.5], ["unstructured"])
    text.write_text(TEXT.replace("fox", "wolf"))
    with pytest.raises(ValueError, match=r"(?s)other settings:.*inputs\.calibration: .* there, .* here"):
        compared(tmp_path / "out", changed, ["wanda"], [0.5], ["unstructured"])


def test_what_the_model_or_the_texts_cannot_do_is_found_before_any_work(tmp_path, settings):
    with pytest.raises(ValueError, match="nothing was run") as caught:
        compared(tmp_path / "out", settings, patterns=["3:7"], windows=900, evaluation_windows=901)
    text = str(caught.value)
    assert "q_proj: pattern '3:7' needs a number of inputs divisible by 7" in text
    assert text.count("pattern '3:7'") == 1
    assert "calibration text: the first half of file:" in text
    assert "902 windows of 32 tokens need" in text
    assert "evaluation text: the second half of file:" in text
    with pytest.raises(ConfigError, match=r"(?s)windows: .*given 0.*did you mean 'wanda'\?.*did you mean 'paper'\?"):
        compared(tmp_path / "out", settings, ["wunda", "maiht:papr"], windows=0)
    assert not (tmp_path / "out").exists()


def test_a_ridge_goes_to_the_methods_that_have_one_and_the_default_preset_is_left_out(settings):
    names, shares, patterns = comparison.read_lists("best,wanda,maiht:tuned,maiht:paper", "0.5", "2:4")
    runs = comparison.build(methods=names, shares=shares, patterns=patterns, ridge=0.2, **settings)
    assert [(comparison.method_name(run.task), run.task.ridge) for run in runs] == [
        ("dense", 0.2), ("best", 0.2), ("wanda", None), ("maiht", 0.2), ("maiht:paper", 0.2),
    ]  # fmt: skip
    for run in runs[1:]:
        run.task.recipe()


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (("", "0.5", "2:4"), r"--methods: an empty place in \[''\]; expected a comma-separated list such as good"),
        (("wanda,,best", "0.5", "2:4"), r"--methods: an empty place in \['wanda', '', 'best'\]"),
        (("maiht,best,maiht:tuned", "0.5", "2:4"), "the run method=maiht,pattern=2_4 appears twice"),
        (("wanda,dense", "0.5", "2:4"), "dense is always measured, as the first row; leave it out"),
        (("wanda", "0.5,1", "2:4"), r"--sparsity: expected shares of zeros in \[0, 1\), .*, given 1"),
        (("wanda", "0.5,nan", "2:4"), "given nan"),
        (("wanda", "half", "2:4"), "--sparsity: expected shares of zeros .* given half"),
        (("wanda", "0.5,.50", "per-row"), "the run method=wanda,pattern=per-row,sparsity=0.5 appears twice"),
        (("wanda", "0.5", "2:x"), "pattern: unknown pattern '2:x'; known are"),
        (("wanda", "0.5", "2:4,2:4"), "the run method=wanda,pattern=2_4 appears twice"),
        (("dense", "7,8", ""), r"(?s)--pattern: an empty.*given 7.*given 8.*--methods: dense"),
    ],
)
def test_mistakes_in_the_lists_are_named_together(lists, expected):
    with pytest.raises(ValueError, match=expected):
        comparison.build("elsewhere", *comparison.read_lists(*lists))


def test_with_curves_an_n_m_pattern_has_a_cell_for_each_sparsity():
    runs = comparison.build("elsewhere", ["wanda"], [0.3, 0.4], ["2:4"], allocation="curves")
    assert [run.settings.get("sparsity") for run in runs] == [None, 0.3, 0.4]


def test_the_picture_shows_perplexity_and_time_in_one_style():
    plt.switch_backend("Agg")
    curves = {"best": ([0.5, 0.6], [30.0, 40.0], [9.0, 8.0]), "wanda": ([0.5, 0.6], [50.0, np.nan], [0.2, 0.1])}
    left, right = plots.plot_comparison(curves, dense=20.0)
    for label, (sparsity, score, seconds) in curves.items():
        np.testing.assert_allclose(drawn(left.lines, label), [np.multiply(sparsity, 100), score])
        np.testing.assert_allclose(drawn(right.lines, label), [np.multiply(sparsity, 100), seconds])
        one, other = (next(line for line in axis.lines if line.get_label() == label) for axis in (left, right))
        assert (one.get_color(), one.get_marker()) == (other.get_color(), other.get_marker())
    assert (left.get_ylabel(), right.get_ylabel()) == ("perplexity", "time of the method (s)")
    assert left.get_yscale() == right.get_yscale() == "log"
    assert texts(right.get_legend().get_texts()) == ["dense", "best", "wanda"]
    with pytest.raises(ValueError, match="2 panels and needs as many axes, given 1"):
        plots.plot_comparison(curves, left)
    plt.close("all")
