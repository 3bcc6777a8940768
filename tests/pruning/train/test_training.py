"""Training on the dense model's answers: facts of one block and of all together."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import Block
from sparseopt.pruning.base.activations import Batches, DiskBatches, Stream
from sparseopt.pruning.train.reconstruction import channel_weights, stream_loss
from sparseopt.pruning.train.training import TrainingStatus
from tests.pruning.train.tasks import WINDOWS, OfModel, assert_same_bits, parameters


def test_the_loss_falls_and_is_that_of_what_was_left(task):
    (blocks, masks), told, settings = task.pruned(), [], task.quick
    record = task.train(blocks, masks, told=lambda *event: told.append(event))
    assert record.status == TrainingStatus.FINISHED.name
    assert record.epochs == settings.epochs
    assert record.steps == settings.epochs * WINDOWS // settings.windows
    assert record.last_loss < task.falls[0] * record.first_loss
    assert record.heldout_best < task.falls[1] * record.heldout_first
    before, after = task.streams
    for loss, name in ((record.last_loss, "calibration"), (record.heldout_best, "heldout")):
        pairs = zip(getattr(before, name), getattr(after, name), strict=True)
        assert loss == pytest.approx(np.mean([task.loss(blocks, *pair) for pair in pairs]), rel=1e-4)
    if isinstance(task, OfModel):
        assert record.kind == "distillation"
        assert told == [("distillation, step", done, record.steps) for done in range(1, record.steps + 1)]


def test_masked_entries_stay_zero_and_all_others_are_trained(task):
    blocks, masks = task.pruned()
    # A kept entry may start at zero.
    path = "mlp.up_proj.weight"
    place = tuple(np.argwhere(np.asarray(masks[0]["mlp.up_proj"]))[7])
    blocks[0].write({path: blocks[0].read(path).at[place].set(0)})
    if isinstance(task, OfModel):
        # A linear without a mask is trained whole.
        del masks[1]["mlp.down_proj"]
    before = parameters(blocks)
    task.train(blocks, masks)
    after = parameters(blocks)
    for name, value in before.items():
        block, _, path = name.partition(".")
        mask = masks[int(block)].get(path.removesuffix(".weight"))
        if mask is not None:
            assert np.array_equal(after[name] != 0, mask), name
        changed = after[name] != value
        assert changed.mean() > 0.9 * (1.0 if mask is None else np.mean(mask)), name


def test_what_gives_the_dense_answer_keeps_every_bit(task):
    blocks = task.dense()
    before = parameters(blocks)
    record = task.train(blocks, task.without_masks(blocks))
    assert record.status == TrainingStatus.EXACT.name
    assert record.epochs == record.steps == 0
    assert record.first_loss == record.last_loss
    assert abs(record.last_loss) < task.exact
    assert_same_bits(before, parameters(blocks))


def test_what_was_won_before_training_diverges_is_kept(task):
    blocks, masks = task.pruned()
    record = task.train(blocks, masks, task.wild)
    assert record.status == TrainingStatus.DIVERGED.name
    assert 0 < record.best_epoch < record.epochs < task.wild.epochs
    before, after = task.streams
    assert record.heldout_best == pytest.approx(task.loss(blocks, before.heldout[0], after.heldout[0]), rel=1e-4)
    assert record.heldout_best < record.heldout_first


def test_a_learning_rate_of_a_million_leaves_the_start_and_says_so(task):
    blocks, masks = task.pruned()
    before = parameters(blocks)
    record = task.train(blocks, masks, replace(task.quick, learning_rate=1e6))
    assert record.status in (TrainingStatus.DIVERGED.name, TrainingStatus.NONFINITE.name)
    assert "smaller learning rate" in TrainingStatus[record.status].value
    assert record.epochs <= 1
    assert record.best_epoch == 0
    assert record.last_loss == record.first_loss
    assert record.heldout_best == record.heldout_first
    assert_same_bits(before, parameters(blocks))


@pytest.mark.parametrize(("place", "part"), [(0, "heldout"), (1, "calibration")])
def test_an_activation_that_is_not_a_number_changes_nothing_and_is_told(task, place, part):
    (blocks, masks), streams = task.pruned(), list(task.streams)
    before = parameters(blocks)
    broken = Batches([x.at[1, 3, 5].set(jnp.nan) for x in getattr(streams[place], part)])
    streams[place] = replace(streams[place], **{part: broken})
    record = task.train(blocks, masks, streams=streams)
    assert record.status == TrainingStatus.NONFINITE.name
    assert record.steps == 0
    assert_same_bits(before, parameters(blocks))


def test_the_seed_decides_and_the_place_of_the_streams_does_not(task, tmp_path):
    def on_disk(batches):
        found = DiskBatches(tmp_path)
        for batch in batches:
            found.append(batch)
        return found

    def trained(seed, streams=None):
        blocks, masks = task.pruned()
        task.train(blocks, masks, replace(task.quick, epochs=1, seed=seed), streams)
        return parameters(blocks)

    first, moved = trained(0), [Stream(on_disk(each.calibration), on_disk(each.heldout)) for each in task.streams]
    assert_same_bits(first, trained(0, moved))
    assert not np.array_equal(first["0.mlp.up_proj.weight"], trained(1)["0.mlp.up_proj.weight"])


def test_one_program_serves_all_blocks_and_settings_and_another_run(task, monkeypatch):
    blocks, masks = task.pruned()
    task.train(blocks, masks, replace(task.quick, epochs=1))
    traced, call = [], Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *given: traced.append(1) or call(self, *given))
    others = type(task)(task.model)
    blocks, masks = others.pruned()
    traced.clear()
    other = replace(task.quick, epochs=2, learning_rate=1e-3, warmup=0, clip=1.0, seed=3)
    assert task.train(blocks, masks, other).compile_seconds == 0
    assert not traced


WRONG = {"epochs": 0, "learning_rate": 0.0, "warmup": 1.0, "windows": 0, "clip": -1, "patience": 0, "divergence": 1}


def test_what_cannot_be_is_said_before_any_work(task):
    blocks, masks = task.pruned()
    with pytest.raises(ValueError, match=f"the {task.quick.what} cannot be used") as caught:
        task.train(blocks, masks, replace(task.quick, **WRONG))
    assert {line.split()[0] for line in str(caught.value).splitlines()[1:]} == set(WRONG)
    with pytest.raises(ValueError, match=r"learning_rate must be positive and finite, given nan"):
        replace(task.quick, learning_rate=math.nan).check()


def test_the_loss_is_the_mean_relative_error_of_a_token(rng):
    target = rng.normal(size=(2, 5, 8)).astype(np.float32) * np.array([1e3, 1, 1, 1, 0], np.float32)[:, None]
    output = target + rng.normal(size=target.shape).astype(np.float32)
    error, size = ((output - target) ** 2).sum(-1), (target**2).sum(-1)
    relative = (error[:, :4] / size[:, :4]).sum() / 10
    assert float(stream_loss(output, target, np.ones(8))) == pytest.approx(relative, rel=1e-5)
    assert float(stream_loss(7 * target, 7 * target, np.ones(8))) == 0


def test_the_loss_does_not_depend_on_the_scale_of_a_channel(rng):
    """Where all tokens are equally large: then the share of a channel is its mean square."""
    target = rng.choice([-1, 1], (2, 5, 8)).astype(np.float32)
    output = target + rng.normal(size=target.shape).astype(np.float32)
    scale = np.array([10, 3, 1, 1, 1, 1, 1, 0.3], np.float32)
    losses = [float(stream_loss(s * output, s * target, channel_weights([s * target]))) for s in (1, scale)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    np.testing.assert_array_equal(channel_weights([0 * target]), np.ones(8))
