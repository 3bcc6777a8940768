"""Events of a run, reconstruction inside the pipeline, and the steps that are told before the blocks."""

import itertools

import jax
import numpy as np
import pytest

from sparseopt.models import load_decoder
from sparseopt.pruning import Recipe, prune_model
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.base.records import BlockRecord, Calibration, Footprint, LayerRecord, Passed
from sparseopt.pruning.recipe import pass_recipe
from sparseopt.pruning.train.reconstruction import Reconstruction, channel_weights, stream_loss
from tests.jitted import run
from tests.models.tiny import VOCAB
from tests.tiers import often


@pytest.mark.parametrize(
    ("targets", "passes", "layers"),
    [(None, 3, 7), pytest.param(["re:.*layers.0", "re:.*layers.2"], 2, 7, marks=pytest.mark.thorough)],
)
def test_grams_are_gathered_once_for_each_block_that_is_pruned(
    tmp_path, source, tokens, monkeypatch, targets, passes, layers
):
    seen, grams = [], BlockRunner.grams
    monkeypatch.setattr(BlockRunner, "grams", lambda *given, **rest: seen.append(1) or grams(*given, **rest))
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=0, targets=targets)
    events = []
    prune_model(source, tmp_path / "out", recipe, observer=lambda event, _, total: events.append((event, total)))
    assert len(seen) == passes
    assert [type(event) for event, _ in events[:2]] == [Calibration, Footprint]
    # Three blocks have passed; the others are layers.
    blocks = [[LayerRecord] * (0 if targets and index == 1 else layers) + [Passed] for index in range(3)]
    assert [type(event) for event, _ in events[2:]] == list(itertools.chain(*blocks))
    assert {total for _, total in events} == {sum(map(len, blocks)) - 3}


def test_the_variants_of_a_recipe_follow_from_the_windows_of_its_run(tmp_path, source, tokens, monkeypatch):
    """Method best has no variants of many windows."""
    monkeypatch.setattr(pass_recipe, "MOST_WINDOWS", 5)
    recipe = Recipe(method="best", calibration=tokens, train_epochs=0, output_weights="uniform")
    assert prune_model(source, tmp_path / "out", recipe).calibration.variants == 0


@pytest.mark.parametrize("dtype", often(["float32", "bfloat16"], "float32"))
def test_reconstruction_brings_the_stream_nearer(tmp_path, source, rng, dtype):
    """The blocks' outputs, recomputed from the stored model, on tokens of which the training saw a part."""
    tokens = rng.integers(0, len(VOCAB), (24, 16)).astype(np.int32)
    settings, events = Reconstruction(epochs=6, learning_rate=3e-2), []
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=8, dtype=dtype, train_epochs=settings)
    report = prune_model(source, tmp_path / "out", recipe, observer=lambda event, *_: events.append(event))
    assert [type(e) for e in events[2:]] == 3 * ([LayerRecord] * 7 + [BlockRecord, Passed])
    assert report.recipe["train_epochs"]["learning_rate"] == 3e-2
    dense, after = load_decoder(source), load_decoder(tmp_path / "out")
    x = y = run(dense.embed_tokens, tokens[16:])
    calibrated = run(dense.embed_tokens, tokens[:16])
    for block, target, record in zip(after.layers, dense.layers, report.blocks, strict=True):
        assert record.heldout_best < record.heldout_first
        x, y, calibrated = run(block, x), run(target, y), run(target, calibrated)
        loss = jax.jit(stream_loss)(x, y, channel_weights([calibrated]))
        # bfloat16 rounds what was trained in float32.
        assert loss == pytest.approx(record.heldout_best, rel=1e-3 if dtype == "float32" else 0.05)
