"""Variants of calibration windows: draws from the dense model's own distribution, and what training makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import open_model
from sparseopt.pruning import Recipe, ShrinkRecipe
from sparseopt.pruning.base.activations import Batches, DiskBatches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.run import variants
from sparseopt.pruning.run.calibration import CalibrationWindows
from sparseopt.pruning.run.variants import SHARE, draw, with_variants
from sparseopt.pruning.train.reconstruction import Reconstruction
from sparseopt.pruning.train.training import draw_orders
from tests.models.tiny import VOCAB

WINDOWS, TIME = 4, 24


@pytest.fixture(scope="module")
def windows():
    ids = np.random.default_rng(5).integers(0, len(VOCAB), (WINDOWS + 1, TIME)).astype(np.int32)
    return CalibrationWindows(ids[:WINDOWS], ids[WINDOWS:], ids[:0], None)


@pytest.fixture(scope="module")
def made(source, windows):
    """`made()`: two variants of each window, and what was told."""

    def with_two(kind=None):
        told, model = [], open_model(source)
        found = with_variants(model, windows, 2, kind or Batches(), BlockRunner(), lambda *event: told.append(event))
        return found, told

    return with_two


def test_a_share_of_the_tokens_is_drawn_again(tmp_path, windows, made, monkeypatch):
    found, told = made()
    assert found.calibration.shape == (3 * WINDOWS, TIME)
    np.testing.assert_array_equal(found.calibration[:WINDOWS], windows.calibration)
    np.testing.assert_array_equal(found.heldout, windows.heldout)
    changed = found.calibration[WINDOWS:].reshape(2, WINDOWS, TIME) != windows.calibration
    assert not changed[..., 0].any()
    assert 0.5 * SHARE < changed.mean() <= SHARE
    assert (changed[0] != changed[1]).any()
    assert told[-1] == ("variants, block", len(told), len(told))
    np.testing.assert_array_equal(made(DiskBatches(tmp_path))[0].calibration, found.calibration)
    # Draws do not depend on the slices.
    monkeypatch.setattr(variants, "LOGIT_BYTES", 5 * 4 * len(VOCAB))
    np.testing.assert_array_equal(made()[0].calibration, found.calibration)


def test_enough_rounds_give_draws_of_one_token_after_the_other(made, monkeypatch):
    """Jacobi's iteration ends where drawing from left to right does: each token fits those before it."""

    def after(rounds):
        monkeypatch.setattr(variants, "ROUNDS", rounds)
        return made()[0].calibration

    # No more rounds than tokens that are drawn again.
    np.testing.assert_array_equal(after(8), after(9))
    assert (after(1) != after(8)).any()


def test_draws_have_the_probabilities_of_the_logits():
    logits = jnp.asarray([0.0, 1.0, -1.0, 0.5])
    rows, keys = jnp.zeros((20_000, 2)), jax.random.split(jax.random.key(1), 20_000)
    drawn = draw(lambda x: jnp.broadcast_to(logits, (*x.shape[:2], 4)), rows, keys)
    frequencies = np.bincount(np.asarray(drawn), minlength=4) / len(rows)
    # Four standard deviations.
    np.testing.assert_allclose(frequencies, jax.nn.softmax(logits), atol=4 * 0.5 / np.sqrt(len(rows)))


@pytest.mark.parametrize("width", [1, 2])
def test_epochs_share_the_windows(width):
    """Two batches of four windows."""
    orders = draw_orders(2, 4, Reconstruction(epochs=6, windows=width, epoch_windows=2))
    assert [len(epoch) for epoch in orders] == [2 // width] * 6
    rows = np.concatenate([part[1] + 4 * part[0] for epoch in orders for part in epoch])
    assert sorted(rows[:8]) == list(range(8))
    whole = draw_orders(2, 4, Reconstruction(epochs=2, windows=width))
    assert [len(epoch) for epoch in whole] == [8 // width] * 2


def test_only_what_trains_has_variants_unasked_and_its_epochs_stay_as_long():
    assert Recipe().variants == 0
    assert Recipe(effort="most").variants == 3
    assert Recipe().all_windows == Recipe().window_count
    best = Recipe(method="best", windows=5)
    assert best.variants == 3
    assert best.all_windows == 20
    counts = [best.model_copy(update={"windows": count}).variants for count in (16, 32, 43, 64, 65, 128, 500)]
    assert counts == [3, 3, 1, 1, 0, 0, 0]
    assert best.model_copy(update={"windows": 500, "variants": 2}).variants == 2
    assert ShrinkRecipe(channels=0.5).variants == 0
    assert ShrinkRecipe(channels=0.5, variants=1).variants == 1
    assert best.reconstruction.epoch_windows == 5
    assert best.model_copy(update={"variants": 0}).reconstruction.epoch_windows is None
    assert best.model_copy(update={"train_epochs": Reconstruction(epoch_windows=7)}).reconstruction.epoch_windows == 7
