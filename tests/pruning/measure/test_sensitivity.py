"""Sensitivity of outputs: against finite differences of the loss, and the effect of output weights on a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import load_decoder, open_model
from sparseopt.pruning import METHODS, Recipe, prune_layer, prune_model
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.measure import survey
from sparseopt.pruning.measure.survey import FLOOR, POWER, backward_sweep, output_weights
from tests.layers.layers import GROUP_METHODS, error_of, make_layer
from tests.pruning.whole_runs import tensors_of, write_model
from tests.tiers import often

TINY = "llama"
pytestmark = pytest.mark.usefixtures("several_batches")


@pytest.fixture(scope="module")
def tokens(tokens):
    return tokens[:4]


def measured(source, tokens, skipped=0):
    model = open_model(source)
    batches = make_batches(model.embedding()(jnp.asarray(tokens)))
    steps = []
    tell = lambda done, total: steps.append((done, total))  # noqa: E731
    sweep = backward_sweep(model, batches, tokens, BlockRunner(), tell, skipped=skipped)
    found, x = {}, batches[0]
    sites = list(sweep)
    assert [site.index for site in sites] == [2, 1, 0]
    assert steps == [(n, 7) for n in range(1, 8)]  # 3 forward, 1 again, 3 backward
    for site in reversed(sites):
        np.testing.assert_array_equal(site.batches[0], x)
        x = BlockRunner().run(site.block, x)
        found |= {model.block_keys(site.index)[f"{name}.weight"]: value for name, value in site.sensitivity.items()}
    return found


@pytest.mark.parametrize("skipped", [0, 1])
def test_it_is_the_mean_squared_gradient_of_the_whole_models_loss(source, tokens, skipped):
    """Recomputed by one gradient of the whole decoder with an error added at the outputs of three linears."""
    model, decoder, found = open_model(source), load_decoder(source), measured(source, tokens, skipped)
    assert set(found) == set(model.linear_keys())
    for key, value in found.items():
        assert value.shape == model.source.tensors[key].shape[:1]
        assert value.min() >= 0
    watched = {(0, "self_attn.k_proj"): 16, (1, "mlp.up_proj"): 64, (2, "self_attn.o_proj"): 32}

    @jax.jit
    @jax.grad
    def gradient(errors):
        x = decoder.embed_tokens(tokens)
        for i, block in enumerate(decoder.layers):
            x = block(x, tap=lambda name, value, i=i: value + errors.get((i, name), 0))
        logs = jax.nn.log_softmax(decoder.head(x)[:, :-1])
        return -jnp.sum(jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[:, skipped:])

    for (index, name), each in gradient(
        {at: jnp.zeros((*tokens.shape, width)) for at, width in watched.items()}
    ).items():
        expected = np.mean(np.asarray(each, np.float64) ** 2, axis=(0, 1))
        np.testing.assert_allclose(found[f"model.layers.{index}.{name}.weight"], expected, rtol=1e-3)


def test_weights_are_above_zero_and_even_where_the_loss_does_not_look(tmp_path, tokens):
    tensors = tensors_of()
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 0
    found = measured(write_model(tmp_path / "source", tensors=tensors), tokens)
    blind = found["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(blind, np.zeros(64, np.float32))
    np.testing.assert_array_equal(output_weights(blind), np.ones(64, np.float32))
    weights = output_weights(np.array([0.0, 1.0, 4.0, 11.0], np.float32))
    np.testing.assert_allclose(weights, np.array([4 * FLOOR, 1, 4, 11]) ** POWER, rtol=1e-6)


@pytest.mark.parametrize("method", often(["maiht", "admm_splice"], "maiht"))
def test_a_weighted_output_keeps_more_weights_and_errs_less(rng, method):
    weight, gram, _ = make_layer(rng)
    weights = np.ones(len(weight), np.float32)
    weights[:8] = 100
    plain = prune_layer(weight, gram, 0.5, method=method).weight
    weighted = prune_layer(weight, gram, 0.5, method=method, output_weights=weights).weight
    assert np.count_nonzero(weighted) == np.count_nonzero(plain) == weight.size // 2
    assert np.count_nonzero(weighted[:8]) > 1.3 * np.count_nonzero(plain[:8])
    assert error_of(weighted[:8], weight[:8], gram) < 0.5 * error_of(plain[:8], weight[:8], gram)


@pytest.mark.parametrize("method", often(METHODS, "maiht", "magnitude", "sparsegpt"))
def test_only_the_ratios_of_the_weights_matter(rng, method):
    """Powers of two, so that not even a rounding differs."""
    weight, gram, _ = make_layer(rng)
    how = {"method": method, "pattern": "group:4" if method in GROUP_METHODS else "unstructured"}
    how["input_variances"] = np.diag(gram) if method == "flap" else None
    plain = prune_layer(weight, gram, 0.5, **how)
    scaled = prune_layer(weight, gram, 0.5, **how, output_weights=np.full(48, 4.0))
    np.testing.assert_allclose(scaled.weight, plain.weight, rtol=1e-5, atol=1e-6)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-5)


def test_best_weighs_outputs_on_whole_models_and_the_others_when_asked(tmp_path, source, tokens, monkeypatch):
    assert Recipe(method="best").output_weights == "gradient"
    assert {Recipe(method=name).output_weights for name in METHODS.keys() - {"best"}} == {"uniform"}
    recipe = Recipe(calibration=tokens, heldout_windows=0, method="sparsegpt", output_weights="gradient")
    # The weights are of the first windows, as many as have that many tokens.
    monkeypatch.setattr(survey, "TOKENS", 2 * tokens.shape[1])
    prune_model(source, tmp_path / "weighted", recipe)
    model, key = open_model(source), "model.layers.0.self_attn.q_proj.weight"
    x = model.embedding()(jnp.asarray(tokens))
    gram = BlockRunner().grams(model.block(0), make_batches(x))["attention_input"].gram
    weights = output_weights(measured(source, tokens[:2])[key])
    weighted, uniform = (
        prune_layer(model.source.read(key), gram, 0.5, method="sparsegpt", output_weights=each).weight
        for each in (weights, None)
    )
    found = open_model(tmp_path / "weighted").source.read(key)
    np.testing.assert_array_equal(found != 0, weighted != 0)
    np.testing.assert_allclose(found, weighted, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(found != 0, uniform != 0)
