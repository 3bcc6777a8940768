"""Several recipes in one pass, and reconstruction inside the pipeline."""

import json

import jax
import numpy as np
import pytest

from sparseopt.models import load_decoder, open_model
from sparseopt.pruning import Recipe, audit_sparsity, prune_model, prune_models
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.base.records import BlockRecord, Calibration, Footprint, LayerRecord, Passed
from sparseopt.pruning.train.reconstruction import Reconstruction, channel_weights, stream_loss
from tests.jitted import run
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder
from tests.tiers import often


@pytest.fixture
def source(tmp_path, rng):
    return write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))


@pytest.fixture
def tokens(rng):
    return rng.integers(0, len(VOCAB), (8, 12)).astype(np.int32)


def stored(folder):
    source = open_model(folder).source
    return {key: source.read(key) for key in source.tensors}


@pytest.mark.thorough
def test_one_pass_gives_what_a_pass_for_each_gives(tmp_path, source, tokens):
    """Bit for bit, recipes of all kinds side by side."""
    base = Recipe(method="sparsegpt", calibration=tokens, heldout_windows=2)
    recipes = [
        base.model_copy(update={"sparsity": 0.4}),
        base.model_copy(update={"sparsity": 0.7, "output_weights": "gradient", "train_epochs": 1}),
        base.model_copy(update={"sparsity": None, "pattern": "2:4", "method": "wanda", "propagate": 0.5}),
    ]
    together = prune_models(source, [(r, tmp_path / f"together-{i}") for i, r in enumerate(recipes)])
    assert [report.plans for report in together] == [3, 3, 3]
    for index, recipe in enumerate(recipes):
        alone = prune_model(source, tmp_path / f"alone-{index}", recipe)
        ours, theirs = stored(tmp_path / f"together-{index}"), stored(tmp_path / f"alone-{index}")
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{index} {key}")
        errors = [(r.layer, r.relative_error, r.heldout_error) for r in together[index].layers]
        assert errors == [(r.layer, r.relative_error, r.heldout_error) for r in alone.layers]


def test_what_the_models_see_alike_is_computed_once(tmp_path, source, tokens, monkeypatch):
    """Three blocks: of two models' six passes for Grams the two in front of the first block are one."""
    passes, grams = [], BlockRunner.grams
    monkeypatch.setattr(BlockRunner, "grams", lambda *given, **rest: passes.append(1) or grams(*given, **rest))
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=0)
    plans = [(recipe.model_copy(update={"sparsity": s}), tmp_path / f"{s}") for s in (0.5, 0.7)]
    events = []
    prune_models(source, plans, observer=lambda event, _, total: events.append((event, total)))
    assert len(passes) == 5
    assert [type(event) for event, _ in events[:2]] == [Calibration, Footprint]
    # Three blocks have passed; the others are layers.
    assert [type(event) for event, _ in events[2:]] == 3 * ([LayerRecord] * 14 + [Passed])
    assert {total for _, total in events} == {42}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 8}, "these differ in windows"),
        ({"bos": "no", "calibration": np.ones((4, 4), np.int32)}, "these differ in bos, calibration"),
        (
            {"window_choice": "random", "seed": 1, "calibration": "pydoc"},
            "window_choice, seed, calibration",
        ),
        ({"calibration": "pydoc"}, "these differ in calibration"),
    ],
)
def test_recipes_of_one_pass_share_their_tokens(tmp_path, source, tokens, changes, message):
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=0)
    plans = [(recipe, tmp_path / "a"), (recipe.model_copy(update=changes), tmp_path / "b")]
    with pytest.raises(ValueError, match=message):
        prune_models(source, plans)
    assert not (tmp_path / "a").exists()


def test_recipes_that_see_other_variants_share_a_pass(tmp_path, source, tokens):
    """Each model is that of its recipe alone, bit for bit; each report says the variants that its model saw."""
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=2)
    changes = [
        {"variants": 2, "propagate": 0.5, "train_epochs": 1, "output_weights": "gradient"},
        {"sparsity": 0.7, "allocation": "owl"},
        {"variants": 1, "distil_epochs": 1},
    ]
    plans = [(recipe.model_copy(update=each), tmp_path / f"together-{i}") for i, each in enumerate(changes)]
    events = []
    together = prune_models(source, plans, observer=lambda event, *_: events.append(event))
    assert [report.plans for report in together] == [3, 3, 3]
    assert [report.calibration.variants for report in together] == [2, 0, 1]
    assert [event.variants for event in events if isinstance(event, Calibration)] == [2, 0, 1]
    assert sum(isinstance(event, Passed) for event in events) == 3
    for index, (each, folder) in enumerate(plans):
        alone = prune_model(source, tmp_path / f"alone-{index}", each)
        assert alone.calibration == together[index].calibration
        ours, theirs = stored(folder), stored(alone.output)
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{index} {key}")


def test_the_variants_of_a_recipe_follow_from_the_windows_of_its_pass(tmp_path, source, rng):
    """Method best has no variants of 100 windows, whatever it shares a pass with."""
    ids = rng.integers(0, len(VOCAB), (100, 4)).astype(np.int32)
    recipe = Recipe(method="wanda", calibration=ids, heldout_windows=0, variants=1)
    best = {"method": "best", "variants": None, "train_epochs": 0, "output_weights": "uniform"}
    reports = prune_models(source, [(recipe, tmp_path / "a"), (recipe.model_copy(update=best), tmp_path / "b")])
    assert [report.calibration.variants for report in reports] == [1, 0]


def test_two_recipes_for_one_folder_and_none_at_all_are_refused(tmp_path, source, tokens):
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=0)
    with pytest.raises(ValueError, match="its own output folder"):
        prune_models(source, [(recipe, tmp_path / "a"), (recipe, tmp_path / "b" / ".." / "a")])
    with pytest.raises(ValueError, match="give at least one recipe"):
        prune_models(source, [])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", often(["float32", "bfloat16"], "float32"))
def test_reconstruction_brings_the_stream_nearer_and_leaves_the_zeros(tmp_path, source, rng, dtype):
    """The blocks' outputs, recomputed from the stored model, on tokens of which the training saw a part."""
    tokens = rng.integers(0, len(VOCAB), (24, 16)).astype(np.int32)
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=8, dtype=dtype)
    settings = Reconstruction(epochs=6, learning_rate=3e-2)
    events = []
    prune_model(source, tmp_path / "plain", recipe)
    report = prune_model(
        source,
        tmp_path / "trained",
        recipe.model_copy(update={"train_epochs": settings}),
        observer=lambda event, *_: events.append(event),
    )
    plain, trained = audit_sparsity(tmp_path / "plain"), audit_sparsity(tmp_path / "trained")
    assert [a.zeros for a in plain] == [a.zeros for a in trained]
    assert [type(e) for e in events[2:]] == 3 * ([LayerRecord] * 7 + [BlockRecord, Passed])
    assert report.recipe["train_epochs"]["learning_rate"] == 3e-2
    for record in report.blocks:
        assert record.heldout_best < record.heldout_first
    lines = [json.loads(line) for line in (tmp_path / "trained" / "records.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == 3 * (["layer"] * 7 + ["block"])

    dense, after = load_decoder(source), load_decoder(tmp_path / "trained")
    x = y = run(dense.embed_tokens, tokens[16:])
    calibrated = run(dense.embed_tokens, tokens[:16])
    for block, target, record in zip(after.layers, dense.layers, report.blocks, strict=True):
        x, y, calibrated = run(block, x), run(target, y), run(target, calibrated)
        loss = jax.jit(stream_loss)(x, y, channel_weights([calibrated]))
        # bfloat16 rounds what was trained in float32.
        assert loss == pytest.approx(record.heldout_best, rel=1e-3 if dtype == "float32" else 0.05)


def test_a_diverging_reconstruction_keeps_the_pruned_weights_and_is_reported(tmp_path, source, tokens):
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=2)
    prune_model(source, tmp_path / "plain", recipe)
    wild = recipe.model_copy(update={"train_epochs": Reconstruction(learning_rate=1e6, warmup=0.0)})
    report = prune_model(source, tmp_path / "wild", wild)
    assert {record.status for record in report.blocks} <= {"DIVERGED", "NONFINITE"}
    for key, value in stored(tmp_path / "plain").items():
        np.testing.assert_array_equal(stored(tmp_path / "wild")[key], value, err_msg=key)


def test_a_reconstruction_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate must be positive and finite, given -1\.0"):
        Recipe(train_epochs=Reconstruction(learning_rate=-1.0))


def test_the_survey_tells_its_steps(tmp_path, source, tokens):
    events = []
    recipe = Recipe(method="wanda", output_weights="gradient", variants=2, calibration=tokens, heldout_windows=0)
    report = prune_model(source, tmp_path / "out", recipe, observer=lambda *told: events.append(told))
    told = [("variants, block", n, 6) for n in range(1, 7)] + [("survey, pass", n, 7) for n in range(1, 8)]
    assert events[2:15] == told
    assert isinstance(events[15][0], LayerRecord)
    assert events[15][1:] == (1, 21)
    assert report.survey_seconds > 0
