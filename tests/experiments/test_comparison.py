"""Comparisons: the figures of the table equal those of separate runs; cells are kept, added, refused."""

import csv
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

METHODS, SHARES, PATTERNS = "wanda,magnitude", "0.25", "unstructured,2:4"
CELLS = [
    ("dense", None, 0), ("wanda", "unstructured", 0.25), ("wanda", "2:4", 0.5), ("magnitude", "unstructured", 0.25),
    ("magnitude", "2:4", 0.5),
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

    def run(*arguments, methods=METHODS, sparsity=SHARES, pattern=PATTERNS):
        return command(
            "compare", settings["source"], "--output", tmp_path / "out", "--methods", methods, "--sparsity", sparsity,
            "--pattern", pattern, "--calibration", settings["calibration"], *CALIBRATED,
            "--text", settings["evaluation"], "--eval-windows", 2, "--eval-seqlen", 48, *arguments,
        )  # fmt: skip

    return run


def compared(output, settings, *lists):
    names, shares, patterns = comparison.read_lists(*(lists or (METHODS, SHARES, PATTERNS)))
    cells = comparison.build(methods=names, shares=shares, patterns=patterns, **settings)
    planned = comparison.prepare(cells, output)
    return comparison.tabulate(planned, runs.run_all(planned, output, lambda cell: quiet), output)


def lines_of(output):
    with (output / FILES[0]).open(newline="") as stream:
        return list(csv.DictReader(stream))


def records(output):
    return {file.parent.name: file.read_bytes() for file in output.glob("cells/*/records.jsonl")}


def test_the_figures_are_those_of_prune_model_and_perplexity(tmp_path, settings, finished):
    _, section = finished
    found = [(row.labels["method"], row.labels["pattern"], round(row.labels["sparsity"], 3)) for row in section.rows]
    assert found == CELLS
    model = open_model(settings["source"])
    ids, _ = text_windows(model.source, settings["evaluation"], "evaluation", 2, 48)
    assert section.rows[0].figures["perplexity"] == perplexity(model, ids)
    for row in (section.rows[1], section.rows[4]):
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
    for line, row in zip(lines_of(output), section.rows, strict=True):
        assert (line["method"], float(line["perplexity"])) == (row.labels["method"], row.figures["perplexity"])
        assert (line["calibration_tokens"], line["heldout_tokens"], line["evaluation_tokens"]) == ("128", "64", "96")
        assert (output / line["folder"] / "run.json").is_file()
        assert "jax" in line["versions"]
    text, read = (output / FILES[1]).read_text(), settings["calibration"]
    for fact in (
        f"model: {settings['source']}",
        f"calibration: the first half of {read}, 4 x 32 = 128 tokens, and 64 held out; spread windows",
        f"evaluation: the second half of {read}, 2 x 48 = 96 tokens",
        "layer errors: uniform tokens",
    ):
        assert f"* {fact}\n" in text
    assert text.count("\n| wanda | ") == 2
    assert f"![{comparison.CAPTION}](comparison.png)" in text
    assert (output / FILES[2]).read_bytes().startswith(b"\x89PNG")
    # Windows that begin with BOS, and errors and machines of several kinds.
    rows = list(section.rows)
    rows[1] = replace(rows[1], figures={**rows[1].figures, "errors": "residual tokens", "machine": "another"})
    facts = dict(comparison.facts_of(section.runs[0].task, {**rows[0].figures, "bos": 7}, rows))
    assert facts["model"] == f"{settings['source']}, every window starts with its BOS (token 7)"
    told = "compare only within one kind (residual tokens: wanda; uniform tokens: wanda, magnitude)"
    assert facts["layer errors"] == told
    assert re.search(r"^another, with .* \(wanda unstructured 0.25\)$", facts["measured on"])


def test_a_cell_without_a_record_alone_is_measured_and_all_are_shown(settings, finished, copied, compare, monkeypatch):
    broken = copied / "cells" / "method=magnitude,pattern=2_4"
    for name in ("summary.json", "config.yaml"):
        (broken / name).unlink()
    (broken / "records.jsonl").write_text('{"unit": "mod')  # cut in the middle of a line
    kept, pruned = records(copied), watch_runs(monkeypatch)
    status, out, err = compare()
    assert status == 0, err
    assert pruned == [("magnitude", 0.5)]
    assert f"5 runs, in {copied / 'cells'}, 4 finished" in out
    assert (out.count("kept "), out.count("done ")) == (4, 1)
    assert {**records(copied), broken.name: b""} == {**kept, broken.name: b""}
    for line, row in zip(lines_of(copied), finished[1].rows, strict=True):
        assert float(line["perplexity"]) == row.figures["perplexity"]
    assert f"model: {settings['source']} calibration: the first half of file:" in out
    rows = [f"│ {method} │ {pattern or ''} │ {share} │".replace("  ", " ") for method, pattern, share in CELLS]
    places = [out.index(row) for row in rows]
    assert places == sorted(places)
    assert all(f"wrote {copied / name}" in out for name in FILES)
    page = whole_page(copied / "report.html")
    (table,) = page.tables
    perplexities = [f"{float(line['perplexity']):.4g}" for line in lines_of(copied)]
    assert [row[table[0].index("perplexity")] for row in table[1:]] == perplexities
    assert (page.captions, len(page.loaded)) == ([comparison.CAPTION], 1)
    assert page.command.startswith(f"sparseopt compare {settings['source']} --output {copied} ")


def test_new_cells_join_a_failed_one_is_a_row_and_after_ctrl_c_the_missing_are_run(copied, compare, monkeypatch):
    lists = {"methods": "magnitude,wanda", "sparsity": "0.4", "pattern": "2:4,per-row"}
    with monkeypatch.context() as broken:
        watch_runs(broken, RuntimeError("the\nlayer broke"), lambda recipe: recipe.method == "wanda")
        status, out, err = compare(**lists)
    assert status == 1
    assert (out.count("kept "), out.count("done ")) == (3, 1)
    reason = "model: RuntimeError: the layer broke"
    assert f"FAILED method=wanda,pattern=per-row,sparsity=0.4: {reason}" in out
    assert "1 of 5 cells failed" in err
    assert f"| wanda | per-row | 0.4 |  |  |  |  |  |  |  |  | {reason} |" in (copied / FILES[1]).read_text()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(model_task, "perplexity", interrupted)
        status, out, err = compare(**lists)
    assert (status, out.count("kept ")) == (130, 4)
    assert "the same command continues with what is missing" in err
    pruned = watch_runs(monkeypatch)
    status, out, _ = compare(**lists)
    # It was pruned before the interruption, and is scored.
    assert (status, pruned, out.count("kept "), out.count("done ")) == (0, [("wanda", 0.4)], 4, 1)
    assert reason not in (copied / FILES[1]).read_text()
    found = [(line["method"], line["pattern"] or None, round(float(line["sparsity"]), 3)) for line in lines_of(copied)]
    assert found[:5] == [
        ("dense", None, 0),
        ("magnitude", "2:4", 0.5), ("magnitude", "per-row", 0.406), ("wanda", "2:4", 0.5), ("wanda", "per-row", 0.406),
    ]  # fmt: skip
    assert sorted(found[5:]) == sorted(cell for cell in CELLS if cell[1] == "unstructured")


def test_options_of_the_recipe_reach_every_cell_and_a_missing_picture_is_explained(tmp_path, compare, monkeypatch):
    options = ["--window-choice", "random", "--seed", 3, "--penalty", "l1", "--dtype", "bfloat16"]
    watch_runs(monkeypatch, RuntimeError("the layer broke"))
    status, out, _ = compare(*options, methods="maiht", sparsity="0.5", pattern="unstructured")
    assert status == 1
    assert "no picture: it needs a pruned cell that is finished" in out
    page = whole_page(tmp_path / "out" / "report.html")
    assert (page.loaded, "RuntimeError: the layer broke" in page.words) == ([], True)
    assert "random windows, seed 3" in out
    (cell,) = (tmp_path / "out" / "cells").glob("method=maiht*")
    config = (cell / "config.yaml").read_text()
    assert all(line in config for line in ("window_choice: random", "seed: 3", "dtype: bfloat16", "name: l1"))


def test_a_perplexity_that_is_not_finite_is_said_so(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(model_task, "perplexity", lambda *_, **__: float("inf"))
    section = compared(tmp_path / "out", settings, "magnitude", "0.5", "unstructured")
    assert [row.figures["perplexity"] for row in section.rows] == ["not finite"] * 2
    text = comparison.write(section, tmp_path / "out")[1].read_text()
    assert "| magnitude | unstructured | 0.5 | not finite |" in text


def test_another_folder_is_refused_with_what_differs(tmp_path, settings, copied, compare, monkeypatch):
    status, _, err = compare("--windows", 5, "--weighting", "residual")
    assert status == 2
    for words in ("comparison with other settings", "windows: 4 there, 5 here", "'uniform' there, 'residual' here"):
        assert words in err
    notes = tmp_path / "notes" / "comparison.md"
    notes.parent.mkdir()
    notes.write_text(other := TEXT.replace("fox", "wolf"))
    for output, fields, words in (
        (copied, {"source": "elsewhere"}, r"source: .*source' there, 'elsewhere' here"),
        (copied, {"calibration": f"file:{notes}"}, r"inputs\.calibration: .* there, .* here"),
        (notes, {}, r"comparison\.md is a file"),
        (notes.parent, {}, "notes holds no comparison and is not empty"),
    ):
        with pytest.raises(ValueError, match=words):
            compared(output, settings | fields)
    assert notes.read_text() == other
    with monkeypatch.context() as other_code:
        other_code.setattr(runs, "code_version", lambda: "other")
        with pytest.raises(ValueError, match=r"code: 'sparseopt .*' there, 'other' here"):
            compared(copied, settings)
    (copied / "cells" / "method=dense" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"(?s)run\.json is not valid JSON .*remove these folders"):
        compared(copied, settings)


def test_cells_stand_in_order_a_ridge_goes_to_methods_that_have_one_and_the_default_preset_is_left_out():
    lists = comparison.read_lists("good,best,wanda,maiht:tuned,maiht:paper", "0.5,0.3", "2:4")
    built = comparison.build("elsewhere", *lists, ridge=0.2)
    assert [(comparison.method_name(run.task), run.task.ridge) for run in built] == [
        ("dense", 0.2), ("good", 0.2), ("best", 0.2), ("wanda", None), ("maiht", 0.2), ("maiht:paper", 0.2),
    ]  # fmt: skip
    for patterns, found in ((["2:4"], [0.3, 0.4]), (["per-row", "2:4"], [0.3, 0.4, 0.3, 0.4])):
        # With curves, a pattern n:m has a cell for each sparsity.
        built = comparison.build("elsewhere", ["wanda"], [0.3, 0.4], patterns, allocation="curves")
        assert [run.settings.get("sparsity") for run in built[1:]] == found


# Lists, and what is named of each mistake, all together.
REFUSED = [
    (("wanda,,best", "0.5", ""), ["--methods: an empty place in ['wanda', '', 'best']", "--pattern: an empty"]),
    (("maiht,best,maiht:tuned", "0.5", "2:4"), ["the run method=maiht,pattern=2_4 appears twice"]),
    (("dense", "0.5,1,nan,half", "2:4"), ["--methods: dense", "given 1", "given nan", "given half"]),
    (("wanda", "0.5,.50", "per-row"), ["wanda,pattern=per-row,sparsity=0.5 appears twice"]),
    (("wanda", "0.5", "2:x"), ["pattern: unknown pattern '2:x'"]),
    (("wunda,maiht:papr,wanda:paper", "0.5", "2:4"), ["'wanda'?", "'paper'?", "preset 'paper'"]),
]


@pytest.mark.parametrize(("lists", "words"), REFUSED)
def test_mistakes_are_named_together(lists, words):
    with pytest.raises(ValueError, match="cannot be used") as caught:
        comparison.build("elsewhere", *comparison.read_lists(*lists))
    assert [word for word in words if word not in str(caught.value)] == []
