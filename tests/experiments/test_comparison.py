"""Comparisons: the figures of the table equal those of separate runs; cells are kept, added, refused."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from sparseopt.experiments import comparison, runs
from sparseopt.experiments.tasks import model as model_task
from sparseopt.models import open_model
from sparseopt.pruning import Recipe, audit_sparsity, perplexity, prune_model
from sparseopt.pruning.text.windows import text_windows
from tests.experiments.inputs import CALIBRATED, TEXT, WINDOWS, quiet, watch_runs, write_inputs
from tests.system.pages import whole_page

METHODS, SHARES, PATTERNS = "wanda,magnitude", "0.75,0.25", "unstructured,2:4"
CELLS = [
    ("dense", None, 0), ("wanda", "unstructured", 0.75), ("wanda", "unstructured", 0.25), ("wanda", "2:4", 0.5),
    ("magnitude", "unstructured", 0.75), ("magnitude", "unstructured", 0.25), ("magnitude", "2:4", 0.5),
]  # fmt: skip
FILES = ["comparison.csv", "comparison.md", "comparison.png"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A model of one block."""
    source, text = write_inputs(tmp_path_factory.mktemp("comparison"), num_hidden_layers=1)
    return {"source": str(source), "calibration": text, "evaluation": text, **WINDOWS}


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out"
    section = compared(output, settings)
    comparison.write(section, output)
    return output, section


@pytest.fixture
def copied(finished, tmp_path):
    """The folder `tmp_path/out` with all cells finished."""
    return shutil.copytree(finished[0], tmp_path / "out")


@pytest.fixture
def compare(tmp_path, settings, command):
    """The command into `tmp_path/out`: exit status and what it printed."""

    def run(*arguments, methods=METHODS, sparsity=SHARES, pattern=PATTERNS, source=settings["source"]):
        return command(
            "compare", source, "--output", tmp_path / "out", "--methods", methods, "--sparsity", sparsity,
            "--pattern", pattern, "--calibration", settings["calibration"], *CALIBRATED,
            "--text", settings["evaluation"], "--eval-windows", 2, "--eval-seqlen", 48, *arguments,
        )  # fmt: skip

    return run


def compared(output, settings, *lists):
    names, shares, patterns = comparison.read_lists(*(lists or (METHODS, SHARES, PATTERNS)))
    cells = comparison.build(methods=names, shares=shares, patterns=patterns, **settings)
    planned = comparison.prepare(cells, output)
    return comparison.tabulate(planned, runs.run_all(planned, output, lambda cell: quiet), output)


def names(section):
    return [(row.labels["method"], row.labels["pattern"], round(row.labels["sparsity"], 3)) for row in section.rows]


def lines_of(output):
    with (output / FILES[0]).open(newline="") as stream:
        return list(csv.DictReader(stream))


def records(output):
    return {file.parent.name: file.read_bytes() for file in output.glob("cells/*/records.jsonl")}


def test_the_figures_are_those_of_prune_model_and_perplexity(tmp_path, settings, finished):
    _, section = finished
    assert names(section) == CELLS
    model = open_model(settings["source"])
    ids, _ = text_windows(model.source, settings["evaluation"], "evaluation", 2, 48)
    assert section.rows[0].figures["perplexity"] == perplexity(model, ids)
    for row in (section.rows[1], section.rows[6]):
        pattern, share = row.labels["pattern"], round(row.labels["sparsity"], 3)
        recipe = Recipe(
            sparsity=share, pattern=pattern, method=row.labels["method"], calibration=settings["calibration"],
            windows=4, seqlen=32, heldout_windows=2,
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
    lines = lines_of(output)
    for line, row in zip(lines, section.rows, strict=True):
        assert line["method"] == row.labels["method"]
        assert float(line["perplexity"]) == row.figures["perplexity"]
        assert (line["calibration_tokens"], line["heldout_tokens"], line["evaluation_tokens"]) == ("128", "64", "96")
        assert (output / line["folder"] / "run.json").is_file()
        assert "jax" in line["versions"]
    text = (output / FILES[1]).read_text()
    assert f"* model: {settings['source']}\n" in text
    assert ", 4 x 32 = 128 tokens, and 64 held out; spread windows\n" in text
    assert ", 2 x 48 = 96 tokens\n" in text
    assert "* measured on: " in text
    assert "* layer errors: uniform tokens\n" in text
    assert text.count("\n| wanda | ") == 3
    assert f"![{comparison.CAPTION}](comparison.png)" in text
    assert (output / FILES[2]).read_bytes().startswith(b"\x89PNG")


def test_the_table_says_where_windows_begin_with_bos_and_tells_errors_of_different_kinds_apart(settings, finished):
    _, section = finished
    assert "BOS" not in str(section.facts)
    rows = list(section.rows)
    rows[1] = replace(rows[1], figures={**rows[1].figures, "errors": "residual tokens"})
    facts = comparison.facts_of(section.runs[0].task, {**rows[0].figures, "bos": 7}, rows)
    lines = list(map(str, facts))
    assert lines[0] == f"model: {settings['source']}, every window starts with its BOS (token 7)"
    assert f"calibration: the first half of {settings['calibration']}, 4 x 32" in lines[1]
    assert f"evaluation: the second half of {settings['evaluation']}, 2 x 48" in lines[2]
    told = "compare only within one kind (residual tokens: wanda; uniform tokens: wanda, magnitude)"
    assert dict(facts)["layer errors"] == told


@pytest.mark.parametrize("lost", [["summary.json"], ["summary.json", "config.yaml"]])
def test_the_command_measures_the_cell_without_a_record_alone_and_shows_all(
    settings, finished, copied, compare, monkeypatch, lost
):
    broken = copied / "cells" / "method=magnitude,pattern=2_4"
    for name in lost:
        (broken / name).unlink()
    (broken / "records.jsonl").write_text('{"unit": "mod')  # cut in the middle of a line
    kept, pruned = records(copied), watch_runs(monkeypatch)
    status, out, err = compare()
    assert status == 0, err
    assert pruned == [("magnitude", 0.5)]
    assert f"7 runs, in {copied / 'cells'}, 6 finished" in out
    assert (out.count("kept "), out.count("done ")) == (6, 1)
    assert {**records(copied), broken.name: b""} == {**kept, broken.name: b""}
    for line, row in zip(lines_of(copied), finished[1].rows, strict=True):
        assert float(line["perplexity"]) == row.figures["perplexity"]
    assert f"model: {settings['source']} calibration: the first half of file:" in out
    assert ", 4 x 32 = 128 tokens, and 64 held out; spread windows evaluation: the second half of file:" in out
    assert "measured on: " in out
    places = [
        out.index(f"│ {method} │ {pattern or ''} │ {share} │".replace("  ", " ")) for method, pattern, share in CELLS
    ]
    assert places == sorted(places)
    assert all(f"wrote {copied / name}" in out and (copied / name).is_file() for name in FILES)
    page = whole_page(copied / "report.html")
    (table,) = page.tables
    perplexities = [f"{float(line['perplexity']):.4g}" for line in lines_of(copied)]
    assert [row[table[0].index("perplexity")] for row in table[1:]] == perplexities
    assert (page.captions, len(page.loaded)) == ([comparison.CAPTION], 1)
    assert page.command.startswith(f"sparseopt compare {settings['source']} --output {copied} ")
    status, again, _ = compare()
    assert (status, again.count("kept ")) == (0, 7)
    assert again[again.index("model: ") :] == out[out.index("model: ") :]


def test_new_cells_join_the_table_of_the_folder(copied, compare, monkeypatch):
    pruned = watch_runs(monkeypatch)
    status, out, err = compare(methods="magnitude,wanda", sparsity="0.4", pattern="2:4,per-row")
    assert status == 0, err
    assert pruned == [("magnitude", 0.4), ("wanda", 0.4)]
    assert (out.count("kept "), out.count("done ")) == (3, 2)
    found = [(line["method"], line["pattern"] or None, round(float(line["sparsity"]), 3)) for line in lines_of(copied)]
    assert found[:5] == [
        ("dense", None, 0),
        ("magnitude", "2:4", 0.5), ("magnitude", "per-row", 0.406), ("wanda", "2:4", 0.5), ("wanda", "per-row", 0.406),
    ]  # fmt: skip
    assert sorted(found[5:]) == sorted(cell for cell in CELLS if cell[1] == "unstructured")


def test_after_ctrl_c_the_same_command_does_the_missing_cells_alone(compare, monkeypatch):
    lists = {"methods": "magnitude,wanda", "sparsity": "0.25,0.5", "pattern": "unstructured"}
    scored = []

    def interrupted(*arguments, **others):
        scored.append(arguments)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return perplexity(*arguments, **others)

    with monkeypatch.context() as broken:
        broken.setattr(model_task, "perplexity", interrupted)
        status, out, err = compare(**lists)
    assert status == 130
    assert "the same command continues with what is missing" in err
    assert out.count("done ") == 2
    pruned = watch_runs(monkeypatch)
    status, out, _ = compare(**lists)
    assert status == 0
    # The first of them was finished, and is scored.
    assert pruned == [("magnitude", 0.5), ("wanda", 0.25), ("wanda", 0.5)]
    assert (out.count("kept "), out.count("done ")) == (2, 3)


def test_a_failed_cell_is_a_row_with_its_reason_ends_in_status_1_and_is_tried_again(tmp_path, compare, monkeypatch):
    error = RuntimeError("the\nlayer broke")
    with monkeypatch.context() as broken:
        watch_runs(broken, error, lambda recipe: recipe.method == "wanda")
        status, out, err = compare(pattern="2:4")
    assert status == 1
    reason = "model: RuntimeError: the layer broke"
    for said in (
        f"FAILED method=wanda,pattern=2_4: {reason}", "│ magnitude │ 2:4 │ 0.5 │", "layer broke │",
    ):  # fmt: skip
        assert said in out
    assert "1 of 3 cells failed, with their reasons in the table" in err
    text = tmp_path / "out" / FILES[1]
    assert f"| wanda | 2:4 | 0.5 |  |  |  |  |  |  |  |  | {reason} |" in text.read_text()
    status, out, _ = compare(pattern="2:4")
    assert (status, out.count("kept "), out.count("done ")) == (0, 2, 1)
    assert reason not in text.read_text()


def test_options_of_the_recipe_reach_every_cell_and_a_missing_picture_is_explained(tmp_path, compare, monkeypatch):
    options = ["--window-choice", "random", "--seed", 3, "--penalty", "l1", "--dtype", "bfloat16"]
    options += ["--output-weights", "uniform"]
    watch_runs(monkeypatch, RuntimeError("the layer broke"))
    status, out, _ = compare(*options, methods="maiht", sparsity="0.5", pattern="unstructured")
    assert status == 1
    assert "no picture: it needs a pruned cell that is finished" in out
    page = whole_page(tmp_path / "out" / "report.html")
    assert (page.loaded, "RuntimeError: the layer broke" in page.words) == ([], True)
    assert "random windows, seed 3" in out
    (cell,) = (tmp_path / "out" / "cells").glob("method=maiht*")
    config = (cell / "config.yaml").read_text()
    for line in ("window_choice: random", "seed: 3", "dtype: bfloat16", "output_weights: uniform", "name: l1"):
        assert line in config


def test_a_perplexity_that_is_not_finite_is_said_so(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(model_task, "perplexity", lambda *_, **__: float("inf"))
    section = compared(tmp_path / "out", settings, "magnitude", "0.5", "unstructured")
    assert [row.figures["perplexity"] for row in section.rows] == ["not finite"] * 2
    text = comparison.write(section, tmp_path / "out")[1].read_text()
    assert "| magnitude | unstructured | 0.5 | not finite |" in text


def test_another_folder_is_refused_with_what_differs(tmp_path, settings, finished, copied, compare, monkeypatch):
    for options, expected in (
        (
            ["--windows", 5, "--window-choice", "random", "--seed", 7],
            r"holds a comparison with other settings: .*seed: None there, 7 here.*windows: 4 there, 5 here.*another -",
        ),
        (["--weighting", "residual"], "weighting: 'uniform' there, 'residual' here"),
    ):
        status, _, err = compare(*options)
        assert (status, bool(re.search(expected, err))) == (2, True), err
    with pytest.raises(ValueError, match=r"source: .*source' there, 'elsewhere' here"):
        compared(copied, settings | {"source": "elsewhere"})
    file = tmp_path / "text.txt"
    file.write_text("a file")
    with pytest.raises(ValueError, match=r"text\.txt is a file; give --output a folder"):
        compared(file, settings)
    with monkeypatch.context() as other_code:
        other_code.setattr(runs, "code_version", lambda: "other")
        with pytest.raises(ValueError, match=r"code: 'sparseopt .*' there, 'other' here"):
            compared(copied, settings)
    (copied / "cells" / "method=dense" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not valid JSON .*; empty the folder"):
        compared(copied, settings)


def test_a_folder_with_other_files_is_left_alone(tmp_path, settings):
    (tmp_path / "comparison.md").write_text("my notes")
    with pytest.raises(ValueError, match="holds no comparison and is not empty; give another --output or empty it"):
        compared(tmp_path, settings)
    assert (tmp_path / "comparison.md").read_text() == "my notes"


def test_a_model_or_text_of_the_same_name_that_has_changed_is_not_compared_with_the_old_one(tmp_path, settings):
    source, text = write_inputs(tmp_path, num_hidden_layers=1)
    lists = ("magnitude", "0.5", "unstructured")
    changed = settings | {"source": str(source), "calibration": text}
    compared(tmp_path / "out", changed, *lists)
    (tmp_path / "text.txt").write_text(TEXT.replace("fox", "wolf"))
    with pytest.raises(ValueError, match=r"(?s)other settings:.*inputs\.calibration: .* there, .* here"):
        compared(tmp_path / "out", changed, "wanda", *lists[1:])
    (tmp_path / "text.txt").write_text(TEXT)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"(?s)inputs\.source: .* there, .* here.*remove these folders"):
        compared(tmp_path / "out", changed, *lists)


def test_a_ridge_goes_to_the_methods_that_have_one_and_the_default_preset_is_left_out(settings):
    lists = comparison.read_lists("best,wanda,maiht:tuned,maiht:paper", "0.5", "2:4")
    built = comparison.build(settings["source"], *lists, ridge=0.2)
    assert [(comparison.method_name(run.task), run.task.ridge) for run in built] == [
        ("dense", 0.2), ("best", 0.2), ("wanda", None), ("maiht", 0.2), ("maiht:paper", 0.2),
    ]  # fmt: skip
    for run in built[1:]:
        run.task.recipe()


def test_with_curves_an_n_m_pattern_has_a_cell_for_each_sparsity():
    built = comparison.build("elsewhere", ["wanda"], [0.3, 0.4], ["2:4"], allocation="curves")
    assert [run.settings.get("sparsity") for run in built] == [None, 0.3, 0.4]


# Lists and options, and what is said, all mistakes together.
REFUSED = [
    ({"methods": ""}, [], r"--methods: an empty place in \[''\]; expected a comma-separated list such as good"),
    ({"methods": "wanda,,best"}, [], r"--methods: an empty place in \['wanda', '', 'best'\]"),
    ({"methods": "maiht,best,maiht:tuned", "pattern": "2:4"}, [], "the run method=maiht,pattern=2_4 appears twice"),
    ({"methods": "wanda,dense"}, [], "dense is always measured, as the first row; leave it out"),
    ({"sparsity": "0.5,1"}, [], r"--sparsity: expected shares of zeros in \[0, 1\), as in 0.5,0.6, given 1"),
    ({"sparsity": "0.5,nan"}, [], "given nan"),
    ({"sparsity": "half"}, [], "--sparsity: expected shares of zeros .* given half"),
    ({"sparsity": "0.5,.50", "pattern": "per-row"}, [], "wanda,pattern=per-row,sparsity=0.5 appears twice"),
    ({"pattern": "2:x"}, [], "pattern: unknown pattern '2:x'; known are"),
    ({"pattern": "2:4,2:4"}, [], "the run method=wanda,pattern=2_4 appears twice"),
    (
        {"methods": "dense", "sparsity": "7,8", "pattern": ""}, [],
        "--pattern: an empty.*given 7.*given 8.*--methods: dense",
    ),
    (
        {"methods": "wunda,maiht:papr"}, ["--windows", 0],
        r"windows: .*given 0.*did you mean 'wanda'\?.*did you mean 'paper'\?",
    ),
    ({"methods": "wanda:paper"}, [], "method 'wanda' has no presets, given preset 'paper'; leave the preset out"),
    ({}, ["--weighting", "residul"], "weighting: 'residul' is not known; did you mean 'residual'?"),
    ({}, ["--text", "file:/nowhere"], "cannot read the text file /nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("lists", "options", "words"), REFUSED)
def test_mistakes_end_before_any_work_with_status_2_and_are_named_together(tmp_path, compare, lists, options, words):
    status, _, err = compare(*options, **lists)
    assert status == 2
    assert re.search(words, err), err
    assert not (tmp_path / "out").exists()
