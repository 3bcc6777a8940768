"""Patterns from their names to the stored model: parsed, given to recipes, audited, shown."""

import numpy as np
import pytest

import sparseopt as so
from sparseopt.layers.patterns import count_groups, implied_sparsity, parse_pattern, pattern_count
from sparseopt.pruning import Recipe, audit_pattern, prune_model
from tests.jitted import Jitted
from tests.pruning.whole_runs import stored, write_model

TINY = "llama"
pytestmark = pytest.mark.usefixtures("several_batches")
PARSED = {
    "unstructured": so.TopK(round(0.4 * 24 * 16)),
    "per-row": so.RowTopK(6),
    "2:4": so.NM(2, 4),
    "block:2x8": so.BlockTopK(10, (8, 2)),
    "group:1": so.GroupTopK(6),
    "group:4": so.GroupTopK(2, 4),
}


@pytest.mark.parametrize(("text", "pattern"), PARSED.items())
def test_a_name_speaks_of_outputs_x_inputs_and_the_pattern_of_inputs_x_outputs(text, pattern):
    assert parse_pattern(text, None if text == "2:4" else 0.6, (24, 16)) == pattern
    kept = Jitted(pattern).prox(np.ones((16, 24), np.float32), 1.0).T
    assert pattern_count(pattern, (24, 16)) == np.count_nonzero(kept)
    counts = count_groups(kept, pattern)
    assert (counts.each == counts.allowed).all()
    assert (count_groups(np.ones((24, 16)), pattern).each > counts.allowed).all()


def test_only_groups_have_a_sparsity_of_their_own():
    assert implied_sparsity("1:4") == 0.75
    assert [implied_sparsity(text) for text in ("unstructured", "per-row", "block:4x4", "4:0", "")] == [None] * 5
    assert parse_pattern("1:4", None, (3, 8)) == parse_pattern("1:4", 0.75, (3, 8))
    assert Recipe(pattern="1:4").sparsity == 0.75


def test_the_audit_finds_one_weight_too_many_and_one_too_few(tmp_path, source, tokens):
    prune_model(
        source, tmp_path / "out", Recipe(method="magnitude", calibration=tokens, heldout_windows=2, pattern="2:4")
    )
    tensors = {key: np.array(value) for key, value in stored(tmp_path / "out").items()}
    more, fewer = (tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("up", "down"))
    more[3, np.flatnonzero(more[3] == 0)[0]] = 1e-30
    fewer[5, np.flatnonzero(fewer[5])[0]] = 0
    audits = audit_pattern(write_model(tmp_path / "changed", tensors=tensors), "2:4")
    audits = {audit.layer.removeprefix("model.layers."): audit for audit in audits}
    assert [layer for layer, audit in audits.items() if not audit.fits] == ["1.mlp.up_proj"]
    assert audits["1.mlp.up_proj"].most == 3
    down = audits["1.mlp.down_proj"]
    assert (down.fits, down.exact, down.least) == (True, False, 1)
    assert sum(audit.exact for audit in audits.values()) == 19


def test_a_dense_model_has_no_pattern_and_an_impossible_one_is_refused(source):
    for pattern in ("per-row", "1:4", "block:4x8", "group:8"):
        assert not any(audit.fits for audit in audit_pattern(source, pattern, None if pattern == "1:4" else 0.6))
    with pytest.raises(ValueError, match="leaves 16 outputs"):
        audit_pattern(source, "block:32x8", 0.6)


def test_a_changed_copy_of_a_recipe_keeps_only_what_was_given():
    for first, then, sparsity in (
        ({}, {"pattern": "per-row"}, 0.5),
        ({}, {"keep_zeros": True}, 0.0),
        ({"keep_zeros": True}, {"keep_zeros": False}, 0.5),
        ({"pattern": "2:4"}, {"pattern": "1:4"}, 0.75),
        ({"pattern": "2:4"}, {"pattern": "unstructured", "sparsity": 0.7}, 0.7),
    ):
        copied, made = Recipe(**first).model_copy(update=then), Recipe(**(first | then))
        assert copied == made
        assert copied.sparsity == copied.as_dict()["sparsity"] == sparsity
