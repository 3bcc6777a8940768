"""Propagated error: the Gram matrix of the drift, the corrected target against least squares, and a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import load_decoder, open_model
from sparseopt.pruning import Recipe, prune_model
from sparseopt.pruning.base.grams import gather_grams, tapped
from sparseopt.pruning.run.block import drifted_target
from tests.jitted import run
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder


@pytest.fixture
def source(tmp_path, rng):
    return write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))


def test_the_drift_is_that_of_the_two_streams(source, rng):
    model = open_model(source)
    block = model.block(0)
    dense = model.embedding()(jnp.asarray(rng.integers(0, len(VOCAB), (3, 10))))
    pruned = dense + 0.3 * jnp.asarray(rng.standard_normal(dense.shape), jnp.float32)
    found = gather_grams(block, pruned, "uniform", dense)
    (ours, _), (theirs, _) = (jax.jit(tapped)(block, stream) for stream in (pruned, dense))
    for name, grams in found.items():
        x, y = (np.asarray(part[name], np.float64).reshape(30, -1) for part in (ours, theirs))
        assert grams.tokens == 30
        np.testing.assert_allclose(grams.gram, x.T @ x, rtol=1e-4, atol=1e-4)
        assert float(grams.mass) == 30
        np.testing.assert_allclose(grams.drift, x.T @ (x - y), rtol=1e-4, atol=1e-4)


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


def test_without_pruning_nothing_drifts(tmp_path, source, rng):
    """At sparsity 0 both streams are one, so every target is the dense weight."""
    tokens = rng.integers(0, len(VOCAB), (4, 12)).astype(np.int32)
    recipe = Recipe(sparsity=0.0, method="magnitude", propagate=1.0, calibration=tokens, heldout_windows=0)
    prune_model(source, tmp_path / "out", recipe)
    before, after = open_model(source).source, open_model(tmp_path / "out").source
    for key in before.tensors:
        np.testing.assert_allclose(after.read(key), before.read(key), rtol=1e-5, atol=1e-5)


def test_the_pruned_stream_comes_nearer_to_the_dense_one(tmp_path, source, rng):
    """On the tokens of the regression, with more of them than inputs."""
    phrases = rng.integers(0, len(VOCAB), (40, 16)).astype(np.int32)
    recipe = Recipe(method="admm", ridge=0.01, calibration=phrases, heldout_windows=0)
    distance = {}
    for propagate in (0.0, 0.5):
        folder = tmp_path / f"out-{propagate}"
        prune_model(source, folder, recipe.model_copy(update={"propagate": propagate}))
        streams = []
        for path in (source, folder):
            decoder = load_decoder(path)
            x = run(decoder.embed_tokens, phrases)
            for block in decoder.layers:
                x = run(block, x)
            streams.append(np.asarray(x, np.float64))
        distance[propagate] = np.linalg.norm(streams[1] - streams[0]) / np.linalg.norm(streams[0])
    assert distance[0.5] < 0.98 * distance[0.0]


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"propagate must lie in \[0, 1\], given 1.5"):
        Recipe(propagate=1.5)
