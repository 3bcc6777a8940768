"""Experts in the pipeline: starved ones are pruned by magnitude and named, and all tokens help where few are routed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import open_model
from sparseopt.pruning import Recipe, prune_model
from sparseopt.pruning.run.facts import run_facts
from tests.models.tiny import VOCAB
from tests.pruning.whole_runs import stored

EXPERTS = 4


@pytest.fixture(scope="module")
def mixture(models):
    return models("experts")


@pytest.fixture(scope="module")
def alike(tokens):
    """One and the same token, which goes to the same experts everywhere."""
    return np.full_like(tokens, tokens[0, 0])


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


@pytest.mark.thorough
def test_few_tokens_prune_better_when_every_expert_sees_them_all(tmp_path, mixture, rng):
    # About 16 of 32 tokens reach an expert of 32 inputs.
    model, few, other = open_model(mixture), *(rng.integers(0, len(VOCAB), (n, 32)).astype(np.int32) for n in (1, 16))
    fresh, dense = routed_inputs(model, other), stored(mixture)
    errors = {}
    for choice in ("routed", "all"):
        recipe = Recipe(calibration=few, heldout_windows=0, min_expert_tokens=1, expert_tokens=choice, preset="paper")
        report = prune_model(mixture, tmp_path / choice, recipe)
        seen = {record.tokens for record in report.layers if ".experts." in record.layer}
        assert (seen == {few.size}) == (choice == "all")
        pruned, found = stored(tmp_path / choice), []
        for e, rows in enumerate(fresh):
            for name in ("w1", "w3"):
                key = f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight"
                change = rows @ (pruned[key] - dense[key]).T
                found.append(np.linalg.norm(change) / np.linalg.norm(rows @ dense[key].T))
        errors[choice] = np.mean(found)
    assert errors["all"] < 0.95 * errors["routed"]


def test_a_starved_expert_is_pruned_by_magnitude_and_named(tmp_path, mixture, tokens):
    counts = [len(rows) for rows in routed_inputs(open_model(mixture), tokens[:3])]
    least = sorted(counts)[1]
    report = prune_model(mixture, tmp_path / "out", Recipe(method="wanda", calibration=tokens, min_expert_tokens=least))
    (starved,) = (e for e, count in enumerate(counts) if count < least)
    prefix = "model.layers.0.block_sparse_moe.experts"
    assert [name for name in report.starved_experts if name.startswith(prefix)] == [f"{prefix}.{starved}"]
    before, after = stored(mixture), stored(tmp_path / "out")
    for record in report.layers:
        if record.layer.startswith(prefix):
            weight, pruned = (np.abs(tensors[f"{record.layer}.weight"]) for tensors in (before, after))
            by_size = all(row[keep].min() >= row[~keep].max() for row, keep in zip(weight, pruned != 0, strict=True))
            assert record.starved == by_size == record.layer.startswith(f"{prefix}.{starved}.")
            assert (record.heldout_error is None) == record.starved
            assert record.starved or record.tokens >= least
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["starved_experts"] == report.starved_experts


def test_an_expert_without_tokens_is_starved_whatever_the_setting(tmp_path, mixture, alike):
    recipe = Recipe(method="magnitude", calibration=alike, min_expert_tokens=0)
    report = prune_model(mixture, tmp_path / "out", recipe)
    without = [r for r in report.layers if ".experts." in r.layer and not r.tokens]
    assert without
    assert [r for r in report.layers if r.starved] == without
    # Its error is that of its weights.
    assert all(r.relative_error > 0 for r in without)
    assert "experts saw no calibration token" in dict(run_facts(report))["starved experts"]
    report = prune_model(mixture, tmp_path / "all", recipe.model_copy(update={"expert_tokens": "all"}))
    assert not report.starved_experts
    # Here all are.
    report = prune_model(mixture, tmp_path / "few", recipe.model_copy(update={"min_expert_tokens": 10**6}))
    assert len(report.starved_experts) == 2 * EXPERTS
    told = dict(run_facts(report))["starved experts"]
    assert told.startswith("8 experts saw fewer than 1000000 calibration tokens")
    assert "experts.2 and 5 more" in told


@pytest.mark.thorough
def test_curves_take_most_from_experts_without_tokens(tmp_path, mixture, alike):
    """Nothing that the loss sees changes with them, and without tokens there is no mean over tokens."""
    recipe = Recipe(method="magnitude", calibration=alike, sparsity=0.5, allocation="curves", bounds=(0.3, 0.65))
    report = prune_model(mixture, tmp_path / "out", recipe)
    unseen = [".experts." in r.layer and not r.tokens for r in report.layers]
    shares = np.array([r.zeros / r.size for r in report.layers])
    assert any(unseen)
    np.testing.assert_allclose(shares[unseen], 0.65, atol=0.01)
    assert shares[np.logical_not(unseen)].min() < 0.6
