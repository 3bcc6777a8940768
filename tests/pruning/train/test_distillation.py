"""Training of all blocks together on the dense model's logits."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparseopt.pruning.memory import distillation_bytes
from sparseopt.pruning.train import distillation, training
from sparseopt.pruning.train.training import LEAST_SIZE, TrainingStatus
from tests.jitted import run
from tests.pruning.train.tasks import HELDOUT, TIME, assert_same_bits, parameters, told_nothing


def trainer_of(of_model, settings):
    blocks, _ = of_model.pruned()
    masks, head = [{}] * len(blocks), of_model.model.head()
    return blocks, distillation._ModelTrainer(head, told_nothing, blocks, masks, *of_model.streams, settings)


def test_a_step_follows_the_gradient_of_the_whole_model(of_model, monkeypatch):
    monkeypatch.setattr(training, "_adam", optax.identity())
    blocks, trainer = trainer_of(of_model, replace(of_model.quick, clip=1e6))
    (before, after), head = of_model.streams, of_model.model.head()
    rows, rate = np.array([2, 1, 3, 0], np.int32), np.float32(0.5)
    split = [nnx.split(block) for block in blocks]

    @jax.jit
    @jax.value_and_grad
    def whole(params):
        y = before.calibration[1]
        for (graph, _), own in zip(split, params, strict=True):
            y = nnx.merge(graph, own)(y)
        log_p, log_q = (jax.nn.log_softmax(head(x)) for x in (after.calibration[1], y))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    start = [params for _, params in split]
    loss, gradient = whole(start)
    found, norm = trainer.step(1, rows, rate)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    norms = [math.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(own))) for own in gradient]
    assert float(norm) == pytest.approx(max(norms), rel=1e-4)
    for p, slope, new in zip(*map(jax.tree.leaves, (start, gradient, [s.params for s in trainer.states])), strict=True):
        # Relative to the root mean square of the tensor.
        moved = (p - new) / (rate * jnp.maximum(jnp.sqrt(jnp.mean(p * p)), LEAST_SIZE))
        np.testing.assert_allclose(moved, slope, atol=2e-6, rtol=1e-3)


def test_a_gradient_that_is_not_finite_ends_the_training_at_the_start(of_model, monkeypatch):
    blocks, _ = of_model.pruned()
    before, plain = parameters(blocks), distillation._step_of_block

    def broken(state, fixed, x, after, *rest):
        return plain(state, fixed, x, after * jnp.nan, *rest)

    monkeypatch.setattr(distillation, "_step_of_block", broken)
    record = of_model.train(blocks, None)
    assert record.status == TrainingStatus.NONFINITE.name
    assert (record.steps, record.epochs) == (1, 0)
    assert_same_bits(before, parameters(blocks))


def test_all_processes_continue_with_the_blocks_of_the_first(of_model, monkeypatch):
    blocks, _ = of_model.pruned()
    monkeypatch.setattr(distillation.processes, "count", lambda: 2)
    monkeypatch.setattr(distillation, "agreed", lambda own: jax.tree.map(np.ones_like, own))
    of_model.train(blocks, None, replace(of_model.quick, epochs=1))
    assert all((value == 1).all() for value in parameters(blocks).values())
    assert run(blocks[0], jnp.ones((HELDOUT, TIME, 32))).shape == (HELDOUT, TIME, 32)


def test_the_estimate_covers_the_weights_and_moments_that_are_held(of_model):
    blocks, trainer = trainer_of(of_model, of_model.quick)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves([trainer.states, [nnx.state(block) for block in blocks]]))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(nnx.state(block))) for block in blocks]
    parts = distillation_bytes(of_model.model.config, sum(sizes), max(sizes), TIME)
    assert held == pytest.approx(parts["blocks"] - 4 * 4 * max(sizes), rel=1e-3)
    assert parts["activations of a step"] >= 4 * (len(blocks) + 1) * TIME * 32
    assert parts["embedding and head"] > of_model.model.head().lm_head.weight[...].nbytes


def test_the_best_state_is_replaced_block_by_block(of_model, monkeypatch):
    """No second copy of all blocks is ever held, which no estimate counts."""
    blocks, trainer = trainer_of(of_model, of_model.quick)
    trainer.keep()
    held, plain = [], nnx.update

    def live():
        return sum(array.nbytes for array in jax.live_arrays())

    before = live()
    monkeypatch.setattr(training.nnx, "update", lambda *given: (held.append(live()), plain(*given)))
    trainer.keep()
    largest = max(sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(block))) for block in blocks)
    assert len(held) == len(blocks)
    assert max(held) - before <= largest + 1000
