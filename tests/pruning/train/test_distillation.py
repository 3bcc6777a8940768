"""Training of a whole model on the dense model's logits: its gradient, decreasing divergence, fixed zeros, refusals."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparseopt.models import open_model
from sparseopt.pruning.base.activations import Batches, DiskBatches, Stream
from sparseopt.pruning.memory import distillation_bytes
from sparseopt.pruning.train import distillation, training
from sparseopt.pruning.train.distillation import Distillation, distil
from sparseopt.pruning.train.training import LEAST_SIZE, TrainingStatus
from tests.jitted import run
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder

WINDOWS, HELDOUT, TIME = 8, 4, 24
# Whole batches a step: the forward programs of training and judging are then the same.
QUICK = Distillation(epochs=12, learning_rate=2e-2, windows=4, patience=12)
STEPS = QUICK.epochs * WINDOWS // QUICK.windows


@pytest.fixture(autouse=True)
def slices(monkeypatch):
    """The logits of a batch do not fit into one slice, nor into any number of them."""
    monkeypatch.setattr(distillation, "LOGIT_ROWS", 10)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = np.random.default_rng(3)
    config = tiny_config(attention_bias=True)
    return open_model(write_folder(tmp_path_factory.mktemp("source"), config, random_tensors(config, rng)))


def through(blocks, x):
    for block in blocks:
        x = run(block, x)
    return x


def streams(model):
    """Before the first block and after the dense model's last: calibration batches, and one of held-out windows."""
    tokens = np.random.default_rng(4).integers(0, len(VOCAB), (WINDOWS + HELDOUT, TIME))
    x, dense = model.embedding()(jnp.asarray(tokens)), dense_blocks(model)
    parts = [*jnp.split(x, (WINDOWS + HELDOUT) // HELDOUT)]
    after = [through(dense, part) for part in parts]
    return tuple(Stream(Batches(each[:-1]), Batches(each[-1:])) for each in (parts, after))


def dense_blocks(model):
    return [model.block(index) for index in range(model.num_blocks)]


def pruned(model):
    """The blocks with the larger half of every linear, and the masks of what is kept."""
    blocks, masks = dense_blocks(model), []
    for block in blocks:
        weights = {name: block.read(f"{name}.weight") for name in block.linears}
        masks.append({name: jnp.abs(weight) > jnp.median(jnp.abs(weight)) for name, weight in weights.items()})
        block.write({f"{name}.weight": jnp.where(masks[-1][name], weights[name], 0) for name in weights})
    return blocks, masks


def parameters(blocks):
    flat = [nnx.to_flat_state(nnx.state(block)) for block in blocks]
    return {f"{i}.{'.'.join(path)}": np.array(value) for i, state in enumerate(flat) for path, value in state}


def assert_same_bits(before, after):
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name


def told_nothing(*_):
    pass


def distil_quick(model, blocks, settings=QUICK, masks=None, given=None):
    before, after = given or streams(model)
    return distil(blocks, model.head(), before, after, settings, told_nothing, masks)


def plain_divergence(head, dense, x):
    """In float64, from the definition."""
    p, q = (np.asarray(head(rows), np.float64) for rows in (dense, x))
    p, q = (np.exp(z - z.max(-1, keepdims=True)) for z in (p, q))
    p, q = (z / z.sum(-1, keepdims=True) for z in (p, q))
    return float(np.mean(np.sum(p * np.log(p / q), axis=-1)))


def test_a_step_follows_the_gradient_of_the_whole_model(model, monkeypatch):
    monkeypatch.setattr(training, "_adam", optax.identity())
    (before, after), (blocks, _), head = streams(model), pruned(model), model.head()
    rows, rate = np.array([2, 1, 3, 0], np.int32), np.float32(0.5)
    split = [nnx.split(block) for block in blocks]
    x, dense = before.calibration[1], after.calibration[1]

    @jax.jit
    @jax.value_and_grad
    def whole(params):
        y = x
        for (graph, _), own in zip(split, params, strict=True):
            y = nnx.merge(graph, own)(y)
        log_p, log_q = jax.nn.log_softmax(head(dense)), jax.nn.log_softmax(head(y))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    start = [params for _, params in split]
    loss, gradient = whole(start)
    trainer = distillation._ModelTrainer(
        head, told_nothing, blocks, [{}] * len(blocks), before, after, replace(QUICK, clip=1e6)
    )
    found, norm = trainer.step(1, rows, rate)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    norms = [math.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(own))) for own in gradient]
    assert float(norm) == pytest.approx(max(norms), rel=1e-4)

    def moved_by(p, new):
        """Relative to the root mean square of the tensor."""
        return (p - new) / (rate * jnp.maximum(jnp.sqrt(jnp.mean(p * p)), LEAST_SIZE))

    moved = jax.tree.map(moved_by, start, [state.params for state in trainer.states])
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-6, rtol=1e-3)


def test_the_divergence_falls_and_is_that_of_the_blocks_that_were_left(model):
    (before, after), (blocks, _), head = streams(model), pruned(model), model.head()
    told = []
    record = distil(blocks, head, before, after, QUICK, lambda *event: told.append(event))
    assert record.kind == "distillation"
    assert record.status == TrainingStatus.FINISHED.name
    assert (record.epochs, record.steps) == (QUICK.epochs, STEPS)
    assert told == [("distillation, step", done, STEPS) for done in range(1, STEPS + 1)]
    assert record.last_loss < 0.5 * record.first_loss
    assert record.heldout_best < 0.9 * record.heldout_first
    for loss, name in ((record.last_loss, "calibration"), (record.heldout_best, "heldout")):
        pairs = zip(getattr(before, name), getattr(after, name), strict=True)
        left = [plain_divergence(head, dense, through(blocks, x)) for x, dense in pairs]
        assert loss == pytest.approx(np.mean(left), rel=1e-4)


def test_masked_entries_stay_zero_and_all_others_are_trained(model):
    blocks, masks = pruned(model)
    # A linear without a mask is trained whole.
    del masks[1]["mlp.down_proj"]
    before = parameters(blocks)
    distil_quick(model, blocks, masks=masks)
    after = parameters(blocks)
    for name, value in before.items():
        block, _, path = name.partition(".")
        mask = masks[int(block)].get(path.removesuffix(".weight"))
        if mask is not None:
            assert np.array_equal(after[name] != 0, mask), name
        changed = after[name] != value
        assert changed.mean() > 0.9 * (1.0 if mask is None else np.mean(mask)), name


def test_a_model_that_gives_the_dense_answer_keeps_every_bit(model):
    blocks = dense_blocks(model)
    before = parameters(blocks)
    record = distil_quick(model, blocks)
    assert record.status == TrainingStatus.EXACT.name
    assert (record.epochs, record.steps) == (0, 0)
    assert abs(record.last_loss) < 1e-6
    assert_same_bits(before, parameters(blocks))


def test_the_best_epoch_is_kept_when_later_ones_are_worse(model):
    """A warm-up over nearly all steps: the first epochs are calm, then the rate becomes far too large."""
    (before, after), (blocks, _), head = streams(model), pruned(model), model.head()
    wild = replace(QUICK, epochs=30, learning_rate=1.0, warmup=0.99, patience=30, divergence=1.2)
    record = distil(blocks, head, before, after, wild, told_nothing)
    assert record.status == TrainingStatus.DIVERGED.name
    assert 0 < record.best_epoch < record.epochs < 30
    left = plain_divergence(head, after.heldout[0], through(blocks, before.heldout[0]))
    assert record.heldout_best == pytest.approx(left, rel=1e-4)
    assert left < record.heldout_first


@pytest.mark.parametrize("place", [0, 1])
def test_an_activation_that_is_not_a_number_changes_nothing_and_is_told(model, place):
    (blocks, _), given = pruned(model), list(streams(model))
    before = parameters(blocks)
    broken = [x.at[1, 3, 5].set(jnp.nan) for x in given[place].calibration]
    given[place] = Stream(Batches(broken), given[place].heldout)
    record = distil_quick(model, blocks, given=given)
    assert record.status == TrainingStatus.NONFINITE.name
    assert record.steps == 0
    assert_same_bits(before, parameters(blocks))


def test_a_gradient_that_is_not_finite_ends_the_training_at_the_start(model, monkeypatch):
    blocks, _ = pruned(model)
    before = parameters(blocks)
    plain = distillation._step_of_block

    def broken(state, fixed, x, after, *rest):
        return plain(state, fixed, x, after * jnp.nan, *rest)

    monkeypatch.setattr(distillation, "_step_of_block", broken)
    record = distil_quick(model, blocks)
    assert record.status == TrainingStatus.NONFINITE.name
    assert (record.steps, record.epochs) == (1, 0)
    assert_same_bits(before, parameters(blocks))


def test_the_seed_decides_and_the_place_of_the_streams_does_not(model, tmp_path):
    def trained(seed, place=None):
        blocks, _ = pruned(model)
        given = streams(model)
        if place is not None:
            given = tuple(Stream(on_disk(s.calibration, place), on_disk(s.heldout, place)) for s in given)
        distil_quick(model, blocks, replace(QUICK, epochs=1, seed=seed), given=given)
        return parameters(blocks)

    first = trained(0)
    assert_same_bits(first, trained(0, tmp_path))
    assert not np.array_equal(first["0.mlp.up_proj.weight"], trained(1)["0.mlp.up_proj.weight"])


def on_disk(batches, folder):
    found = DiskBatches(folder)
    for batch in batches:
        found.append(batch)
    return found


def test_all_processes_continue_with_the_blocks_of_the_first(model, monkeypatch):
    blocks, _ = pruned(model)
    monkeypatch.setattr(distillation.processes, "count", lambda: 2)
    monkeypatch.setattr(distillation, "agreed", lambda own: jax.tree.map(np.ones_like, own))
    distil_quick(model, blocks, replace(QUICK, epochs=1))
    assert all((value == 1).all() for value in parameters(blocks).values())
    assert run(blocks[0], jnp.ones((HELDOUT, TIME, 32))).shape == (HELDOUT, TIME, 32)


def test_one_program_serves_all_blocks_and_settings_and_another_run(model):
    distil_quick(model, pruned(model)[0], replace(QUICK, epochs=1))
    other = Distillation(epochs=2, learning_rate=1e-3, warmup=0, clip=1.0, windows=4, seed=3)
    assert distil_quick(model, pruned(model)[0], other).compile_seconds == 0


def test_the_estimate_covers_the_weights_and_moments_that_are_held(model):
    (before, after), (blocks, _) = streams(model), pruned(model)
    trainer = distillation._ModelTrainer(model.head(), told_nothing, blocks, [{}] * len(blocks), before, after, QUICK)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves([trainer.states, [nnx.state(block) for block in blocks]]))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(nnx.state(block))) for block in blocks]
    parts = distillation_bytes(model.config, sum(sizes), max(sizes), TIME)
    assert held == pytest.approx(parts["blocks"] - 4 * 4 * max(sizes), rel=1e-3)
    assert parts["activations of a step"] >= 4 * (len(blocks) + 1) * TIME * 32
    assert parts["embedding and head"] > model.head().lm_head.weight[...].nbytes


def test_what_cannot_be_is_said_before_any_work(model):
    blocks, masks = pruned(model)
    before, after = streams(model)
    with pytest.raises(ValueError, match="the distillation cannot be used") as caught:
        distil_quick(model, blocks, Distillation(epochs=0, learning_rate=math.nan, windows=0))
    assert len(str(caught.value).splitlines()) == 4
    with pytest.raises(ValueError, match="no blocks to train"):
        distil_quick(model, [])
    with pytest.raises(ValueError, match="masks must be one mapping a block, 3 in all, given 2"):
        distil_quick(model, blocks, masks=masks[:2])
    with pytest.raises(ValueError, match=r"mlp.up_proj has [\d,]+ non-zero weights off its mask"):
        distil_quick(model, blocks, masks=[{}, {"mlp.up_proj": jnp.eye(64, 32, dtype=bool)}, {}])
    with pytest.raises(ValueError, match="calibration inputs and targets must be as many batches"):
        distil_quick(model, blocks, given=(before, Stream(after.heldout, after.heldout)))
    with pytest.raises(ValueError, match="no calibration batches"):
        distil_quick(model, blocks, given=(Stream(Batches(), before.heldout), Stream(Batches(), after.heldout)))
