"""Training of one block alone on the dense block's answers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseopt.layers.bits import multiples_of, parse_bits
from sparseopt.models import open_model
from sparseopt.models.decoder.attention import QUERY_CHUNK
from sparseopt.pruning.base.activations import Batches, Stream
from sparseopt.pruning.train.reconstruction import Reconstruction, channel_weights, reconstruct_block, stream_loss
from sparseopt.pruning.train.training import TrainingStatus
from tests.jitted import run
from tests.models.tiny import VOCAB
from tests.pruning.train.tasks import WINDOWS, assert_same_bits, parameters


def test_only_linears_with_a_mask_are_trained_and_norms_if_asked_for(of_block):
    blocks, masks = of_block.pruned()
    before = parameters(blocks)
    settings = Reconstruction(epochs=1, learning_rate=1e-3, train_norms=False)
    of_block.train(blocks, [{"mlp.gate_proj": masks[0]["mlp.gate_proj"]}], settings)
    after = parameters(blocks)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"0.mlp.gate_proj.weight", "0.mlp.gate_proj.bias"}


@pytest.mark.parametrize("number", [0, pytest.param("experts", marks=pytest.mark.thorough)])
def test_of_weights_on_a_grid_the_scales_are_trained_and_the_multiples_stay(of_block, models, number):
    bits, (before, after) = parse_bits("int4:8"), of_block.streams
    block = of_block.dense()[0] if number == 0 else open_model(models(number)).block(0)

    def on_grid(weight):
        groups = np.asarray(weight).reshape(-1, 8)
        scale = (np.abs(groups).max(axis=1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
        return (scale * np.clip(np.rint(groups / scale), -8, 7)).reshape(weight.shape)

    names = [name for name in block.linears if name != "self_attn.k_proj"]
    block.write({f"{name}.weight": on_grid(block.read(f"{name}.weight")) for name in names})
    kept, start = block.copy(), parameters([block])
    nothing = {name: jnp.zeros(block.weight_shape(name), bool) for name in block.linears}
    settings = replace(of_block.quick, learning_rate=1e-2)
    record = reconstruct_block(block, nothing, before, after, settings, 0, dict.fromkeys(names, bits))
    assert record.heldout_best < 0.98 * record.heldout_first
    for name in names:
        (old, first), (new, last) = (
            multiples_of(np.asarray(each.read(f"{name}.weight")), bits) for each in (kept, block)
        )
        assert np.array_equal(old, new), name
        assert not np.array_equal(first, last), name
    changed = {name for name, value in parameters([block]).items() if not np.array_equal(value, start[name])}
    assert "0.self_attn.k_proj.weight" not in changed
    assert "0.attention_norm.weight" in changed


def test_a_step_is_relative_to_the_size_of_the_weights(of_block):
    """The up projection 8 times as large, and what reads it an eighth: the same function, trained to the same."""

    def trained(scale):
        (block,), masks = of_block.pruned()
        scales = {"mlp.up_proj.weight": scale, "mlp.up_proj.bias": scale, "mlp.down_proj.weight": 1 / scale}
        block.write({path: factor * block.read(path) for path, factor in scales.items()})
        return of_block.train([block], masks, replace(of_block.quick, epochs=2, clip=1e9))

    plain, scaled = trained(1), trained(8)
    assert scaled.first_loss == pytest.approx(plain.first_loss, rel=1e-5)
    assert scaled.last_loss == pytest.approx(plain.last_loss, rel=1e-3)
    assert plain.last_loss < 0.9 * plain.first_loss


def test_training_stops_when_the_heldout_loss_no_longer_falls(of_block):
    """Held-out targets around what the pruned block gives already: every step leads away from them."""
    (blocks, masks), (before, after) = of_block.pruned(), of_block.streams
    start = parameters(blocks)
    near = Stream(after.calibration, Batches([1.001 * run(blocks[0], x) for x in before.heldout]))
    settings = replace(of_block.long, learning_rate=1e-3, patience=2)
    record = of_block.train(blocks, masks, settings, (before, near))
    assert record.status == TrainingStatus.STOPPED.name
    assert (record.epochs, record.best_epoch) == (2, 0)
    assert record.heldout_best == record.heldout_first
    assert_same_bits(start, parameters(blocks))


def test_without_heldout_tokens_the_calibration_loss_decides_and_windows_a_step_divide_a_batch(of_block):
    blocks, masks = of_block.pruned()
    streams = [Stream(each.calibration, Batches()) for each in of_block.streams]
    record = of_block.train(blocks, masks, streams=streams)
    assert record.heldout_first is record.heldout_best is None
    assert record.last_loss < 0.5 * record.first_loss
    settings = Reconstruction(epochs=1, learning_rate=1e-4, windows=3)
    assert of_block.train(*of_block.pruned(), settings, streams).steps == WINDOWS // 2


def test_the_gradient_through_a_block_is_that_of_finite_differences(of_block, rng):
    """Also over more than one chunk of queries, where scores of later keys are minus infinity."""
    tokens = jnp.asarray(rng.integers(0, len(VOCAB), (2, QUERY_CHUNK + 22)))
    x = of_block.model.embedding()(tokens)
    target = run(of_block.dense()[0], x)
    graph, start = nnx.split(of_block.pruned()[0][0])

    @jax.jit
    def loss(params):
        return stream_loss(nnx.merge(graph, params)(x), target, jnp.ones(x.shape[-1]))

    leaves, structure = jax.tree.flatten(start)
    for i, slope in enumerate(jax.tree.leaves(jax.jit(jax.grad(loss))(start))):
        # Along the gradient of one parameter, where the difference is far above the rounding of float32.
        size = float(jnp.linalg.norm(slope))
        step = 3e-3 / size
        ends = [structure.unflatten([*leaves[:i], leaves[i] + by * slope, *leaves[i + 1 :]]) for by in (step, -step)]
        difference = (float(loss(ends[0])) - float(loss(ends[1]))) / (2 * step)
        assert difference == pytest.approx(size**2, rel=2e-2), i


def test_one_free_linear_ends_at_the_least_squares_optimum(model, of_block):
    """With only `down_proj` free the block is linear in what is trained: the optimum is a small problem a row."""
    name, inputs = "mlp.down_proj", list(of_block.streams[0].calibration)
    (block,) = of_block.dense()
    weight = block.read(f"{name}.weight")
    mask = jnp.abs(weight) > jnp.median(jnp.abs(weight))
    block.write({f"{name}.weight": jnp.where(mask, weight, 0), f"{name}.bias": jnp.zeros(32)})
    targets = [run(model.block(1), x) for x in inputs]
    settings = replace(of_block.long, learning_rate=0.2, windows=4, clip=1e3, train_norms=False)
    streams = Stream(Batches(inputs), Batches()), Stream(Batches(targets), Batches())
    record = of_block.train([block], [{name: mask}], settings, streams)
    output, hidden = (
        np.asarray(value, np.float64).reshape(-1, value.shape[-1])
        for value in jax.jit(output_and_hidden)(block, jnp.concatenate(inputs))
    )
    # The bias is one more input, of one.
    hidden = np.column_stack([hidden, np.ones(len(hidden))])
    weight = np.column_stack([np.asarray(block.read(f"{name}.{part}"), np.float64) for part in ("weight", "bias")])
    y, channels = np.asarray(jnp.concatenate(targets), np.float64).reshape(output.shape), channel_weights(targets)
    root = 1 / np.sqrt((channels * y**2).sum(-1) * len(y))
    rest, optimum = y - output + hidden @ weight.T, 0.0
    for row in range(mask.shape[0]):
        chosen = np.append(np.asarray(mask[row]), True)
        design, wanted = hidden[:, chosen] * root[:, None], rest[:, row] * root
        best = np.linalg.lstsq(design, wanted, rcond=None)[0]
        optimum += channels[row] * np.sum((design @ best - wanted) ** 2)
    assert optimum < 0.9 * record.first_loss
    assert optimum * (1 - 1e-4) <= record.last_loss <= 1.01 * optimum


def output_and_hidden(block, x):
    taken = {}
    return block(x, tap=lambda tap, value: taken.setdefault(tap, value)), taken["mlp_hidden"]


def test_rates_rise_and_fall_and_are_never_zero():
    rates = Reconstruction(learning_rate=0.5, warmup=0.25).rates(16)
    assert rates.dtype == np.float32
    assert (np.diff(rates[:4]) > 0).all()
    assert (np.diff(rates[4:]) < 0).all()
    assert rates.max() < 0.5
    assert rates.max() == pytest.approx(0.5, rel=0.02)
    assert 0 < rates[-1] < 0.01
    np.testing.assert_allclose(Reconstruction(learning_rate=0.5, warmup=0).rates(1), [0.25])
