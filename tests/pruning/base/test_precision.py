"""The precision of products of activations: which products it reaches, and where it stands."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.base.dense import activation_matmul, activations_in, precision_on
from sparseopt.layers.methods import find_method
from sparseopt.layers.problem import ScaledLayer
from sparseopt.models import Block, open_model
from sparseopt.pruning import Recipe, prune_model
from sparseopt.pruning.base.grams import BlockRunner, gather_grams
from tests.pruning.whole_runs import Broken


def products(function, *arguments):
    """How many products a program has, by their precision; nothing is compiled."""
    text = jax.jit(function).lower(*arguments).as_text()
    found = re.findall(r"precision = \[(\w+), (\w+)\]", text)
    assert len(found) == text.count("dot_general")
    assert all(left == right for left, right in found)
    return {left.lower(): sum(pair[0] == left for pair in found) for left, _ in found}


def slope(block: Block, x):
    return jax.grad(lambda x: jnp.sum(block(x)))(x)


@pytest.mark.parametrize(("name", "run"), [("llama", gather_grams), ("experts", slope)])
def test_it_reaches_every_product_of_a_block(models, name, run):
    block = open_model(models(name)).block(0)
    x = jnp.ones((1, 16, block.config.hidden_size))
    usual = products(run, block, x)
    assert list(usual) == ["highest"]
    with activations_in("default"):
        assert products(run, block, x) == {"default": usual["highest"]}


@pytest.mark.parametrize(("name", "run"), [("llama", gather_grams), ("experts", gather_grams), ("experts", slope)])
def test_bfloat16_rounds_the_operands_of_every_product_and_no_sum(models, name, run):
    block = open_model(models(name)).block(0)
    x = jax.random.normal(jax.random.key(3), (1, 16, block.config.hidden_size))
    usual, exact = products(run, block, x), jax.tree.leaves(run(block, x))
    with activations_in("bfloat16"):
        text = jax.jit(run).lower(block, x).as_text()
        rounded = jax.tree.leaves(run(block, x))
    kinds = re.findall(r"dot_general.*: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\) -> tensor<[\dx]*(\w+)>", text)
    assert kinds == [("bf16", "bf16", "f32")] * usual["highest"]
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, atol=0.05 * float(jnp.max(jnp.abs(theirs))))
    assert any((ours != theirs).any() for ours, theirs in zip(rounded, exact, strict=True))


def test_bfloat16_changes_no_product_or_gradient_of_numbers_that_it_holds(rng):
    a, b, change = (jnp.asarray(rng.integers(-8, 9, shape), jnp.float32) for shape in ((2, 5, 3), (2, 3, 7), (2, 5, 7)))
    with activations_in("bfloat16"):
        value, pull = jax.vjp(activation_matmul, a, b)
        np.testing.assert_array_equal(value, a @ b)
        for ours, theirs in zip(pull(change), (change @ b.swapaxes(1, 2), a.swapaxes(1, 2) @ change), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("name", "tokens"), [("llama", "routed"), ("experts", "routed"), ("experts", "all")])
def test_no_array_of_a_block_grows_to_float64_where_jax_has_64_bit_types(models, name, tokens):
    block = open_model(models(name)).block(0)
    x = jnp.ones((1, 16, block.config.hidden_size))
    with jax.enable_x64(True):
        text = jax.jit(partial(gather_grams, expert_tokens=tokens)).lower(block, x, dense_x=x).as_text()
    assert not re.findall(r"tensor<(?:\d+x)+f64>", text)


@pytest.mark.parametrize("method", ["maiht", "sparsegpt"])
def test_what_is_solved_for_a_layer_stays_in_the_highest(method):
    layer = ScaledLayer(*(jnp.ones(shape) for shape in ((16, 16), (16, 8), (16, 8), (16,), (8,))))
    with activations_in("default"):
        assert list(products(lambda layer: find_method(method)(layer, so.RowTopK(8)), layer)) == ["highest"]


def test_high_is_more_than_default_on_an_nvidia_gpu():
    # JAX's own "high" and "default" are both one product in TF32 there.
    hopper, turing, amd = (SimpleNamespace(compute_capability=each) for each in ("9.0", "7.5", "gfx942"))
    assert precision_on(hopper, "high") == "TF32_TF32_F32_X3"
    assert precision_on(hopper, "default") == "default"
    assert {precision_on(device, "high") for device in (turing, amd, jax.devices("cpu")[0])} == {"high"}


def test_it_holds_for_the_pass_alone(tmp_path, models, tokens, monkeypatch):
    seen = []

    def watched(*_):
        seen.append(jax.config.jax_default_matmul_precision)
        raise Broken

    monkeypatch.setattr(BlockRunner, "grams", watched)
    with pytest.raises(Broken):
        prune_model(models("square"), tmp_path / "out", Recipe(calibration=tokens, precision="high", method="wanda"))
    assert seen == ["high"]
    assert jax.config.jax_default_matmul_precision is None
