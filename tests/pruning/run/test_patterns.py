"""Patterns from their names to the stored model: parsed, refused, kept through a whole model, audited, shown."""

import json

import numpy as np
import pytest

import sparseopt as so
from sparseopt.layers.patterns import count_groups, implied_sparsity, parse_pattern, pattern_count
from sparseopt.models import open_model
from sparseopt.models.files.safetensors import write_tensors
from sparseopt.pruning import Recipe, audit_pattern, audit_sparsity, prune_model
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.test_pipeline import TOKENIZER, make_tokens
from tests.tiers import often

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


@pytest.fixture
def source(tmp_path, rng):
    folder = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    return folder


def wanda(rng, **fields):
    return Recipe(calibration=make_tokens(rng, 12), method="wanda", **fields)


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    often([("per-row", 0.6), ("1:4", None), ("block:4x8", 0.6), ("group:8", 0.5)], ("per-row", 0.6), ("1:4", None)),
)
def test_a_model_has_its_pattern_in_every_linear_on_disk(tmp_path, rng, source, pattern, sparsity):
    report = prune_model(source, tmp_path / "out", wanda(rng, pattern=pattern, sparsity=sparsity))
    audits = audit_pattern(tmp_path / "out", pattern, sparsity)
    assert len(audits) == 21
    assert all(audit.exact and audit.fits for audit in audits)
    assert not any(audit.fits for audit in audit_pattern(source, pattern, sparsity))
    kept = sum(pattern_count(parse_pattern(pattern, sparsity, a.shape), a.shape) for a in audits)
    assert sum(a.size - a.zeros for a in audit_sparsity(tmp_path / "out")) == kept
    assert report.sparsity == pytest.approx(sparsity or 0.75, abs=0.02)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["recipe"]["pattern"] == pattern


def test_the_audit_finds_one_weight_too_many_and_one_too_few(tmp_path, rng, source):
    prune_model(source, tmp_path / "out", wanda(rng, pattern="2:4"))
    model = open_model(tmp_path / "out")
    tensors = {key: np.array(model.source.read(key)) for key in model.source.tensors}
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


def test_an_impossible_pattern_names_the_layer_before_any_work(tmp_path, rng, source):
    # 32 and 64 inputs, 16 to 64 outputs: blocks 32 high fit the first linear and not the keys.
    for pattern, message in [
        ("block:32x8", r"model.layers.0.self_attn.k_proj: .*out=16, in=32\] leaves 16 outputs"),
        ("2:5", r"model.layers.0.self_attn.q_proj: .*divisible by 5"),
        ("group:5", r"model.layers.0.self_attn.q_proj: .*divisible by 5; .* leaves 2 over"),
    ]:
        recipe = wanda(rng, pattern=pattern, sparsity=0.6)
        with pytest.raises(ValueError, match=message):
            prune_model(source, tmp_path / "out", recipe)
        with pytest.raises(ValueError, match=message):
            audit_pattern(source, pattern, 0.6)
    recipe = Recipe(calibration=recipe.calibration, method="sparsegpt", pattern="block:4x8")
    with pytest.raises(ValueError, match=r"q_proj: sparsegpt decides input by input"):
        prune_model(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_recipe_lists_what_is_wrong_with_its_pattern():
    with pytest.raises(ValueError, match=r"(?s)windows.*'1:4' has sparsity 0.75, which contradicts the sparsity 0.5"):
        Recipe(pattern="1:4", sparsity=0.5, windows=0)
    with pytest.raises(ValueError, match="which contradicts the pattern 'per-row'"):
        Recipe(pattern="per-row", penalty=so.L1(1.0))
    Recipe(pattern="1:4")


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


def test_on_the_shell_a_pattern_is_pruned_and_checked(tmp_path, source, command):
    text = ["file:" + str(tmp_path / "text.txt")]
    few = ["--windows", 6, "--seqlen", 32, "--heldout-windows", 2]
    prune = ["prune", source, "--output", tmp_path / "out", "--calibration", *text, *few, "--method", "wanda"]
    status, _, err = command(*prune, "--pattern", "sideways")
    assert status == 2
    assert "unknown pattern 'sideways'; known are 'unstructured', 'per-row'" in err
    status, out, _ = command(*prune, "--pattern", "1:4")
    assert status == 0
    assert "wanda 75% 1:4: layer 21/21" in out
    score = ["eval", tmp_path / "out", "--text", *text, "--windows", 2, "--seqlen", 32]
    status, out, _ = command(*score, "--pattern", "1:4")
    assert status == 0
    assert "pattern 1:4 holds in all 21 linears, exact in 21" in out
    status, out, _ = command(*score, "--pattern", "per-row", "--sparsity", 0.75, "--json")
    assert json.loads(out)["exact"] == 21
    status, _, err = command(*score, "--pattern", "per-row", "--sparsity", 0.8)
    assert status == 1
    assert "21 of 21 linears break the pattern 'per-row'" in err
