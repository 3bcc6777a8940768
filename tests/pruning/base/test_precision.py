"""The precision of products of activations: which products it reaches, and who refuses it."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.base.dense import activations_in, precision_on
from sparseopt.layers.methods import find_method
from sparseopt.layers.problem import ScaledLayer
from sparseopt.models import Block, TorchModel, open_model, open_source
from sparseopt.pruning import Recipe, pipeline, prune_model, prune_models
from sparseopt.pruning.base.grams import BlockRunner, gather_grams
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder

MIXTURE = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 3}


def folder_of(place, rng, **changes):
    config = tiny_config(num_hidden_layers=2, **changes)
    return write_folder(place / "source", config, random_tensors(config, rng))


@pytest.fixture
def source(tmp_path, rng):
    return folder_of(tmp_path, rng)


def products(function, *arguments):
    """How many products a program has, by their precision; nothing is compiled."""
    text = jax.jit(function).lower(*arguments).as_text()
    found = re.findall(r"precision = \[(\w+), (\w+)\]", text)
    assert len(found) == text.count("dot_general")
    assert all(left == right for left, right in found)
    return {left.lower(): sum(pair[0] == left for pair in found) for left, _ in found}


def slope(block: Block, x):
    return jax.grad(lambda x: jnp.sum(block(x)))(x)


@pytest.mark.parametrize("run", [gather_grams, slope])
@pytest.mark.parametrize("changes", [{}, MIXTURE], ids=["dense", "mixture"])
def test_it_reaches_every_product_of_a_block(tmp_path, rng, changes, run):
    block = open_model(folder_of(tmp_path, rng, **changes)).block(0)
    x = jnp.ones((1, 16, block.config.hidden_size))
    usual = products(run, block, x)
    assert list(usual) == ["highest"]
    for precision in ("high", "default"):
        with activations_in(precision):
            assert products(run, block, x) == {precision: usual["highest"]}


@pytest.mark.parametrize("changes", [{}, MIXTURE], ids=["dense", "mixture"])
def test_no_array_of_a_block_grows_to_float64_where_jax_has_64_bit_types(tmp_path, rng, changes):
    block = open_model(folder_of(tmp_path, rng, **changes)).block(0)
    x = jnp.ones((1, 16, block.config.hidden_size))
    for tokens in ("routed", "all"):
        with jax.enable_x64(True):
            text = jax.jit(partial(gather_grams, expert_tokens=tokens)).lower(block, x, dense_x=x).as_text()
        assert not re.findall(r"tensor<(?:\d+x)+f64>", text)


@pytest.mark.parametrize("method", ["maiht", "admm_splice", "sparsegpt"])
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


def test_it_holds_for_the_pass_alone_and_stands_in_the_report(tmp_path, source, rng, monkeypatch):
    tokens, seen = rng.integers(0, len(VOCAB), (4, 8)).astype(np.int32), []
    forward = BlockRunner.forward

    def watched(runner, block, batches):
        seen.append(jax.config.jax_default_matmul_precision)
        return forward(runner, block, batches)

    monkeypatch.setattr(BlockRunner, "forward", watched)
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=0, precision="high")
    assert prune_model(source, tmp_path / "out", recipe).precision == "high"
    assert set(seen) == {"high"}
    assert jax.config.jax_default_matmul_precision is None


def test_recipes_of_one_pass_share_it(tmp_path, source, rng):
    tokens = rng.integers(0, len(VOCAB), (4, 8)).astype(np.int32)
    recipes = [(Recipe(calibration=tokens, precision=name), tmp_path / name) for name in ("high", "highest")]
    with pytest.raises(ValueError, match=r"must share their calibration tokens, .*differ in precision"):
        prune_models(source, recipes)


def test_blocks_that_run_in_torch_refuse_it(tmp_path, source, monkeypatch):
    class Foreign(TorchModel):
        def __init__(self):
            self.config = SimpleNamespace(model_type="foreign")
            self.source = open_source(source)

    monkeypatch.setattr(pipeline, "open_model", lambda _: Foreign())
    with pytest.raises(ValueError, match=r"foreign model.*run in torch:\n  precision='high' is for JAX.*leave it out"):
        prune_model("any", tmp_path / "out", Recipe(precision="high"))
