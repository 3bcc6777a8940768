"""Propagated error: the corrected target against least squares, and a whole model."""

import jax.numpy as jnp
import numpy as np

from sparseopt.models import load_decoder
from sparseopt.pruning import Recipe, prune_model
from sparseopt.pruning.run.part import drifted_target
from tests.jitted import run
from tests.models.tiny import VOCAB
from tests.pruning.whole_runs import stored


def test_the_target_is_the_regression_towards_the_dense_outputs(rng):
    """Against least squares on stacked rows, in float64."""
    x = rng.standard_normal((200, 12)) * np.exp(rng.standard_normal(12))
    dense = x + 0.5 * rng.standard_normal((200, 12))
    weight = rng.standard_normal((5, 12))
    gram, drift, ridge = x.T @ x, x.T @ (x - dense), 0.1
    scale = np.sqrt(ridge * np.diag(gram))
    rows, right = np.vstack([x, np.diag(scale)]), np.vstack([dense @ weight.T, scale[:, None] * weight.T])
    expected = np.linalg.lstsq(rows, right, rcond=None)[0].T
    given = [jnp.asarray(a, jnp.float32) for a in (weight, gram, drift)]
    np.testing.assert_allclose(drifted_target(*given, 1.0, ridge), expected, rtol=1e-3, atol=1e-4)
    half = drifted_target(*given, 0.5, ridge)
    np.testing.assert_allclose(half, (weight + expected) / 2, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(drifted_target(*given, 0.0, ridge), given[0])


def test_dead_inputs_keep_their_weights(rng):
    x = rng.standard_normal((50, 6)).astype(np.float32)
    x[:, 2] = 0
    weight = rng.standard_normal((3, 6)).astype(np.float32)
    moved = drifted_target(jnp.asarray(weight), jnp.asarray(x.T @ x), jnp.asarray(0.2 * x.T @ x), 1.0, 0.1)
    assert np.isfinite(moved).all()
    np.testing.assert_array_equal(moved[:, 2], weight[:, 2])
    assert not np.allclose(moved[:, 3], weight[:, 3])


def test_without_pruning_nothing_drifts(tmp_path, source, tokens):
    """At sparsity 0 both streams are one, so every target is the dense weight."""
    recipe = Recipe(sparsity=0.0, method="magnitude", propagate=1.0, calibration=tokens, heldout_windows=0)
    prune_model(source, tmp_path / "out", recipe)
    after = stored(tmp_path / "out")
    for key, value in stored(source).items():
        np.testing.assert_allclose(after[key], value, rtol=1e-5, atol=1e-5)


def test_the_pruned_stream_comes_nearer_to_the_dense_one(tmp_path, source, rng):
    """On the tokens of the regression, with more of them than inputs."""
    phrases = rng.integers(0, len(VOCAB), (40, 16)).astype(np.int32)

    def stream(folder):
        decoder = load_decoder(folder)
        x = run(decoder.embed_tokens, phrases)
        for block in decoder.layers:
            x = run(block, x)
        return np.asarray(x, np.float64)

    dense, apart = stream(source), {}
    for propagate in (0.0, 0.5):
        recipe = Recipe(method="admm", ridge=0.01, calibration=phrases, heldout_windows=0, propagate=propagate)
        apart[propagate] = np.linalg.norm(stream(prune_model(source, tmp_path / f"{propagate}", recipe).output) - dense)
    assert apart[0.5] < 0.98 * apart[0.0]
