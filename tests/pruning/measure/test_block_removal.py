"""Which whole blocks go: against the losses of models written without them, and what lazy removal leaves out."""

import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from sparseopt.core.base.mesh import AXIS
from sparseopt.models import open_model
from sparseopt.pruning import perplexity
from sparseopt.pruning.base.activations import Batches, DiskBatches, SpreadBatches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.base.records import RemovalRecord
from sparseopt.pruning.measure import block_removal
from sparseopt.pruning.measure.block_removal import greedy_removal, removal_order, trial_of
from sparseopt.pruning.run.calibration import CalibrationWindows
from sparseopt.pruning.text.windows import begin_windows
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.whole_runs import predicted, without

BLOCKS, BOS, TRIALS = 5, 1, itertools.count()
# What the linears that write into the stream are multiplied with, block by block: they differ in what they do.
SIZES = (1.0, 0.3, 0.0, 0.6, 0.8)


def config(blocks):
    return tiny_config(num_hidden_layers=blocks)


@pytest.fixture(scope="module")
def tensors():
    found = random_tensors(config(BLOCKS), np.random.default_rng(3))
    for index, size in enumerate(SIZES):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found[f"model.layers.{index}.{name}.weight"] *= np.float32(size)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory, tensors):
    return open_model(write_folder(tmp_path_factory.mktemp("five"), config(BLOCKS), tensors))


@pytest.fixture(scope="module")
def windows(model, tokens):
    ids = predicted(model.source.path, begin_windows(tokens, BOS), start=1)
    return CalibrationWindows(ids, ids[:0], ids[:0], BOS)


def order(model, windows, count, told=lambda *_: None, *, kind=None, **settings):
    # A key of its own, so that each measures again.
    work = SimpleNamespace(model=model, windows=windows, runner=BlockRunner(), observer=told, batches=kind or Batches())
    work.key = lambda *_: {"trial": next(TRIALS)}
    trial = trial_of(work, windows.calibration)
    return removal_order(trial, count, **settings)


def chosen(records):
    return [record.block for record in records]


def test_it_is_the_greedy_order_of_whole_models_written_without_the_blocks(tmp_path, tensors, model, windows):
    def loss(blocks):
        name = "-".join(map(str, sorted(blocks))) or "dense"
        folder = write_folder(tmp_path / name, config(BLOCKS - len(blocks)), without(tensors, BLOCKS, blocks))
        # The last token of the windows before BOS was put first is not read.
        ids = np.pad(windows.calibration[:, 1:], ((0, 0), (0, 1)))
        return np.log(perplexity(folder, ids, bos=BOS))

    told = []
    records, gone, dense = order(model, windows, 3, lambda *event: told.append(event)), [], loss([])
    for record in records:
        losses = {block: loss([*gone, block]) for block in range(BLOCKS) if block not in gone}
        gone.append(min(losses, key=losses.get))
        assert record.block == gone[-1]
        assert record.loss == pytest.approx(losses[record.block], rel=1e-6)
        assert record.rise == pytest.approx(losses[record.block] - dense, abs=1e-6)
        assert record.seconds > 0
    # A block that does nothing goes first and costs nothing.
    assert (records[0].block, records[0].rise) == (2, 0.0)
    # The observer hears of every pass and of every block chosen.
    chosen = [event for event in told if isinstance(event[0], RemovalRecord)]
    assert chosen == [(record, done, 3) for done, record in enumerate(records, 1)]
    assert told[BLOCKS : 2 * BLOCKS] == [("removal 1 of 3, block", done, BLOCKS) for done in range(1, BLOCKS + 1)]


def test_the_first_removal_above_the_rise_allowed_is_the_last(model, windows):
    records = order(model, windows, 3)
    assert chosen(order(model, windows, 3, most=records[1].rise / 2)) == chosen(records[:2])
    assert chosen(order(model, windows, 3, most=records[1].rise)) == chosen(records)


class SetFunction:
    """Stands for a trial: the loss of removed blocks is a sum of one term a block and one a pair."""

    def __init__(self, rng, blocks):
        self.work, self.measured = SimpleNamespace(model=SimpleNamespace(num_blocks=blocks)), 0
        self.each = rng.uniform(0.5, 2, blocks)
        # Another block's removal raises an increase by up to 20 % or lowers it by up to 3 %.
        self.pairs = np.triu(rng.uniform(-0.03, 0.2, (blocks, blocks)) * np.minimum.outer(self.each, self.each), 1)

    def loss(self, removed):
        gone = sorted(removed)
        return 3.0 + self.each[gone].sum() + self.pairs[np.ix_(gone, gone)].sum()

    def dense_loss(self):
        return self.loss([])

    def losses(self, removed, stage):
        self.measured += len(removed)
        return [self.loss(blocks) for blocks in removed]


def test_lazy_removal_measures_a_part_of_the_candidates_and_finds_the_same_blocks(rng):
    """Five of 30 blocks, so that no increase falls by more than `SLACK` in all."""
    for _ in range(20):
        function, gone = SetFunction(rng, 30), []
        found = chosen(greedy_removal(function, 5))
        for _ in found:
            rest = [block for block in range(30) if block not in gone]
            gone.append(min(rest, key=lambda block, gone=gone: function.loss([*gone, block])))
        assert found == gone
        # The first removal measures all.
        assert function.measured - 30 < 0.6 * (29 + 28 + 27 + 26)


@pytest.mark.parametrize(("most", "scored"), [(72, [0, 2, 4]), (1, [0])])
def test_only_windows_spread_over_all_are_scored(model, windows, monkeypatch, most, scored):
    """Of seven windows of 24 tokens three, and one at least."""
    (part,) = order(model, windows._replace(calibration=windows.calibration[scored]), 1)
    monkeypatch.setattr(block_removal, "TOKENS", most)
    (found,) = order(model, windows, 1)
    assert (found.block, found.loss) == (part.block, part.loss)


def test_activations_on_disk_or_from_several_devices_change_nothing(tmp_path, model, windows):
    kept = [(r.block, r.loss) for r in order(model, windows, 2)]
    for kind in (DiskBatches(tmp_path), SpreadBatches(Mesh(np.asarray(jax.devices()[:1]), (AXIS,)))):
        assert [(r.block, r.loss) for r in order(model, windows, 2, kind=kind)] == kept


def test_a_dense_model_that_overflows_is_an_error(tmp_path, tensors, windows):
    key = "model.layers.0.mlp.down_proj.weight"
    broken = write_folder(tmp_path / "broken", config(BLOCKS), tensors | {key: np.full_like(tensors[key], 3e38)})
    model = open_model(broken)
    with pytest.raises(RuntimeError, match=r"the loss of .* is not finite: activations overflow"):
        order(model, windows, 1)
