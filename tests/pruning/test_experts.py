"""Experts in the pipeline: each pruned with the tokens routed to it, starved ones by magnitude, all reported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import ModelError, load_decoder, open_model
from sparseopt.pruning import Recipe, ShrinkRecipe, audit_sparsity, prune_model
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner, tapped
from sparseopt.pruning.inspection import inspect_model
from sparseopt.pruning.run.facts import run_facts
from tests.jitted import run
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder
from tests.tiers import often

EXPERTS = 4


@pytest.fixture
def config():
    return tiny_config(
        model_type="mixtral",
        architectures=["MixtralForCausalLM"],
        num_hidden_layers=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        intermediate_size=24,
        tie_word_embeddings=False,
    )


@pytest.fixture
def source(tmp_path, rng, config):
    return write_folder(tmp_path / "source", config, random_tensors(config, rng))


@pytest.fixture
def tokens(rng):
    return rng.integers(0, len(VOCAB), (8, 32)).astype(np.int32)


def mixture_inputs(model, x):
    """What the mixture of block 0 reads, `[tokens, in]`, for embedded tokens x."""
    module = model.block(0)
    before = jax.jit(lambda module, x: module.mlp_norm(x + module.self_attn(module.attention_norm(x))))
    normed = np.asarray(before(module, x), np.float64)
    return normed.reshape(-1, normed.shape[-1])


def routed_inputs(model, tokens):
    """For every expert the inputs of the tokens that the router sends there, computed apart from the mixture."""
    module, normed = model.block(0), mixture_inputs(model, model.embedding()(jnp.asarray(tokens)))
    logits = normed @ np.asarray(module.mlp.router.weight[...], np.float64).T
    chosen = np.argsort(-logits, axis=1)[:, :2]
    return [normed[(chosen == e).any(axis=1)] for e in range(EXPERTS)]


@pytest.mark.parametrize("weighting", often(["uniform", "residual"], "residual"))
def test_the_gram_of_an_expert_is_that_of_its_tokens(source, tokens, weighting):
    model = open_model(source)
    block = model.block(0)
    grams = BlockRunner().grams(block, make_batches(model.embedding()(jnp.asarray(tokens))), weighting)
    assert set(grams) == set(block.linears.values())
    assert len(grams) == 2 + 2 * EXPERTS
    for e, rows in enumerate(routed_inputs(model, tokens)):
        found = grams[f"mlp.experts.{e}.input"]
        assert int(found.tokens) == len(rows)
        np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found.total, rows.sum(axis=0), rtol=1e-4, atol=1e-3)
    assert sum(int(grams[f"mlp.experts.{e}.hidden"].tokens) for e in range(EXPERTS)) == 2 * tokens.size
    if weighting == "residual":
        _, stream = jax.jit(tapped)(block, model.embedding()(jnp.asarray(tokens)))
        masses = sum(float(grams[f"mlp.experts.{e}.hidden"].mass) for e in range(EXPERTS))
        assert masses == pytest.approx(2 * float(jnp.sum(1 / jnp.mean(stream**2, axis=-1))), rel=1e-4)


def test_with_all_tokens_the_grams_of_an_expert_are_those_of_every_token(source, tokens):
    model = open_model(source)
    block, x = model.block(0), model.embedding()(jnp.asarray(tokens))
    dense_x = 1.1 * x + 0.1  # another stream, so that there is a drift
    grams = BlockRunner().grams(block, make_batches(x), "uniform", make_batches(dense_x), "all")

    def hidden(inputs, e):
        gate, up = (np.asarray(block.read(f"mlp.experts.{e}.{n}_proj.weight"), np.float64) for n in ("gate", "up"))
        return inputs @ gate.T / (1 + np.exp(-(inputs @ gate.T))) * (inputs @ up.T)

    own, dense = mixture_inputs(model, x), mixture_inputs(model, dense_x)
    for e in range(EXPERTS):
        for tap, rows, dense_rows in (("input", own, dense), ("hidden", hidden(own, e), hidden(dense, e))):
            found = grams[f"mlp.experts.{e}.{tap}"]
            assert grams.tokens(f"mlp.experts.{e}.{tap}") == int(found.tokens) == float(found.mass) == tokens.size
            np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-4, atol=2e-3)
            np.testing.assert_allclose(found.total, rows.sum(axis=0), rtol=1e-4, atol=2e-3)
            np.testing.assert_allclose(found.drift, rows.T @ (rows - dense_rows), rtol=1e-4, atol=2e-3)
    # Gate and up of all experts share one Gram.
    assert grams.stacked["mlp.experts.input"].gram.shape == (32, 32)


@pytest.mark.thorough
def test_few_tokens_prune_better_when_every_expert_sees_them_all(tmp_path, source, tokens, rng):
    # About 16 of 32 tokens reach an expert of 32 inputs.
    model, few = open_model(source), tokens[:1]
    fresh = routed_inputs(model, rng.integers(0, len(VOCAB), (16, 32)))
    keys = [[f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight" for name in ("w1", "w3")] for e in range(4)]
    errors = {}
    for choice in ("routed", "all"):
        recipe = Recipe(calibration=few, heldout_windows=0, min_expert_tokens=1, expert_tokens=choice, preset="paper")
        report = prune_model(source, tmp_path / choice, recipe)
        seen = {record.tokens for record in report.layers if ".experts." in record.layer}
        assert (seen == {few.size}) == (choice == "all")
        pruned = open_model(tmp_path / choice)
        errors[choice] = np.mean(
            [
                np.linalg.norm(rows @ (pruned.stored(key) - model.stored(key)).T)
                / np.linalg.norm(rows @ model.stored(key).T)
                for rows, own in zip(fresh, keys, strict=True)
                for key in own
            ]
        )
    assert errors["all"] < 0.95 * errors["routed"]


@pytest.mark.parametrize("preset", often(["paper", "tuned"], "paper"))
def test_every_expert_is_pruned_exactly_and_runs(tmp_path, source, tokens, preset):
    report = prune_model(source, tmp_path / "out", Recipe(preset=preset, calibration=tokens, min_expert_tokens=1))
    linears = 2 * (4 + 3 * EXPERTS)
    assert len(report.layers) == linears
    audits = audit_sparsity(tmp_path / "out")
    assert len(audits) == linears
    assert all(audit.zeros == audit.size // 2 for audit in audits)
    assert any(audit.layer == "model.layers.1.block_sparse_moe.experts.3.w2" for audit in audits)
    logits = np.asarray(run(load_decoder(tmp_path / "out"), tokens[:1]))
    dense = np.asarray(run(load_decoder(source), tokens[:1]))
    assert np.isfinite(logits).all()
    assert 0 < np.mean((logits - dense) ** 2) < np.mean(dense**2)
    assert not report.starved_experts


def test_a_starved_expert_is_pruned_by_magnitude_and_named(tmp_path, source, tokens):
    recipe = Recipe(preset="paper", calibration=tokens, heldout_windows=2)
    counts = [len(rows) for rows in routed_inputs(open_model(source), tokens[:6])]
    least = sorted(counts)[1]
    report = prune_model(source, tmp_path / "out", Recipe(**(vars(recipe) | {"min_expert_tokens": least})))
    starved = [e for e, count in enumerate(counts) if count < least]
    assert len(starved) == 1
    prefix = "model.layers.0.block_sparse_moe.experts"
    assert [name for name in report.starved_experts if name.startswith(prefix)] == [f"{prefix}.{starved[0]}"]
    before, after = open_model(source), open_model(tmp_path / "out")
    for record in report.layers:
        if record.block or ".experts." not in record.layer:
            continue
        assert record.starved == record.layer.startswith(f"{prefix}.{starved[0]}.")
        if record.starved:
            weight, pruned = (np.abs(m.stored(f"{record.layer}.weight")) for m in (before, after))
            kept = np.sort(weight[pruned != 0])
            assert kept[0] >= np.sort(weight[pruned == 0])[-1]
            assert record.heldout_error is None
        else:
            assert record.tokens >= least
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["starved_experts"] == report.starved_experts


def test_an_expert_without_tokens_is_starved_whatever_the_setting(tmp_path, source, tokens):
    alike = np.full_like(tokens, tokens[0, 0])  # one and the same token goes to the same experts everywhere
    recipe = Recipe(method="magnitude", calibration=alike, min_expert_tokens=0)
    report = prune_model(source, tmp_path / "out", recipe)
    without = [r for r in report.layers if ".experts." in r.layer and not r.tokens]
    assert without
    assert [r for r in report.layers if r.starved] == without
    # Its error is that of its weights.
    assert all(r.relative_error > 0 for r in without)
    told = dict(run_facts(report))["starved experts"]
    assert "experts saw no calibration token and were pruned by magnitude" in told
    report = prune_model(source, tmp_path / "all", recipe.model_copy(update={"expert_tokens": "all"}))
    assert not report.starved_experts


@pytest.mark.thorough
def test_curves_take_most_from_experts_without_tokens(tmp_path, source, tokens):
    """Nothing that the loss sees changes with them, and without tokens there is no mean over tokens."""
    alike = np.full_like(tokens, tokens[0, 0])
    recipe = Recipe(method="magnitude", calibration=alike, sparsity=0.5, allocation="curves", bounds=(0.3, 0.65))
    report = prune_model(source, tmp_path / "out", recipe)
    shares = {".experts." in r.layer and not r.tokens: [] for r in report.layers}
    for r in report.layers:
        shares[".experts." in r.layer and not r.tokens].append(r.zeros / r.size)
    assert shares[True]
    np.testing.assert_allclose(shares[True], 0.65, atol=0.01)
    assert min(shares[False]) < 0.6


def test_all_tokens_are_refused_where_no_expert_would_see_them(tmp_path, source, tokens, rng):
    dense = write_folder(tmp_path / "dense", tiny_config(), random_tensors(tiny_config(), rng))
    recipe = Recipe(calibration=tokens, expert_tokens="all")
    for work in (lambda: prune_model(dense, tmp_path / "out", recipe), lambda: inspect_model(dense, recipe)):
        with pytest.raises(ModelError, match=r"'all' is for mixtures .* this llama model is none; leave it out"):
            work()
    with pytest.raises(ValueError, match="removed by what they add to the tokens routed to them"):
        ShrinkRecipe(calibration=tokens, experts=0.5, expert_tokens="all")


@pytest.mark.parametrize(
    "changes",
    often([{"train_epochs": 2}, {"allocation": "curves"}, {"allocation": "owl"}], {"train_epochs": 2}),
)
def test_reconstruction_and_allocation_work_with_experts(tmp_path, source, tokens, changes):
    recipe = Recipe(calibration=tokens, min_expert_tokens=1, heldout_windows=2, sparsity=0.5, **changes)
    report = prune_model(source, tmp_path / "out", recipe)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    if "train_epochs" in changes:
        assert all(block.last_loss < block.first_loss for block in report.blocks)
        model = open_model(tmp_path / "out")
        zeros = {record.layer: record.zeros for record in report.layers}
        for layer, count in zeros.items():
            assert np.sum(model.stored(f"{layer}.weight") == 0) >= count


def test_starved_experts_are_named_on_the_screen(tmp_path, source, tokens):
    recipe = Recipe(method="magnitude", calibration=tokens, min_expert_tokens=10**6)
    report = prune_model(source, tmp_path / "out", recipe)
    assert len(report.starved_experts) == 2 * EXPERTS
    (line,) = (fact.text for fact in run_facts(report) if fact.name == "starved experts")
    assert line.startswith("8 experts saw fewer than 1000000 calibration tokens and were pruned by magnitude: model.")
    assert "experts.2 and 5 more" in line
