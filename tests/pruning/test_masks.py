"""Zeros that stay: methods within a support, models pruned further or on other masks, and masks for training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt as so
from sparseopt.layers.methods import AdmmPruning, Magnitude, SparseGpt, Wanda
from sparseopt.layers.problem import check_answer
from sparseopt.layers.split import _solve_parts, solve_within_memory, split_job
from sparseopt.models import open_model
from sparseopt.pruning import LayerJob, Recipe, audit_pattern, masks, prune_layer, prune_model
from sparseopt.pruning.run.facts import model_facts
from sparseopt.system.run_folder import FolderError
from tests.layers.layers import error_of, make_layer
from tests.pruning.whole_runs import stored
from tests.tiers import often

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


@pytest.mark.parametrize(
    ("method", "pattern"),
    often(
        [
            ("magnitude", "unstructured"), ("wanda", "unstructured"), ("wanda", "2:4"), ("maiht", "unstructured"),
            ("sparsegpt", "unstructured"), ("sparsegpt", "per-row"), ("sparsegpt", "2:4"), (SHORT_ADMM, "unstructured"),
            ("splice", "2:4"), ("admm", "block:2x8"), ("flap", "group:4"),
        ],
        ("magnitude", "unstructured"), ("wanda", "2:4"), ("maiht", "unstructured"), ("sparsegpt", "per-row"),
        (SHORT_ADMM, "unstructured"), ("splice", "2:4"), ("flap", "group:4"),
    ),
)  # fmt: skip
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


def test_wanda_spends_what_outputs_with_little_support_leave(layer):
    weight, gram, _ = layer
    rng = np.random.default_rng(1)
    support = rng.random(weight.shape) < np.linspace(0.15, 1, len(weight))[:, None]
    for sparsity in (0.5, 0.3):
        whole = prune_layer(weight, gram, sparsity, method="wanda", support=support).weight
        assert np.count_nonzero(whole) == min(round((1 - sparsity) * weight.size), support.sum())
        pattern = so.TopK(round((1 - sparsity) * weight.size))
        job = LayerJob(weight, gram, None, pattern, support=support)
        parts = _solve_parts(job, Wanda(), 4, None)
        check_answer(parts, Wanda(), pattern)
        assert np.count_nonzero(parts.weight) == np.count_nonzero(whole)


@pytest.mark.parametrize("penalty", [None, pytest.param(so.L1(1.0), marks=pytest.mark.thorough)], ids=["l0", "l1"])
def test_a_support_of_all_weights_changes_nothing_for_maiht(layer, penalty):
    """Also within a support the level is adapted, rather than the pattern projected onto."""
    weight, gram, support = layer
    first, found = (
        prune_layer(weight, gram, 0.7, penalty=penalty, support=given) for given in (None, np.ones_like(support))
    )
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


@pytest.mark.parametrize("method", [Wanda(), Magnitude(), SparseGpt()], ids=lambda method: type(method).__name__)
def test_blocks_of_outputs_have_their_own_part_of_the_support(layer, method):
    weight, gram, support = layer
    job = LayerJob(weight, gram, None, so.TopK(round(0.3 * weight.size)), support=support)
    whole = solve_within_memory(job, method)
    parts = [jax.device_get(solve_within_memory(part, method)) for part in split_job(job, method, 3)]
    joined = np.concatenate([part.weight for part in parts])
    assert not joined[~support].any()
    check_answer(whole, method, job.pattern)
    assert np.count_nonzero(joined) == round(0.3 * weight.size) == int(whole.kept)
    if not isinstance(method, SparseGpt):
        np.testing.assert_array_equal(joined, whole.weight)


def test_a_pruned_model_is_pruned_further(tmp_path, pruned, tokens):
    before = weights_of(pruned)
    settings = {"method": "sparsegpt", "propagate": 0.25, "train_epochs": 1, "keep_zeros": True}
    report = prune_model(pruned, tmp_path / "out", Recipe(sparsity=0.7, calibration=tokens, **settings))
    for key, weight in weights_of(tmp_path / "out").items():
        assert not weight[before[key] == 0].any(), key
        assert np.count_nonzero(weight) == round(0.3 * weight.size), key
    assert all(record.given_zeros == round(0.5 * record.size) for record in report.layers)
    assert report.kept_masks == []


def test_a_linear_with_more_zeros_than_asked_for_keeps_its_mask(tmp_path, pruned, tokens):
    report = prune_model(pruned, tmp_path / "out", Recipe(method=SHORT_ADMM, calibration=tokens, keep_zeros=True))
    assert report.recipe["sparsity"] == 0
    assert len(report.kept_masks) == len(report.layers) == 21
    before = weights_of(pruned)
    assert all(np.array_equal(weight, before[key]) for key, weight in weights_of(tmp_path / "out").items())
    assert "give the dense model and --masks" in " ".join(map(str, model_facts(report)))


def test_the_weights_of_a_dense_model_are_fitted_on_the_masks_of_a_pruned_one(tmp_path, source, pruned, tokens):
    recipe = Recipe(method=SHORT_ADMM, masks=str(pruned), calibration=tokens)
    report = prune_model(source, tmp_path / "out", recipe)
    before = weights_of(pruned)
    for key, weight in weights_of(tmp_path / "out").items():
        np.testing.assert_array_equal(weight != 0, before[key] != 0)
    unfitted = prune_model(source, tmp_path / "same", recipe.model_copy(update={"method": "magnitude"}))
    assert all(np.array_equal(weight, before[key]) for key, weight in weights_of(tmp_path / "same").items())
    assert sum(r.relative_error for r in report.layers) < sum(r.relative_error for r in unfitted.layers)
    assert report.summary()["kept_masks"] == 21


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
    found = masks(pruned)
    assert iter(found) is found
    found, tensors = dict(found), open_model(pruned).source
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
