"""The command `sparseopt compare` and its output."""

import numpy as np
import pytest

from sparseopt.experiments.tasks import model
from sparseopt.pruning import perplexity, prune_models
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.test_pipeline import TOKENIZER

TEXT = "the quick brown fox jumps over the lazy dog, and then the dog tells the fox all about it.\n" * 60


@pytest.fixture
def compare(tmp_path, command):
    """The command on a model of one block, into `out`."""
    config = tiny_config(num_hidden_layers=1, intermediate_size=32, num_key_value_heads=4)
    source = write_folder(tmp_path / "source", config, random_tensors(config, np.random.default_rng(3)))
    (source / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "text.txt").write_text(TEXT)
    text = f"file:{tmp_path / 'text.txt'}"

    def run(*arguments, methods="magnitude,wanda", sparsity="0.25,0.5"):
        return command(
            "compare", source, "--output", tmp_path / "out", "--methods", methods, "--sparsity", sparsity,
            "--calibration", text, "--windows", 3, "--seqlen", 32, "--heldout-windows", 2,
            "--text", text, "--eval-windows", 2, "--eval-seqlen", 32, *arguments,
        )  # fmt: skip

    return run


def fail_on(monkeypatch, wrong, error):
    """Let making models raise where `wrong` holds of the recipes of a pass."""

    def failing(source, recipes, **others):
        if wrong([recipe for recipe, _ in recipes]):
            raise error
        return prune_models(source, recipes, **others)

    monkeypatch.setattr(model, "prune_models", failing)


def test_a_comparison_is_shown_and_written(tmp_path, compare):
    status, out, err = compare("--pattern", "unstructured,2:4")
    assert status == 0, err
    assert f"7 runs, in {tmp_path / 'out' / 'cells'}, 0 finished" in out
    assert out.count("done ") == 7
    assert f"model: {tmp_path / 'source'} calibration: the first half of file:" in out
    assert ", 3 x 32 = 96 tokens, and 64 held out; spread windows evaluation: the second half of file:" in out
    assert "measured on: " in out
    rows = [
        "│ dense │ │ 0 │", "│ magnitude │ unstructured │ 0.25 │", "│ magnitude │ unstructured │ 0.5 │",
        "│ magnitude │ 2:4 │ 0.5 │", "│ wanda │ unstructured │ 0.25 │", "│ wanda │ unstructured │ 0.5 │",
        "│ wanda │ 2:4 │ 0.5 │",
    ]  # fmt: skip
    places = [out.index(row) for row in rows]
    assert places == sorted(places)
    for name in ("comparison.csv", "comparison.md", "comparison.png"):
        assert f"wrote {tmp_path / 'out' / name}" in out
        assert (tmp_path / "out" / name).is_file()
    status, again, _ = compare("--pattern", "unstructured,2:4")
    assert status == 0
    assert again.count("kept ") == 7
    assert again[again.index("model: ") :] == out[out.index("model: ") :]


def test_after_ctrl_c_the_same_command_does_the_missing_cells_alone(compare, monkeypatch):
    scored = []

    def interrupted(*arguments, **others):
        scored.append(arguments)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return perplexity(*arguments, **others)

    with monkeypatch.context() as broken:
        broken.setattr(model, "perplexity", interrupted)
        status, out, err = compare()
    assert status == 130
    assert "the same command continues with what is missing" in err
    assert out.count("done ") == 2
    passes = []
    fail_on(monkeypatch, lambda recipes: passes.append([(r.method, r.sparsity) for r in recipes]), AssertionError)
    status, out, _ = compare()
    assert status == 0
    # The pass was finished, and its other models are scored.
    assert passes == [[("magnitude", 0.5), ("wanda", 0.25), ("wanda", 0.5)]]
    assert (out.count("kept "), out.count("done ")) == (2, 3)


def test_a_failed_cell_is_named_and_ends_in_status_1_with_the_others_done(compare, monkeypatch):
    with monkeypatch.context() as broken:
        fail_on(broken, lambda recipes: recipes[0].method == "magnitude", RuntimeError("the layer broke"))
        status, out, err = compare(sparsity="0.5")
    assert status == 1
    assert "a pass shared with other runs ended (RuntimeError: the layer broke), each goes on alone" in out
    assert "FAILED method=magnitude,pattern=unstructured,sparsity=0.5: model: RuntimeError: the layer broke" in out
    assert "│ wanda │ unstructured │ 0.5 │" in out
    assert "the layer broke │" in out
    assert "1 of 3 cells failed, with their reasons in the table" in err
    assert compare(sparsity="0.5")[0] == 0


def test_where_nothing_was_pruned_the_missing_picture_is_explained(compare, monkeypatch):
    fail_on(monkeypatch, bool, RuntimeError("the layer broke"))
    status, out, _ = compare(methods="wanda", sparsity="0.5")
    assert status == 1
    assert "no picture: it needs a pruned cell that is finished" in out


@pytest.mark.parametrize(
    ("arguments", "lists", "expected"),
    [
        ([], {"methods": "wunda"}, "unknown pruning method 'wunda': did you mean 'wanda'?"),
        ([], {"sparsity": "0.5,50"}, "--sparsity: expected shares of zeros in [0, 1), as in 0.5,0.6, given 50"),
        (["--pattern", "5:6"], {}, "pattern '5:6' needs a number of inputs divisible by 6"),
        (["--weighting", "residul"], {}, "weighting: 'residul' is not known; did you mean 'residual'?"),
        ([], {"methods": "wanda:paper"}, "method 'wanda' has no presets, given preset 'paper'; leave the preset out"),
        (["--text", "file:/nowhere"], {}, "cannot read the text file /nowhere"),
    ],
)
def test_mistakes_end_before_any_work_with_status_2(tmp_path, compare, arguments, lists, expected):
    status, _, err = compare(*arguments, **lists)
    assert status == 2
    assert expected in err
    assert not (tmp_path / "out").exists()


def test_another_calibration_is_refused_and_more_methods_join(compare):
    compare(methods="wanda", sparsity="0.5")
    status, _, err = compare("--windows", 4, methods="wanda", sparsity="0.5")
    assert status == 2
    assert "holds a comparison with other settings: windows: 3 there, 4 here give another --output" in err
    status, out, _ = compare(methods="magnitude,wanda", sparsity="0.5")
    assert status == 0
    assert (out.count("kept "), out.count("done ")) == (2, 1)
    assert out.index("│ magnitude │") < out.index("│ wanda │")


def test_options_of_the_recipe_reach_every_cell(tmp_path, compare):
    options = ["--window-choice", "random", "--seed", 3, "--penalty", "l1", "--dtype", "bfloat16"]
    options += ["--output-weights", "uniform"]
    status, out, err = compare(*options, methods="maiht", sparsity="0.5")
    assert status == 0, err
    assert "random windows, seed 3" in out
    (cell,) = (tmp_path / "out" / "cells").glob("method=maiht*")
    config = (cell / "config.yaml").read_text()
    for line in ("window_choice: random", "seed: 3", "dtype: bfloat16", "output_weights: uniform", "name: l1"):
        assert line in config
