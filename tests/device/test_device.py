"""What only a GPU or TPU can show, beside the same on the CPU of its machine: solves, models, memory that runs out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.layers.methods import find_method
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import layer_solver
from sparseopt.layers.split import solve_within_memory
from sparseopt.models import open_any
from sparseopt.pruning import LayerJob, PruningError, Recipe, perplexity, prune_model
from sparseopt.pruning.memory import BudgetError
from sparseopt.system.machine import device_memory_left
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.whole_runs import make_tokens

pytestmark = pytest.mark.device

PATTERNS = ("unstructured", "2:4")
METHODS = ("wanda", "sparsegpt", "maiht", "admm", "best")


def on_the_cpu(run: Any) -> Any:
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(run())


def layer_job(rng: np.random.Generator, outputs: int, inputs: int, pattern: str = "unstructured") -> LayerJob:
    """Correlated inputs, some of them large, as activations are."""
    shared = rng.standard_normal((2 * inputs, 8)) @ rng.standard_normal((8, inputs))
    tokens = (rng.standard_normal(shared.shape) + shared) * np.exp(rng.standard_normal(inputs) / 2)
    weight = (rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32)
    sparsity = None if ":" in pattern else 0.5
    return LayerJob(
        weight, (tokens.T @ tokens).astype(np.float32), None, parse_pattern(pattern, sparsity, weight.shape)
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", METHODS)
def test_a_layer_is_solved_as_on_the_cpu(rng, name, pattern):
    job, method = layer_job(rng, 96, 128, pattern), find_method(name, None)
    found = jax.device_get(layer_solver(job, method))
    there = on_the_cpu(lambda: layer_solver(job, method))
    assert found.kept == there.kept
    # Weights at the threshold are decided by a rounding, so errors agree and supports nearly do.
    np.testing.assert_allclose(found.relative_error, there.relative_error, rtol=0.02)
    assert np.mean((found.weight != 0) == (there.weight != 0)) > 0.98


@pytest.mark.parametrize(("order", "penalty"), [(0, so.L1(0.7)), (1, so.L1(0.7)), (0, so.GroupL2(0.7, axis=0))])
def test_a_picture_is_filtered_as_on_the_cpu(rng, order, penalty):
    y = np.kron(rng.integers(0, 4, (4, 4)), np.ones((8, 8))) + rng.standard_normal((32, 32)) / 2
    y, graph = y.astype(np.float32), so.Graph.grid((32, 32))
    found = so.trend_filter(y, graph, penalty, order, tol=1e-4)
    assert found.gap <= 1e-4
    there = on_the_cpu(lambda: so.trend_filter(y, graph, penalty, order, tol=1e-4).value)
    np.testing.assert_allclose(found.value, there, atol=0.05)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(np.float32, "highest"), (np.float32, "default"), (jnp.bfloat16, "high")]
)
def test_a_model_is_pruned_as_on_the_cpu(tmp_path, rng, dtype, precision):
    source = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng, dtype))
    recipe = Recipe(method="best", sparsity=0.5, calibration=make_tokens(rng, 8), precision=precision)
    scores = make_tokens(rng, 8)
    assert prune_model(source, tmp_path / "out", recipe).sparsity == pytest.approx(0.5, abs=1e-3)
    on_the_cpu(lambda: prune_model(source, tmp_path / "there", recipe).sparsity)
    found, there = perplexity(tmp_path / "out", scores), perplexity(tmp_path / "there", scores)
    np.testing.assert_allclose(found, there, rtol=0.05)


def hog(left: int) -> Any:
    """An array that leaves about so many bytes of the device's memory."""
    free = device_memory_left()
    if free is None:
        pytest.skip(f"SKIPPED: {jax.devices()[0].device_kind} does not tell its memory")
    return jax.block_until_ready(jnp.zeros(max(0, free - left), jnp.uint8))


def test_a_layer_that_does_not_fit_is_solved_by_blocks(rng):
    job, method = layer_job(rng, 16384, 512), find_method("wanda", None)
    taken = hog(100 * 2**20)
    report = solve_within_memory(job, method)
    assert report.output_blocks > 1
    assert int(report.kept) == job.weight.size // 2
    del taken


def test_memory_that_runs_out_ends_in_a_sentence_and_the_run_goes_on(tmp_path, rng):
    config = tiny_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2)
    source = write_folder(tmp_path / "source", config, random_tensors(config, rng))
    recipe = Recipe(method="admm", sparsity=0.5, calibration=make_tokens(rng, 8))
    taken = hog(150 * 2**20)
    with pytest.raises(BudgetError, match="the memory left on the device"):
        prune_model(source, tmp_path / "out", recipe)
    with pytest.raises(PruningError, match=r"memory ran out|does not fit"):
        prune_model(source, tmp_path / "out", recipe, memory=1 << 40)
    del taken
    assert prune_model(source, tmp_path / "out", recipe).sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_model_that_is_loaded_whole_runs_on_the_device(tmp_path, rng):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        pytest.skip("SKIPPED: torch is not built for this device; the model runs on the CPU")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("nemotron", vocab_size=64, num_key_value_heads=2, **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "source")
    model = open_any(tmp_path / "source")
    assert (model.module.device.type == "cuda") == (jax.default_backend() == "gpu")
    tokens = rng.integers(0, 64, (8, 16))
    report = prune_model(model, tmp_path / "out", Recipe(method="sparsegpt", propagate=0.5, calibration=tokens))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert np.isfinite(perplexity(tmp_path / "out", tokens))
