"""Every method with every pattern, SparseGPT against a simple implementation, and faulty methods."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.layers.methods import find_method
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import ScaledLayer
from sparseopt.pruning import (
    METHODS,
    AdmmPruning,
    GroupRemoval,
    Pruned,
    SparseGpt,
    SplicePruning,
    prune_layer,
    prune_model,
)
from tests.layers.layers import GROUP_METHODS, error_of, make_layer
from tests.tiers import often

PATTERNS = ["unstructured", "per-row", "2:4", "block:2x8", "group:4"]
# Compiling is what takes long: these run the code of "admm_splice", or of another pattern, once more.
COSTLY = {
    *((method, pattern) for method in ("best", "admm", "splice") for pattern in ("unstructured", "per-row", "2:4")),
    *(("admm_splice", pattern) for pattern in ("unstructured", "per-row", "2:4", "group:4")),
    ("admm", "group:4"), ("splice", "group:4"), ("splice", "block:2x8"), ("best", "block:2x8"),
    ("maiht", "unstructured"), ("maiht", "per-row"), ("maiht", "group:4"), ("sparsegpt", "unstructured"),
}  # fmt: skip
GRID = [
    pytest.param(method, pattern, marks=[pytest.mark.thorough] if (method, pattern) in COSTLY else [])
    for method in METHODS
    for pattern in PATTERNS
    if not (method == "sparsegpt" and pattern in ("block:2x8", "group:4"))
    and not (method in GROUP_METHODS and pattern != "group:4")
]


@pytest.fixture(scope="module")
def layer():
    """One layer for all methods: a program serves every test that prunes it by the same method and pattern."""
    return make_layer(np.random.default_rng(7))[:2]


def assert_pattern(weight, pattern, sparsity):
    """The pattern in the weight's own layout `[out, in]`, counted here."""
    alive = weight != 0
    outputs, inputs = weight.shape
    if pattern == "unstructured":
        assert alive.sum() == round((1 - sparsity) * weight.size)
    elif pattern == "per-row":
        assert set(alive.sum(axis=1)) == {round((1 - sparsity) * inputs)}
    elif pattern == "2:4":
        assert set(alive.reshape(-1, 4).sum(axis=1)) == {2}
    elif pattern == "group:4":
        groups = alive.reshape(outputs, -1, 4).all(axis=(0, 2))
        assert groups.sum() == round((1 - sparsity) * len(groups))
        assert alive.sum() == 4 * outputs * groups.sum()
    else:
        blocks = {(i, j): alive[i : i + 2, j : j + 8] for i in range(0, outputs, 2) for j in range(0, inputs, 8)}
        assert all(block.all() or not block.any() for block in blocks.values())
        assert sum(block.all() for block in blocks.values()) == round((1 - sparsity) * len(blocks))


def prune(layer, method, pattern):
    """Pruned to 62 % where the pattern has no sparsity of its own."""
    variances = np.diag(layer[1]) if method == "flap" else None
    return prune_layer(*layer, None if pattern == "2:4" else 0.62, pattern, method, input_variances=variances)


def program_of(method, pattern, inputs, outputs=48):
    """The program that prunes a layer, without its numbers; nothing is compiled."""
    shapes = ((inputs, inputs), (inputs, outputs), (inputs, outputs), (inputs,), (outputs,))
    layer = ScaledLayer(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    solve = jax.jit(lambda layer: method(layer, pattern))
    return re.sub(r"\d+", "", solve.lower(layer).as_text())


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        (SplicePruning(first=AdmmPruning(levels=1)), so.RowTopK(8)),
        (SparseGpt(), so.RowTopK(8)),
        (GroupRemoval(chunk=8), so.GroupTopK(8)),
    ],
    ids=["admm_splice", "sparsegpt", "osscar"],
)
def test_the_program_of_a_layer_does_not_grow_with_its_inputs(method, pattern):
    # A list of places of a bounded length differs by a hundredth; written-out panels would multiply the length.
    assert len(program_of(method, pattern, 16384)) == pytest.approx(len(program_of(method, pattern, 2048)), rel=0.05)


@pytest.mark.parametrize(("method", "pattern"), GRID)
def test_every_method_has_the_exact_pattern(layer, method, pattern):
    weight, gram = layer
    result = prune(layer, method, pattern)
    assert_pattern(result.weight, pattern, 0.62)
    assert result.status is so.Status.CONVERGED
    assert result.relative_error == pytest.approx(error_of(result.weight, weight, gram), rel=1e-3)


@pytest.mark.parametrize("pattern", often(["per-row", "block:2x8", "group:4"], "block:2x8"))
def test_methods_rank_as_they_should(layer, pattern):
    """SparseGPT stands apart: with one block of inputs it chooses all weights before it compensates any."""
    thorough, maiht, wanda, magnitude = (
        prune(layer, method, pattern).relative_error for method in ("admm_splice", "maiht", "wanda", "magnitude")
    )
    assert thorough < maiht < wanda < magnitude


def test_splicing_does_not_undo_what_admm_found(layer):
    spliced, admm = (prune(layer, method, "block:2x8").relative_error for method in ("admm_splice", "admm"))
    assert spliced <= 1.001 * admm


@pytest.mark.thorough
def test_more_freedom_costs_less(layer):
    """Each set of weights lies in the next: 2:4, half of every row, half of the layer."""
    errors = [
        prune_layer(*layer, 0.5, pattern, "admm_splice").relative_error
        for pattern in ("2:4", "per-row", "unstructured")
    ]
    assert errors[0] > errors[1] > errors[2]


def test_wanda_per_row_is_wanda_itself(layer):
    weight, gram = layer
    rows = prune_layer(weight, gram, 0.5, "per-row", "wanda").weight
    np.testing.assert_array_equal(rows, prune_layer(weight, gram, 0.5, "unstructured", "wanda").weight)


def sparsegpt(weight, gram, keep_block, ridge=0.01, size=128):
    """Algorithm 1 of Frantar and Alistarh (2023) row by row in float64; `keep_block(saliency, first)` gives masks."""
    scale = np.sqrt(np.diag(gram).astype(np.float64))
    w = weight.astype(np.float64) * scale
    inputs = len(scale)
    hessian = gram / np.outer(scale, scale) + ridge * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    for first in range(0, inputs, size):
        last = min(first + size, inputs)
        keep = keep_block((w[:, first:last] / np.diag(upper)[first:last]) ** 2, first)
        for i in range(first, last):
            error = np.where(keep[:, i - first], 0, w[:, i]) / upper[i, i]
            w[:, i:] -= np.outer(error, upper[i, i:])
            w[:, i] = np.where(keep[:, i - first], w[:, i], 0)
    return w / scale


def largest(score, count):
    """True at the `count` largest of a flat score."""
    mask = np.zeros(score.size, bool)
    mask[np.argsort(-score, kind="stable")[:count]] = True
    return mask


@pytest.mark.parametrize("pattern", ["unstructured", "per-row", "2:4"])
def test_sparsegpt_is_its_own_plain_version(rng, pattern):
    # More inputs than a block, and no multiple of it.
    weight, gram, _ = make_layer(rng, outputs=12, inputs=160, tokens=512)
    inputs = weight.shape[1]
    k = round(0.4 * weight.size) if pattern == "unstructured" else round(0.4 * inputs)

    def keep_block(saliency, first):
        wide = saliency.shape[1]
        spent, target = (k * seen // inputs for seen in (first, first + wide))
        if pattern == "unstructured":
            return largest(saliency.ravel(), target - spent).reshape(saliency.shape)
        if pattern == "per-row":
            return np.stack([largest(row, target - spent) for row in saliency])
        return np.stack([largest(row, 2) for row in saliency])

    # Groups are chosen when they are reached: blocks of 4 inputs, as in the paper.
    expected = sparsegpt(weight, gram, keep_block, size=4 if pattern == "2:4" else 128)
    sparsity = None if pattern == "2:4" else 0.6
    ours = prune_layer(weight, gram, sparsity, pattern, "sparsegpt")
    np.testing.assert_array_equal(ours.weight != 0, expected != 0)
    np.testing.assert_allclose(ours.weight, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", [0.0, 1 / 160, 0.5, 0.9999])
def test_sparsegpt_spends_any_count_exactly(rng, sparsity):
    weight, gram, _ = make_layer(rng, outputs=12, inputs=160, tokens=512)
    for pattern in ("unstructured", "per-row"):
        assert_pattern(prune_layer(weight, gram, sparsity, pattern, "sparsegpt").weight, pattern, sparsity)


def test_sparsegpt_refuses_groups_across_its_blocks(layer):
    with pytest.raises(ValueError, match="blocks of 24 inputs, which 16 does not divide"):
        prune_layer(*layer, None, "8:16", SparseGpt(block=24))


def by_size(layer, mask):
    return Pruned(jnp.where(mask, layer.center, 0), mask, 1, so.Status.CONVERGED)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Own:
    """A method made of a function."""

    answer: object

    def __call__(self, layer, pattern):
        return self.answer(layer, pattern)


WRONG = {
    "layout": (lambda s, p: by_size(s, p.mask(jnp.abs(s.center)))._replace(values=s.center.T),
               ValueError, r"\[in, out\] = \[64, 48\], values of float32 \[48, 64\], expected float \[64, 48\]"),
    "mask's dtype": (lambda s, p: by_size(s, p.mask(jnp.abs(s.center)).astype(jnp.float32)),
                     ValueError, r"mask of float32 \[64, 48\], expected bool"),
    "steps": (lambda s, p: by_size(s, p.mask(jnp.abs(s.center)))._replace(steps=jnp.arange(3)),
              ValueError, r"steps of int32 \[3\], expected int \[\]"),
    "no Pruned": (lambda s, p: s.center, ValueError, r"must return sparseopt.pruning.Pruned\("),
    "count": (lambda s, p: by_size(s, jnp.abs(s.center) > jnp.median(jnp.abs(s.center))),
              RuntimeError, r"Own kept 1,536 of 3,072 weights, the pattern RowTopK\(k=26, axis=0\) asks for 1,248"),
    "rows": (lambda s, p: by_size(s, so.TopK(48 * p.k).mask(jnp.abs(s.center))),
             RuntimeError, r"Own kept up to \d+ weights in a row, the pattern .* allows 26"),
    "stray": (lambda s, p: by_size(s, p.mask(jnp.abs(s.center)))._replace(values=s.center),
              RuntimeError, "1,824 non-zero values off its own mask"),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_method_of_ones_own_that_answers_wrongly_is_told_so(layer, answer, error, message):
    with pytest.raises(error, match=message):
        prune_layer(*layer, 0.6, "per-row", Own(answer))


def test_a_pass_gives_flap_the_variances_of_each_input(tmp_path, rng):
    from sparseopt.models import open_model
    from sparseopt.pruning import Recipe
    from sparseopt.pruning.base.grams import tapped
    from tests.models.tiny import random_tensors, tiny_config, write_folder
    from tests.pruning.test_pipeline import make_tokens

    source = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))
    tokens = make_tokens(rng, 12)
    prune_model(source, tmp_path / "out", Recipe(calibration=tokens, method="flap", pattern="group:8"))
    model, pruned = open_model(source), open_model(tmp_path / "out")
    x = jax.jit(tapped)(model.block(0), model.embedding()(jnp.asarray(tokens)))[0]["attention_input"]
    weight, found = (m.stored("model.layers.0.self_attn.q_proj.weight") for m in (model, pruned))
    score = np.var(np.asarray(x), axis=(0, 1)) * np.sum(weight**2, axis=0)
    groups = score.reshape(-1, 8).sum(axis=1)
    np.testing.assert_array_equal(found != 0, np.tile(np.repeat(groups > np.median(groups), 8), (len(weight), 1)))


def test_in_a_model_the_layer_is_named(tmp_path, rng):
    from sparseopt.pruning import PruningError, Recipe
    from tests.models.tiny import random_tensors, tiny_config, write_folder
    from tests.pruning.test_pipeline import make_tokens

    source = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))
    recipe = Recipe(calibration=make_tokens(rng, 12), sparsity=0.6, pattern="per-row")
    shape, count = (recipe.model_copy(update={"method": Own(WRONG[name][0])}) for name in ("layout", "count"))
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.k_proj: Own returns"):
        prune_model(source, tmp_path / "out", shape)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PruningError, match=r"model.layers.0.self_attn.q_proj: Own kept"):
        prune_model(source, tmp_path / "out", count)


@pytest.mark.parametrize(
    ("method", "pattern"), [("osscar", "group:4"), ("sparsegpt", "per-row"), ("maiht", "unstructured")]
)
def test_a_layer_stays_in_float32_where_64_bit_types_are_enabled(method, pattern):
    shapes = ((64, 64), (64, 48), (64, 48), (64,), (48,))
    layer = ScaledLayer(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    with jax.enable_x64(True):
        answer = jax.eval_shape(find_method(method), layer, parse_pattern(pattern, 0.5, (48, 64)))
    assert answer.values.dtype == jnp.float32
