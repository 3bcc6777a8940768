"""Training of a pruned block: decreasing error, fixed zeros, the end of training, refused settings."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseopt.models import Block, open_model
from sparseopt.models.decoder.attention import QUERY_CHUNK
from sparseopt.pruning.base.activations import Batches, Stream
from sparseopt.pruning.train.reconstruction import Reconstruction, channel_weights, reconstruct_block, stream_loss
from sparseopt.pruning.train.training import TrainingStatus
from tests.jitted import run
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder

WINDOWS, HELDOUT, TIME = 12, 4, 24
QUICK = Reconstruction(epochs=6, learning_rate=3e-2, patience=6)


@pytest.fixture
def model(tmp_path, rng):
    config = tiny_config(attention_bias=True)
    tensors = random_tensors(config, rng)
    return open_model(write_folder(tmp_path / "source", config, tensors))


@pytest.fixture
def streams(model, rng):
    """Calibration and held-out streams in front of the first block, two batches and one."""
    x = model.embedding()(jnp.asarray(rng.integers(0, len(VOCAB), (WINDOWS + HELDOUT, TIME))))
    # Some tokens are far larger than the others, as in real models.
    x = x.at[:, 0].multiply(100)
    return [x[: WINDOWS // 2], x[WINDOWS // 2 : WINDOWS]], [x[WINDOWS:]]


def reconstruct_lists(block, masks, inputs, targets, heldout=(), heldout_targets=(), settings=None):
    stream = Stream(Batches(inputs), Batches(heldout))
    return reconstruct_block(block, masks, stream, Stream(Batches(targets), Batches(heldout_targets)), settings)


def prune(block, names=None):
    """Keep the larger half of every linear."""
    masks = {}
    for name in names or block.linears:
        weight = block.read(f"{name}.weight")
        masks[name] = jnp.abs(weight) > jnp.median(jnp.abs(weight))
        block.write({f"{name}.weight": jnp.where(masks[name], weight, 0)})
    return masks


def parameters(block):
    return {".".join(path): np.array(value) for path, value in nnx.to_flat_state(nnx.state(block))}


def assert_same_bits(before, after):
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name


@pytest.fixture
def task(model, streams):
    """The pruned first block with its masks, and the streams beside the dense block's outputs."""
    inputs, heldout = streams
    dense, block = model.block(0), model.block(0)
    targets, heldout_targets = [run(dense, x) for x in inputs], [run(dense, x) for x in heldout]
    return block, prune(block), inputs, targets, heldout, heldout_targets


def test_the_loss_falls_and_is_that_of_the_block_that_was_left(task):
    block, masks, *batches = task
    report = reconstruct_lists(block, masks, *batches, QUICK)
    inputs, targets, heldout, heldout_targets = batches
    assert report.last_loss < 0.5 * report.first_loss
    assert report.heldout_best < 0.8 * report.heldout_first
    weights = channel_weights(targets)
    left = [stream_loss(run(block, x), y, weights) for x, y in zip(inputs, targets, strict=True)]
    assert report.last_loss == pytest.approx(np.mean(left))
    judged = stream_loss(run(block, heldout[0]), heldout_targets[0], weights)
    assert report.heldout_best == pytest.approx(float(judged))
    assert report.status == TrainingStatus.FINISHED.name
    assert report.epochs == QUICK.epochs
    assert report.steps == QUICK.epochs * WINDOWS // QUICK.windows


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


def test_pruned_entries_stay_zero_and_all_others_are_trained(task):
    block, masks, *batches = task
    before = parameters(block)
    reconstruct_lists(block, masks, *batches, QUICK)
    after = parameters(block)
    for name, mask in masks.items():
        weight = after[f"{name}.weight"]
        assert np.array_equal(weight != 0, mask), name
        assert np.mean(weight != before[f"{name}.weight"]) > 0.9 * np.mean(mask), name
    for name in before.keys() - {f"{name}.weight" for name in masks}:
        assert not np.array_equal(before[name], after[name]), name


def test_a_kept_entry_may_start_at_zero(task):
    block, masks, *batches = task
    name = "mlp.up_proj"
    place = tuple(np.argwhere(np.asarray(masks[name]))[7])
    block.write({f"{name}.weight": block.read(f"{name}.weight").at[place].set(0)})
    reconstruct_lists(block, masks, *batches, QUICK)
    assert block.read(f"{name}.weight")[place] != 0


def test_only_linears_with_a_mask_are_trained_and_norms_if_asked_for(task):
    block, masks, *batches = task
    before = parameters(block)
    settings = Reconstruction(epochs=1, learning_rate=1e-3, train_norms=False)
    reconstruct_lists(block, {"mlp.gate_proj": masks["mlp.gate_proj"]}, *batches, settings)
    after = parameters(block)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["mlp.gate_proj.weight"]


def test_a_step_is_relative_to_the_size_of_the_weights(model, task):
    """The up projection 8 times as large, and what reads it an eighth: the same function, trained to the same."""
    _, _, *batches = task

    def trained(scale):
        block = model.block(0)
        masks = prune(block)
        scales = {"mlp.up_proj": scale, "mlp.down_proj": 1 / scale}
        block.write({f"{name}.weight": factor * block.read(f"{name}.weight") for name, factor in scales.items()})
        settings = dataclasses.replace(QUICK, epochs=2, clip=1e9)
        return reconstruct_lists(block, masks, *batches, settings)

    plain, scaled = trained(1), trained(8)
    assert scaled.first_loss == pytest.approx(plain.first_loss, rel=1e-5)
    assert scaled.last_loss == pytest.approx(plain.last_loss, rel=1e-3)
    assert plain.last_loss < 0.9 * plain.first_loss


def test_a_block_with_nothing_to_mend_keeps_every_bit(model, streams):
    inputs, heldout = streams
    block = model.block(0)
    masks = {name: jnp.ones(block.weight_shape(name), bool) for name in block.linears}
    before = parameters(block)
    targets, heldout_targets = [run(block, x) for x in inputs], [run(block, x) for x in heldout]
    report = reconstruct_lists(block, masks, inputs, targets, heldout, heldout_targets, QUICK)
    assert report.status == TrainingStatus.EXACT.name
    assert report.epochs == report.steps == 0
    assert report.first_loss == report.last_loss < 1e-12
    assert_same_bits(before, parameters(block))


@pytest.mark.parametrize("held_out", [True, False])
def test_a_learning_rate_of_a_million_leaves_the_start_and_says_so(task, held_out):
    block, masks, *batches = task
    before = parameters(block)
    settings = Reconstruction(learning_rate=1e6)
    report = reconstruct_lists(block, masks, *batches[: 4 if held_out else 2], settings=settings)
    assert report.status in (TrainingStatus.DIVERGED.name, TrainingStatus.NONFINITE.name)
    assert "smaller learning rate" in TrainingStatus[report.status].value
    assert report.epochs <= 1
    assert report.best_epoch == 0
    assert report.last_loss == report.first_loss
    assert report.heldout_best == report.heldout_first
    assert_same_bits(before, parameters(block))


def test_what_was_won_before_training_diverges_is_kept(task):
    """A warm-up over nearly all steps: the first epochs are calm, then the rate becomes far too large."""
    block, masks, *batches = task
    settings = Reconstruction(epochs=20, learning_rate=1.0, warmup=0.99, patience=20, divergence=1.5)
    report = reconstruct_lists(block, masks, *batches, settings)
    assert report.status == TrainingStatus.DIVERGED.name
    assert 0 < report.best_epoch < report.epochs < 20
    assert report.heldout_best < 0.9 * report.heldout_first
    judged = stream_loss(run(block, batches[2][0]), batches[3][0], channel_weights(batches[1]))
    assert report.heldout_best == pytest.approx(float(judged))


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_an_activation_that_is_not_a_number_changes_nothing_and_is_told(task, place):
    block, masks, *batches = task
    before = parameters(block)
    batches[place] = [x.at[1, 3, 5].set(jnp.nan) for x in batches[place]]
    report = reconstruct_lists(block, masks, *batches, QUICK)
    assert report.status == TrainingStatus.NONFINITE.name
    assert report.steps == 0
    assert_same_bits(before, parameters(block))


def test_training_stops_when_the_heldout_loss_no_longer_falls(task):
    """Held-out targets around what the pruned block gives already: every step leads away from them."""
    block, masks, inputs, targets, heldout, _ = task
    before = parameters(block)
    near = [1.001 * run(block, x) for x in heldout]
    settings = Reconstruction(epochs=9, learning_rate=1e-3, patience=2, divergence=math.inf)
    report = reconstruct_lists(block, masks, inputs, targets, heldout, near, settings)
    assert report.status == TrainingStatus.STOPPED.name
    assert (report.epochs, report.best_epoch) == (2, 0)
    assert report.heldout_best == report.heldout_first
    assert_same_bits(before, parameters(block))


def test_without_heldout_tokens_the_calibration_loss_decides(task):
    block, masks, inputs, targets, *_ = task
    report = reconstruct_lists(block, masks, inputs, targets, settings=QUICK)
    assert report.heldout_first is None
    assert report.heldout_best is None
    assert report.last_loss < 0.5 * report.first_loss


def test_one_trace_serves_all_blocks_and_settings(model, streams, monkeypatch):
    inputs, heldout = streams
    runs = []
    plain = Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *given: runs.append(1) or plain(self, *given))

    def reconstruct(index, settings):
        block = model.block(index)
        targets, tests = [run(block, x) for x in inputs], [run(block, x) for x in heldout]
        masks = prune(block)
        runs.clear()
        return reconstruct_lists(block, masks, inputs, targets, heldout, tests, settings)

    reconstruct(0, QUICK)
    report = reconstruct(1, Reconstruction(epochs=2, learning_rate=1e-4, warmup=0, clip=1.0, seed=3))
    assert report.steps == 2 * WINDOWS // QUICK.windows
    assert report.compile_seconds == 0
    assert not runs


def test_the_seed_decides_the_order_and_nothing_else_is_random(model, task):
    _, _, *batches = task

    def trained(seed):
        block = model.block(0)
        reconstruct_lists(block, prune(block), *batches, Reconstruction(epochs=2, learning_rate=1e-3, seed=seed))
        return parameters(block)

    first = trained(0)
    assert_same_bits(first, trained(0))
    assert not np.array_equal(first["mlp.up_proj.weight"], trained(1)["mlp.up_proj.weight"])


def test_the_gradient_through_a_block_is_that_of_finite_differences(model, rng):
    """Also over more than one chunk of queries, where scores of later keys are minus infinity."""
    tokens = jnp.asarray(rng.integers(0, len(VOCAB), (2, QUERY_CHUNK + 22)))
    x = model.embedding()(tokens)
    target = run(model.block(0), x)
    block = model.block(0)
    prune(block)
    graph, start = nnx.split(block)

    @jax.jit
    def loss(params):
        return stream_loss(nnx.merge(graph, params)(x), target, jnp.ones(x.shape[-1]))

    gradient = jax.jit(jax.grad(loss))(start)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    paths = [path for path, _ in nnx.to_flat_state(start)]
    leaves, structure = jax.tree.flatten(start)
    gradients = jax.tree.leaves(gradient)
    for i, path in enumerate(paths):
        # Along the gradient of one parameter, where the difference is far above the rounding of float32.
        size = float(jnp.linalg.norm(gradients[i]))
        step = 3e-3 / size

        def moved(by, i=i):
            return loss(structure.unflatten([*leaves[:i], leaves[i] + by * gradients[i], *leaves[i + 1 :]]))

        difference = float(moved(step) - moved(-step)) / (2 * step)
        assert difference == pytest.approx(size**2, rel=2e-2), path


def test_one_free_linear_ends_at_the_least_squares_optimum(model, streams):
    """With only `down_proj` free the block is linear in what is trained: the optimum is a small problem a row."""
    inputs, _ = streams
    name = "mlp.down_proj"
    target_block, block = model.block(1), model.block(0)
    mask = prune(block, [name])[name]
    targets = [run(target_block, x) for x in inputs]
    settings = Reconstruction(
        epochs=200, learning_rate=0.2, windows=6, clip=1e3, patience=200, divergence=math.inf, train_norms=False
    )
    report = reconstruct_lists(block, {name: mask}, inputs, targets, settings=settings)

    @jax.jit
    def output_and_hidden(block, x):
        taken = {}
        return block(x, tap=lambda tap, value: taken.setdefault(tap, value)), taken["mlp_hidden"]

    y = np.asarray(jnp.concatenate(targets), np.float64)
    output, hidden = (np.asarray(value, np.float64) for value in output_and_hidden(block, jnp.concatenate(inputs)))
    hidden = hidden.reshape(-1, mask.shape[1])
    weight = np.asarray(block.read(f"{name}.weight"), np.float64)
    tokens = len(hidden)
    weights = channel_weights(targets)
    root = 1 / np.sqrt((weights * y.reshape(tokens, -1) ** 2).sum(-1) * tokens)
    rest = (y - output).reshape(tokens, -1) + hidden @ weight.T
    optimum = 0.0
    for row in range(mask.shape[0]):
        chosen = np.asarray(mask[row])
        design, wanted = hidden[:, chosen] * root[:, None], rest[:, row] * root
        best = np.linalg.lstsq(design, wanted, rcond=None)[0]
        optimum += weights[row] * np.sum((design @ best - wanted) ** 2)
    assert optimum < 0.9 * report.first_loss
    assert optimum * (1 - 1e-4) <= report.last_loss <= 1.01 * optimum


def test_rates_rise_and_fall_and_are_never_zero():
    rates = Reconstruction(learning_rate=0.5, warmup=0.25).rates(16)
    assert rates.dtype == np.float32
    assert (np.diff(rates[:4]) > 0).all()
    assert (np.diff(rates[4:]) < 0).all()
    assert rates.max() < 0.5
    assert rates.max() == pytest.approx(0.5, rel=0.02)
    assert 0 < rates[-1] < 0.01
    np.testing.assert_allclose(Reconstruction(learning_rate=0.5, warmup=0).rates(1), [0.25])


def test_what_cannot_be_is_listed_before_any_work(task):
    block, masks, inputs, targets, *_ = task
    wrong = Reconstruction(epochs=0, learning_rate=0.0, warmup=1.0, windows=0, clip=-1, patience=0, divergence=1)
    with pytest.raises(ValueError, match="the reconstruction cannot be used") as caught:
        reconstruct_lists(block, masks, inputs, targets, settings=wrong)
    lines = str(caught.value).splitlines()[1:]
    assert {line.split()[0] for line in lines} == {
        *("epochs", "learning_rate", "warmup", "windows", "clip", "patience", "divergence")
    }
    with pytest.raises(ValueError, match=r"learning_rate must be positive and finite, given nan"):
        Reconstruction(learning_rate=math.nan).check()
    with pytest.raises(ValueError, match=r"masks must name linears of the block .* given mlp.side_proj"):
        reconstruct_lists(block, {"mlp.side_proj": masks["mlp.up_proj"]}, inputs, targets)
    with pytest.raises(ValueError, match=r"mask of mlp.up_proj must be bool of shape \[64, 32\]"):
        reconstruct_lists(block, {"mlp.up_proj": masks["mlp.up_proj"].T}, inputs, targets)
    with pytest.raises(ValueError, match=r"mlp.up_proj has [\d,]+ non-zero weights off its mask; prune the block"):
        reconstruct_lists(block, {"mlp.up_proj": jnp.eye(64, 32, dtype=bool)}, inputs, targets)
    with pytest.raises(ValueError, match="calibration inputs and targets must be as many batches"):
        reconstruct_lists(block, masks, inputs, targets[:1])
    with pytest.raises(ValueError, match="held-out inputs and targets must be as many batches"):
        reconstruct_lists(block, masks, inputs, targets, inputs[:1])
    with pytest.raises(ValueError, match="no calibration batches"):
        reconstruct_lists(block, masks, [], [])


def test_windows_a_step_divide_a_batch(task):
    block, masks, inputs, targets, *_ = task
    settings = Reconstruction(epochs=1, learning_rate=1e-4, windows=4)
    assert inputs[0].shape[0] == 6
    assert reconstruct_lists(block, masks, inputs, targets, settings=settings).steps == WINDOWS // 3
