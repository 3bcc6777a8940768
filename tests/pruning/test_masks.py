"""Zeros that stay: methods within a support, models pruned further or on other masks, and masks for training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt as so
from sparseopt.layers.methods import AdmmPruning, Magnitude, SparseGpt, Wanda
from sparseopt.layers.problem import check_answer
from sparseopt.layers.split import _solve_parts, solve_within_memory
from sparseopt.models import open_model
from sparseopt.pruning import LayerJob, Recipe, audit_pattern, masks, prune_layer, prune_model
from sparseopt.pruning.run.facts import model_facts
from sparseopt.system.run_folder import FolderError
from tests.layers.layers import error_of, make_layer
from tests.pruning.whole_runs import stored

SHORT_ADMM = AdmmPruning(levels=2, period=3)


@pytest.fixture(scope="module")
def layer():
    """A layer whose support, 60 % of it, was chosen by chance: nothing else in the data leads to it."""
    rng = np.random.default_rng(5)
    weight, gram, _ = make_layer(rng)
    return weight, gram, rng.random(weight.shape) < 0.6


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, source, tokens):
    folder = tmp_path_factory.mktemp("pruned") / "out"
    prune_model(source, folder, Recipe(method="magnitude", sparsity=0.5, calibration=tokens))
    return folder


def weights_of(folder):
    return {key: value for key, value in stored(folder).items() if key.endswith("_proj.weight")}


CASES = [
    *[(method, "unstructured") for method in ("magnitude", "maiht", SHORT_ADMM)],
    *[("sparsegpt", "per-row"), ("sparsegpt", "2:4"), ("splice", "2:4"), ("flap", "group:4"), ("wanda", "block:2x8")],
]


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_every_method_chooses_within_the_support(layer, method, pattern):
    weight, gram, support = layer
    sparsity = {"2:4": None, "block:2x8": 0.25, "group:4": 0.25}.get(pattern, 0.7)
    variances = np.diag(gram) if method == "flap" else None
    found = prune_layer(weight, gram, sparsity, pattern, method, support=support, input_variances=variances)
    kept = found.weight != 0
    assert not kept[~support].any()
    assert found.status is so.Status.CONVERGED
    assert found.relative_error == pytest.approx(error_of(found.weight, weight, gram), rel=1e-3)
    groups = support.reshape(len(support), -1, 4).sum(axis=2)
    if pattern == "unstructured":
        # Every row of this support has as many weights as Wanda gives it.
        assert kept.sum() == round(0.3 * weight.size)
    elif pattern == "per-row":
        assert set(kept.sum(axis=1)) == {round(0.3 * weight.shape[1])}
    elif pattern == "2:4":
        np.testing.assert_array_equal(kept.reshape(len(kept), -1, 4).sum(axis=2), np.minimum(groups, 2))
    else:
        assert kept.sum() == pytest.approx(0.75 * support.sum(), rel=0.1)


@pytest.mark.parametrize("method", [Wanda(), Magnitude(), SparseGpt()], ids=lambda method: type(method).__name__)
def test_blocks_of_outputs_have_their_own_part_of_the_support(layer, method):
    """Also of one in which some outputs have too little for Wanda, which spends elsewhere what they leave."""
    weight, gram, _ = layer
    support = np.random.default_rng(1).random(weight.shape) < np.linspace(0.15, 1, len(weight))[:, None]
    for sparsity in (0.5, 0.3):
        job = LayerJob(weight, gram, None, so.TopK(round((1 - sparsity) * weight.size)), support=support)
        whole, parts = solve_within_memory(job, method), _solve_parts(job, method, 4, None)
        for report in (whole, parts):
            check_answer(report, method, job.pattern)
            assert np.count_nonzero(report.weight) == min(job.pattern.k, support.sum())
            assert not np.asarray(report.weight)[~support].any()
        if isinstance(method, Magnitude):
            np.testing.assert_array_equal(parts.weight, whole.weight)


def test_a_support_of_all_weights_changes_nothing_for_maiht(layer):
    """Also within a support the level is adapted, rather than the pattern projected onto."""
    weight, gram, support = layer
    first, found = (prune_layer(weight, gram, 0.7, support=given) for given in (None, np.ones_like(support)))
    np.testing.assert_array_equal(first.weight != 0, found.weight != 0)
    np.testing.assert_allclose(first.weight, found.weight, rtol=1e-4, atol=1e-5)


def test_a_support_takes_the_place_of_the_target_there(layer):
    """The target may be non-zero off the support, as that of `propagate` is: it is fitted, not cut."""
    weight, gram, support = layer
    scale = np.sqrt(np.diag(gram).astype(np.float64))
    ridge = 0.01
    hessian = gram / np.outer(scale, scale) + ridge * np.eye(len(scale))
    best = np.zeros(weight.shape)
    for out, row in enumerate(weight * scale):
        kept = np.flatnonzero(support[out])
        best[out, kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], (hessian @ row)[kept])
    best /= scale
    found = prune_layer(weight, gram, 0.0, method=AdmmPruning(ridge=ridge, refit_steps=60), support=support)
    np.testing.assert_array_equal(found.weight != 0, support)
    assert found.relative_error == pytest.approx(error_of(best, weight, gram), rel=1e-3)
    assert found.relative_error < 0.5 * error_of(weight * support, weight, gram)


@pytest.mark.parametrize("method", ["maiht", SHORT_ADMM, "sparsegpt"])
def test_a_weight_that_lies_in_its_support_stays_the_same(layer, method):
    weight, gram, support = layer
    weight = weight * support
    found = prune_layer(weight, gram, 0.3, method=method, support=support)
    np.testing.assert_array_equal(found.weight, weight)
    assert found.relative_error == 0


def test_a_pruned_model_is_pruned_further(tmp_path, pruned, tokens):
    before = weights_of(pruned)
    settings = {"method": "sparsegpt", "propagate": 0.25, "train_epochs": 1, "keep_zeros": True}
    report = prune_model(pruned, tmp_path / "out", Recipe(sparsity=0.7, calibration=tokens, **settings))
    for key, weight in weights_of(tmp_path / "out").items():
        assert not weight[before[key] == 0].any(), key
        assert np.count_nonzero(weight) == round(0.3 * weight.size), key
    assert all(record.given_zeros == round(0.5 * record.size) for record in report.layers)
    assert report.kept_masks == []


def test_the_weights_of_a_dense_model_are_fitted_on_the_masks_of_a_pruned_one(tmp_path, source, pruned, tokens):
    before = weights_of(pruned)
    recipe = Recipe(method=SHORT_ADMM, masks=str(pruned), calibration=tokens)
    fitted = prune_model(source, tmp_path / "out", recipe)
    unfitted = prune_model(source, tmp_path / "same", recipe.model_copy(update={"method": "magnitude"}))
    # Without another dense model nothing is to be fitted.
    kept = prune_model(pruned, tmp_path / "kept", Recipe(method=SHORT_ADMM, calibration=tokens, keep_zeros=True))
    for key, weight in weights_of(tmp_path / "out").items():
        np.testing.assert_array_equal(weight != 0, before[key] != 0)
    for name in ("same", "kept"):
        assert all(np.array_equal(weight, before[key]) for key, weight in weights_of(tmp_path / name).items())
    assert sum(r.relative_error for r in fitted.layers) < sum(r.relative_error for r in unfitted.layers)
    assert (fitted.summary()["kept_masks"], len(kept.kept_masks), kept.recipe["sparsity"]) == (21, 21, 0)
    assert "give the dense model and --masks" in " ".join(map(str, model_facts(kept)))


def test_an_n_m_mask_stays_one_in_the_folder_of_the_same_run_only(tmp_path, source, tokens):
    recipe = Recipe(method="magnitude", pattern="2:4", calibration=tokens)
    prune_model(source, tmp_path / "masks", recipe)
    masked = recipe.model_copy(update={"method": "wanda", "masks": str(tmp_path / "masks")})
    prune_model(source, tmp_path / "out", masked)
    assert all(audit.exact for audit in audit_pattern(tmp_path / "out", "2:4"))
    kept = dict(masks(tmp_path / "masks"))
    assert all(np.array_equal(kept[key], mask) for key, mask in masks(tmp_path / "out"))
    # Other masks under the same name are another run.
    (tmp_path / "masks").rename(tmp_path / "first")
    prune_model(source, tmp_path / "masks", recipe.model_copy(update={"method": "wanda"}))
    with pytest.raises(FolderError, match="masks: "):
        prune_model(source, tmp_path / "out", masked)


def test_masks_are_read_one_by_one_in_the_layout_of_the_files(pruned):
    found, tensors = masks(pruned), open_model(pruned).source
    assert iter(found) is found
    found = dict(found)
    assert len(found) == 21
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, tensors.read(name) != 0)


def test_training_by_optax_keeps_the_zeros_exactly(pruned, rng):
    """Adam with weight decay and momentum would move them; the projection at the end of the chain does not."""
    kept = dict(list(masks(pruned))[:3])
    params = {name: jnp.asarray(open_model(pruned).source.read(name), jnp.bfloat16) for name in kept}
    projections = {name: so.proximal(so.Support(mask), 1.0) for name, mask in kept.items()}
    chain = optax.chain(optax.adamw(1e-2), optax.multi_transform(projections, {name: name for name in kept}))
    target = {name: rng.standard_normal(mask.shape) for name, mask in kept.items()}

    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(lambda p, t: p - t.astype(p.dtype), params, target)
        updates, state = chain.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    trained, state = params, chain.init(params)
    for _ in range(5):
        trained, state = step(trained, state)
    for name, mask in kept.items():
        value = np.asarray(trained[name], np.float32)
        assert not value[~mask].any()
        assert np.mean(value[mask] != np.asarray(params[name], np.float32)[mask]) > 0.9
