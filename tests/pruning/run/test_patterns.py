"""Patterns from their names to the stored model: parsed, given to recipes, audited, shown."""

import json

import numpy as np
import pytest

import sparseopt as so
from sparseopt.layers.patterns import count_groups, implied_sparsity, parse_pattern, pattern_count
from sparseopt.models.files.safetensors import write_tensors
from sparseopt.pruning import Recipe, audit_pattern, prune_model
from tests.pruning.whole_runs import stored

PARSED = {
    "unstructured": so.TopK(round(0.4 * 48 * 64)),
    "per-row": so.RowTopK(26),
    "2:5": so.NM(2, 5),
    "block:2x8": so.BlockTopK(77, (8, 2)),
    "block:48x1": so.BlockTopK(26, (1, 48)),
    "group:1": so.GroupTopK(26),
    "group:16": so.GroupTopK(2, 16),
}


@pytest.mark.parametrize(("text", "pattern"), PARSED.items())
def test_a_name_speaks_of_outputs_x_inputs_and_the_pattern_of_inputs_x_outputs(text, pattern):
    shape = (48, 65) if text == "2:5" else (48, 64)
    assert parse_pattern(text, 0.6, shape) == pattern
    ones = np.ones(shape[::-1], np.float32)
    assert pattern_count(pattern, shape) == np.count_nonzero(pattern.mask(ones))
    kept = np.asarray(pattern.prox(ones, 1.0)).T
    counts = count_groups(kept, pattern)
    assert (counts.each == counts.allowed).all()
    assert (count_groups(np.ones(shape), pattern).each > counts.allowed).all()


def test_only_groups_have_a_sparsity_of_their_own():
    assert implied_sparsity("1:4") == 0.75
    assert [implied_sparsity(text) for text in ("unstructured", "per-row", "block:4x4", "4:0", "")] == [None] * 5
    assert parse_pattern("1:4", None, (3, 8)) == parse_pattern("1:4", 0.75, (3, 8))
    assert Recipe(pattern="1:4").sparsity == 0.75


def test_the_audit_finds_one_weight_too_many_and_one_too_few(tmp_path, source, tokens):
    prune_model(source, tmp_path / "out", Recipe(method="wanda", calibration=tokens, pattern="2:4"))
    tensors = {key: np.array(value) for key, value in stored(tmp_path / "out").items()}
    more, fewer = (tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("up", "down"))
    more[3, np.flatnonzero(more[3] == 0)[0]] = 1e-30
    fewer[5, np.flatnonzero(fewer[5])[0]] = 0
    (tmp_path / "changed").mkdir()
    write_tensors(tmp_path / "changed" / "model.safetensors", tensors)
    (tmp_path / "changed" / "config.json").write_text((source / "config.json").read_text())
    audits = {audit.layer: audit for audit in audit_pattern(tmp_path / "changed", "2:4")}
    assert [layer for layer, audit in audits.items() if not audit.fits] == ["model.layers.1.mlp.up_proj"]
    assert audits["model.layers.1.mlp.up_proj"].most == 3
    down = audits.pop("model.layers.1.mlp.down_proj")
    assert (down.fits, down.exact, down.least) == (True, False, 1)
    assert sum(audit.exact for audit in audits.values()) == 19


@pytest.mark.parametrize("pattern", ["per-row", "1:4", "block:4x8", "group:8"])
def test_a_dense_model_has_no_pattern_and_an_impossible_one_is_refused(source, pattern):
    assert not any(audit.fits for audit in audit_pattern(source, pattern, None if pattern == "1:4" else 0.6))
    for impossible, words in (("block:32x8", "leaves 16 outputs"), ("2:5", "by 5"), ("group:5", "leaves 2 over")):
        with pytest.raises(ValueError, match=words):
            audit_pattern(source, impossible, 0.6)


@pytest.mark.parametrize(
    ("first", "then", "sparsity"),
    [
        ({}, {"pattern": "per-row"}, 0.5),
        ({}, {"keep_zeros": True}, 0.0),
        ({"keep_zeros": True}, {"keep_zeros": False}, 0.5),
        ({"pattern": "2:4"}, {"pattern": "1:4"}, 0.75),
        ({"pattern": "2:4"}, {"pattern": "unstructured", "sparsity": 0.7}, 0.7),
    ],
)
def test_a_changed_copy_of_a_recipe_keeps_only_what_was_given(first, then, sparsity):
    copied, made = Recipe(**first).model_copy(update=then), Recipe(**(first | then))
    assert copied == made
    assert copied.sparsity == copied.as_dict()["sparsity"] == sparsity


def test_on_the_shell_a_pattern_is_pruned_and_checked(tmp_path, source, text, command):
    few = ["--windows", 6, "--seqlen", 32, "--heldout-windows", 2]
    prune = ["prune", source, "--output", tmp_path / "out", "--calibration", text, *few, "--method", "wanda"]
    status, out, _ = command(*prune, "--pattern", "1:4")
    assert status == 0
    assert "wanda 75% 1:4: layer 21/21" in out
    score = ["eval", tmp_path / "out", "--text", text, "--windows", 2, "--seqlen", 32]
    status, out, _ = command(*score, "--pattern", "1:4")
    assert status == 0
    assert "pattern 1:4 holds in all 21 linear layers, exact in 21" in out
    status, out, _ = command(*score, "--pattern", "per-row", "--sparsity", 0.75, "--json")
    assert json.loads(out)["exact"] == 21
    status, _, err = command(*score, "--pattern", "per-row", "--sparsity", 0.8)
    assert status == 1
    assert "21 of 21 linear layers break the pattern 'per-row'" in err
