"""Methods x patterns x facts: exact patterns and counts, errors as reported, ranks, plain versions, own methods."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sparseopt as so
from sparseopt.layers.methods import find_method
from sparseopt.layers.problem import ScaledLayer
from sparseopt.models import open_model
from sparseopt.pruning import (
    AdmmPruning,
    GroupRemoval,
    Pruned,
    PruningError,
    Recipe,
    SparseGpt,
    SplicePruning,
    prune_layer,
    prune_model,
)
from sparseopt.pruning.base.grams import tapped
from tests.experiments.toy import CappedL1
from tests.layers.layers import GROUP_METHODS, error_of, make_layer, paper_procedure, sparsegpt, wanda
from tests.layers.test_removal import refit
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.whole_runs import make_tokens

PATTERNS = ("unstructured", "per-row", "2:4", "block:2x8", "group:4")
# Of the methods that solve for long, those patterns that differ in code.
GRID = {
    **dict.fromkeys(("wanda", "magnitude"), PATTERNS),
    "maiht": ("unstructured", "2:4", "block:2x8"),
    "sparsegpt": ("unstructured", "per-row", "2:4"),
    **dict.fromkeys(("admm", "admm_splice"), ("block:2x8",)),
    "splice": ("2:4",),
    **dict.fromkeys(("best", *GROUP_METHODS), ("group:4",)),
}
CASES = [(method, pattern) for method, patterns in GRID.items() for pattern in patterns]
CASES += [("maiht paper", "unstructured"), *itertools.product(("maiht paper", "wanda"), ("4:8", "1:4"))]


@pytest.fixture(scope="module")
def layer():
    """Weight, Gram and held-out Gram for all methods: a program serves every test that prunes it the same way."""
    return make_layer(np.random.default_rng(7))


def prune(layer, method, pattern="unstructured", sparsity=0.62):
    """Pruned to 62 % where nothing else is said and the pattern has no sparsity of its own."""
    weight, gram, test_gram = layer
    name, _, preset = method.partition(" ") if isinstance(method, str) else (method, "", "")
    options = {"input_variances": np.diag(gram)} if method == "flap" else {}
    sparsity = None if pattern[0].isdigit() else sparsity
    return prune_layer(weight, gram, sparsity, pattern, name, preset=preset or None, test_gram=test_gram, **options)


def assert_pattern(weight, pattern, sparsity):
    """The pattern in the weight's own layout `[out, in]`, counted here."""
    alive = weight != 0
    outputs, inputs = weight.shape
    if pattern == "unstructured":
        assert alive.sum() == round((1 - sparsity) * weight.size)
    elif pattern == "per-row":
        assert set(alive.sum(axis=1)) == {round((1 - sparsity) * inputs)}
    elif pattern[0].isdigit():
        kept, among = map(int, pattern.split(":"))
        assert set(alive.reshape(-1, among).sum(axis=1)) == {kept}
    elif pattern == "group:4":
        groups = alive.reshape(outputs, -1, 4).all(axis=(0, 2))
        assert groups.sum() == round((1 - sparsity) * len(groups))
        assert alive.sum() == 4 * outputs * groups.sum()
    else:
        blocks = {(i, j): alive[i : i + 2, j : j + 8] for i in range(0, outputs, 2) for j in range(0, inputs, 8)}
        assert all(block.all() or not block.any() for block in blocks.values())
        assert sum(block.all() for block in blocks.values()) == round((1 - sparsity) * len(blocks))


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_every_method_has_the_exact_pattern_and_the_errors_that_it_reports(layer, method, pattern):
    weight, gram, test_gram = layer
    result = prune(layer, method, pattern)
    assert_pattern(result.weight, pattern, 0.62)
    assert result.status is so.Status.CONVERGED
    assert result.sparsity == (weight.size - np.count_nonzero(result.weight)) / weight.size
    assert result.relative_error == pytest.approx(error_of(result.weight, weight, gram), rel=1e-3)
    assert result.test_error == pytest.approx(error_of(result.weight, weight, test_gram), rel=1e-3)


@pytest.mark.parametrize("method", ["maiht paper", "maiht", "wanda", "magnitude", "sparsegpt"])
def test_the_count_is_exact_to_the_weight(layer, method):
    for sparsity in (0.0, 0.01, 0.1, 0.25, 0.77, 0.99, 0.9999):
        if sparsity < 0.999 or method == "sparsegpt":
            assert_pattern(prune(layer, method, sparsity=sparsity).weight, "unstructured", sparsity)


RANKS = {
    # SparseGPT stands apart: with one block of inputs it chooses all weights before it compensates any.
    "blocks": [(method, "block:2x8") for method in ("admm_splice", "admm", "maiht", "wanda", "magnitude")],
    "literature": [(method, "unstructured") for method in ("maiht", "maiht paper", "wanda", "magnitude")],
    "a pattern": [("maiht", "unstructured"), ("maiht", "2:4"), ("wanda", "2:4")],
}


@pytest.mark.parametrize("name", RANKS)
def test_methods_and_patterns_rank_as_they_should(layer, name):
    errors = [prune(layer, method, pattern, 0.5).relative_error for method, pattern in RANKS[name]]
    for less, more in itertools.pairwise(errors):
        # Splicing does not undo what ADMM found.
        assert less < (0.9 if name == "literature" else 1.001) * more


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7])
def test_preset_paper_agrees_with_the_papers_procedure(rng, sparsity):
    weight, gram, _ = make_layer(rng, outputs=96, inputs=96)
    ours = prune_layer(weight, gram, sparsity, preset="paper")
    theirs = paper_procedure(weight, gram, sparsity)
    assert ours.steps == 20
    assert ours.relative_error == pytest.approx(error_of(theirs, weight, gram), rel=0.01)
    assert np.mean((ours.weight != 0) == (theirs != 0)) > 0.995


def test_best_is_near_the_best_support_of_all_on_a_layer_small_enough_to_enumerate(rng):
    inputs, kept = 8, 4
    weight, gram, _ = make_layer(rng, outputs=1, inputs=inputs)
    dense, gram64 = weight[0].astype(np.float64), gram.astype(np.float64)
    supports = map(list, itertools.combinations(range(inputs), kept))
    optimum = min(error_of(refit(gram64, dense, support)[0], dense, gram64) for support in supports)
    result = prune_layer(weight, gram, 0.5)
    assert optimum * (1 - 1e-3) <= result.relative_error <= 1.5 * optimum


def test_wanda_is_magnitude_in_scaled_coordinates_and_keeps_as_many_in_every_row(layer):
    weight, gram, _ = layer
    for pattern in ("unstructured", "per-row", "2:4"):
        np.testing.assert_array_equal(prune(layer, "wanda", pattern, 0.5).weight, wanda(weight, gram, pattern, 0.5))
    per_row = np.count_nonzero(prune(layer, "wanda", sparsity=0.31).weight, axis=1)
    assert per_row.max() - per_row.min() == 1


def test_magnitude_sees_the_weights_alone(layer, rng):
    _, gram, _ = layer
    # As quantised weights are, so that many are equal; and outputs that count differently.
    weight, counts = layer[0].astype(ml_dtypes.bfloat16), rng.uniform(0.1, 9, 48)
    found = prune_layer(weight, np.eye(len(gram)), 0.5, method="magnitude").weight
    assert np.min(np.abs(found), where=found != 0, initial=9) >= np.max(np.abs(weight), where=found == 0, initial=0)
    half_dead = gram.copy()
    half_dead[:5], half_dead[:, :5] = 0, 0
    for other in (half_dead, np.zeros_like(gram)):
        result = prune_layer(weight, other, 0.5, method="magnitude", output_weights=counts)
        np.testing.assert_array_equal(result.weight, found)
    assert result.dead_inputs == len(gram)


@pytest.mark.parametrize("pattern", ["unstructured", "per-row", "2:4"])
def test_sparsegpt_is_its_own_plain_version(rng, pattern):
    # More inputs than a block, and no multiple of it.
    weight, gram, _ = make_layer(rng, outputs=12, inputs=160, tokens=512)
    sparsity = None if pattern == "2:4" else 0.6
    expected = sparsegpt(weight, gram, pattern, sparsity)
    ours = prune_layer(weight, gram, sparsity, pattern, "sparsegpt")
    np.testing.assert_array_equal(ours.weight != 0, expected != 0)
    np.testing.assert_allclose(ours.weight, expected, rtol=1e-3, atol=1e-3)
    for sparsity in (0.0, 1 / 160, 0.5, 0.9999) if pattern != "2:4" else ():
        assert_pattern(prune_layer(weight, gram, sparsity, pattern, "sparsegpt").weight, pattern, sparsity)


@pytest.mark.parametrize("kind", [so.L1, CappedL1])
def test_a_penalty_of_ones_own_chooses_the_support_and_the_count_stays_exact(layer, kind):
    weight, gram, _ = layer
    penalty = kind(1.0)
    result = prune_layer(weight, gram, 0.6, penalty=penalty)
    assert_pattern(result.weight, "unstructured", 0.6)
    assert result.relative_error < prune(layer, "magnitude", sparsity=0.6).relative_error
    # The level is found, so the one given changes nothing.
    other = prune_layer(weight, gram, 0.6, penalty=dataclasses.replace(penalty, weight=1e3))
    np.testing.assert_array_equal(other.weight, result.weight)


def test_l0_named_as_the_penalty_is_maiht_itself(layer):
    named = prune_layer(*layer[:2], 0.5, penalty=so.L0(1.0))
    assert named.relative_error == pytest.approx(prune(layer, "maiht", sparsity=0.5).relative_error, rel=0.02)


def by_size(layer, mask):
    return Pruned(jnp.where(mask, layer.center, 0), mask, 1, so.Status.CONVERGED)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Own:
    """A method made of a function."""

    answer: object

    def __call__(self, layer, pattern):
        return self.answer(layer, pattern)


def test_a_method_of_ones_own(layer):
    first = Own(lambda s, p: by_size(s, jnp.arange(s.center.size).reshape(s.center.shape) < p.k))
    result = prune(layer, first, sparsity=0.5)
    np.testing.assert_allclose(result.weight[:, :32], layer[0][:, :32], rtol=1e-6)
    assert (result.weight[:, 32:] == 0).all()


def right(layer, pattern):
    return by_size(layer, pattern.mask(jnp.abs(layer.center)))


def too_many(layer, pattern):
    return by_size(layer, jnp.abs(layer.center) > jnp.median(jnp.abs(layer.center)))


def transposed(layer, pattern):
    return right(layer, pattern)._replace(values=layer.center.T)


# The answer to a layer of 48 outputs and 64 inputs, and two parts of what is told.
WRONG = [
    (transposed, ValueError, "values of float32 [48, 64]", "[64, 48]"),
    (lambda s, p: by_size(s, right(s, p).mask.astype(jnp.float32)), ValueError, "mask of float32", "bool"),
    (lambda s, p: right(s, p)._replace(steps=jnp.arange(3)), ValueError, "steps of int32 [3]", "int []"),
    (lambda s, p: s.center, ValueError, "must return", "Pruned("),
    (too_many, RuntimeError, "kept 1,536 of 3,072", "1,248"),
    (lambda s, p: by_size(s, so.TopK(48 * p.k).mask(jnp.abs(s.center))), RuntimeError, "in a row", "26"),
    (lambda s, p: right(s, p)._replace(values=s.center), RuntimeError, "1,824 non-zero", "off its own mask"),
]


@pytest.mark.parametrize(("answer", "error", "given", "expected"), WRONG)
def test_a_method_of_ones_own_that_answers_wrongly_is_told_so(layer, answer, error, given, expected):
    with pytest.raises(error, match=re.escape(given)) as caught:
        prune_layer(*layer[:2], 0.6, "per-row", Own(answer))
    assert expected in str(caught.value)


@pytest.fixture
def source(tmp_path, rng):
    config = tiny_config(num_hidden_layers=1)
    return write_folder(tmp_path / "source", config, random_tensors(config, rng))


def test_in_a_model_the_layer_is_named(source, tmp_path, rng):
    recipe = Recipe(calibration=make_tokens(rng, 12), sparsity=0.6, pattern="per-row")
    shape, count = (recipe.model_copy(update={"method": Own(answer)}) for answer in (transposed, too_many))
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.k_proj: Own returns"):
        prune_model(source, tmp_path / "out", shape)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PruningError, match=r"model.layers.0.self_attn.q_proj: Own kept"):
        prune_model(source, tmp_path / "out", count)


def test_a_pass_gives_flap_the_variances_of_each_input(source, tmp_path, rng):
    tokens = make_tokens(rng, 12)
    recipe = Recipe(calibration=tokens, method="flap", pattern="group:8", heldout_windows=0)
    prune_model(source, tmp_path / "out", recipe)
    model, pruned = open_model(source), open_model(tmp_path / "out")
    x = jax.jit(tapped)(model.block(0), model.embedding()(jnp.asarray(tokens)))[0]["attention_input"]
    weight, found = (m.stored("model.layers.0.self_attn.q_proj.weight") for m in (model, pruned))
    score = np.var(np.asarray(x), axis=(0, 1)) * np.sum(weight**2, axis=0)
    groups = score.reshape(-1, 8).sum(axis=1)
    np.testing.assert_array_equal(found != 0, np.tile(np.repeat(groups > np.median(groups), 8), (len(weight), 1)))


def scaled_shapes(inputs):
    """A layer of 48 outputs as shapes; nothing is compiled."""
    shapes = ((inputs, inputs), (inputs, 48), (inputs, 48), (inputs,), (48,))
    return ScaledLayer(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


PROGRAMS = {
    "admm_splice": (SplicePruning(first=AdmmPruning(levels=1)), so.RowTopK(8)),
    "sparsegpt": (SparseGpt(), so.RowTopK(8)),
    "osscar": (GroupRemoval(chunk=8), so.GroupTopK(8)),
    "bits": (find_method("wanda", bits="q4_0"), so.RowTopK(8)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_of_a_layer_does_not_grow_with_its_inputs_and_stays_in_float32(name):
    method, pattern = PROGRAMS[name]
    solve = jax.jit(lambda layer: method(layer, pattern))
    wide, narrow = (re.sub(r"\d+", "", solve.lower(scaled_shapes(inputs)).as_text()) for inputs in (16384, 2048))
    # A list of places of a bounded length differs by a hundredth; written-out panels would multiply the length.
    assert len(wide) == pytest.approx(len(narrow), rel=0.05)
    with jax.enable_x64(True):
        assert jax.eval_shape(solve, scaled_shapes(64)).values.dtype == jnp.float32
