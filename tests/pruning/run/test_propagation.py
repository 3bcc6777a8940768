"""Propagated error: the corrected target against least squares, and a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import load_decoder
from sparseopt.pruning import Recipe, prune_model
from sparseopt.pruning.run.part import drifted_target
from tests.jitted import run
from tests.pruning.whole_runs import stored

target = jax.jit(drifted_target)


def test_the_target_is_the_regression_towards_the_dense_outputs(rng):
    """Against least squares on stacked rows, in float64; the third input is dead and keeps its weights."""
    x = rng.standard_normal((200, 12)) * np.exp(rng.standard_normal(12))
    dense = x + 0.5 * rng.standard_normal((200, 12))
    x[:, 2] = 0
    weight = rng.standard_normal((5, 12))
    gram, drift, ridge = x.T @ x, x.T @ (x - dense), 0.1
    scale = np.sqrt(ridge * np.diag(gram))
    rows, right = np.vstack([x, np.diag(scale)]), np.vstack([dense @ weight.T, scale[:, None] * weight.T])
    expected = np.linalg.lstsq(rows, right, rcond=None)[0].T
    expected[:, 2] = weight[:, 2]
    given = [jnp.asarray(a, jnp.float32) for a in (weight, gram, drift)]
    np.testing.assert_allclose(target(*given, 1.0, ridge), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(target(*given, 0.5, ridge), (weight + expected) / 2, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(target(*given, 0.0, ridge), given[0])
    np.testing.assert_array_equal(target(*given, 1.0, ridge)[:, 2], given[0][:, 2])


@pytest.mark.usefixtures("several_batches")
def test_without_pruning_nothing_drifts_and_with_it_the_stream_comes_nearer_to_the_dense_one(tmp_path, source, tokens):
    """At sparsity 0 both streams are one, so every target is the dense weight."""

    def pruned(name, **fields):
        recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=0, **fields)
        return prune_model(source, tmp_path / name, recipe).output

    def stream(folder):
        decoder = load_decoder(folder)
        x = run(decoder.embed_tokens, tokens)
        for block in decoder.layers:
            x = run(block, x)
        return np.asarray(x, np.float64)

    after = stored(pruned("all", sparsity=0.0, propagate=1.0))
    for key, value in stored(source).items():
        np.testing.assert_allclose(after[key], value, rtol=1e-5, atol=1e-5)
    dense = stream(source)
    apart = [np.linalg.norm(stream(pruned(f"{share}", propagate=share)) - dense) for share in (0.0, 0.5)]
    assert apart[1] < 0.98 * apart[0]
