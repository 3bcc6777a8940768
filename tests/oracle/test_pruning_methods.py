"""SparseGPT and Wanda, written in torch from their papers, on two layers of a real model with their Gram matrices."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import bundled_model, open_model
from sparseopt.pruning import SparseGpt, prune_layer
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.text.windows import begin_windows, text_windows

pytestmark = pytest.mark.oracle

LINEARS = ("self_attn.q_proj", "mlp.down_proj")
# Whole numbers of weights in every row and block: the papers do not say how to round.
CASES = [("unstructured", 0.5), ("unstructured", 0.75), ("2:4", None)]


class Layer(NamedTuple):
    weight: np.ndarray
    gram: np.ndarray


@pytest.fixture(scope="module")
def layers() -> dict[str, Layer]:
    """Linears of the first block, with the inputs of 8,192 tokens.

    Quantised weights have few values, so that scores tie; a relative change of 1e-3 separates them.
    """
    model, runner = open_model(bundled_model()), BlockRunner()
    ids = begin_windows(*text_windows(model.source, "pydoc", "calibration", 16, 512))
    block = model.block(0)
    grams = runner.grams(block, make_batches(model.embedding()(jnp.asarray(ids))))
    rng, found = np.random.default_rng(0), {}
    for name in LINEARS:
        weight = np.asarray(block.read(f"{name}.weight"))
        weight = (weight * (1 + 1e-3 * rng.standard_normal(weight.shape))).astype(np.float32)
        found[name] = Layer(weight, np.asarray(grams[block.linears[name]].gram))
    return found


def fewest(score: Any, count: int) -> Any:
    """True at the `count` smallest entries of each row."""
    import torch

    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, torch.argsort(score, dim=1)[:, :count], True)


def wanda(weight: Any, gram: Any, sparsity: float | None) -> Any:
    """Eq. 1 of Sun et al.: scores |W_ij| ||X_j||, compared among the weights of an output, or of four of its inputs."""
    score = weight.abs() * gram.diagonal().sqrt()
    rows, count = (score, int(weight.shape[1] * sparsity)) if sparsity else (score.reshape(-1, 4), 2)
    return weight.masked_fill(fewest(rows, count).reshape(weight.shape), 0)


def sparsegpt(weight: Any, gram: Any, sparsity: float | None, damping: float, block: int = 128) -> Any:
    """Algorithm 1 of Frantar and Alistarh: masks for `block` columns at a time, for n:m patterns for four.

    Their code damps with a share of the Hessian's mean diagonal entry; here each input has that share of its own.
    """
    import torch

    weight, inputs = weight.clone(), weight.shape[1]
    hessian = gram + damping * torch.diag(gram.diagonal())
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = torch.zeros_like(weight[:, start:stop])
        pruned = errors.bool()
        for column in range(start, stop):
            pivots = factor.diagonal()[start:stop]
            if sparsity is not None and column == start:
                score = (weight[:, start:stop] / pivots) ** 2
                pruned = fewest(score.reshape(1, -1), int(score.numel() * sparsity)).reshape(score.shape)
            if sparsity is None and column % 4 == 0:
                here = slice(column - start, column - start + 4)
                pruned[:, here] = fewest((weight[:, column : column + 4] / pivots[here]) ** 2, 2)
            old = weight[:, column].clone()
            weight[:, column] = old.masked_fill(pruned[:, column - start], 0)
            errors[:, column - start] = (old - weight[:, column]) / factor[column, column]
            weight[:, column + 1 : stop] -= torch.outer(errors[:, column - start], factor[column, column + 1 : stop])
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight


def loss(pruned: np.ndarray, layer: Layer) -> float:
    """`||X (V - W)ᵀ||² / ||X Wᵀ||²`."""
    change, dense, gram = (np.asarray(array, np.float64) for array in (pruned - layer.weight, layer.weight, layer.gram))
    return np.sum((change @ gram) * change) / np.sum((dense @ gram) * dense)


@pytest.mark.parametrize(("pattern", "sparsity"), CASES)
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_masks_and_losses_are_those_of_the_paper_in_torch(
    layers: dict[str, Layer], method: str, name: str, pattern: str, sparsity: float | None
) -> None:
    import torch

    weight, gram = (torch.from_numpy(array.astype(np.float64)) for array in layers[name])
    ridge = SparseGpt().ridge
    theirs = wanda(weight, gram, sparsity) if method == "wanda" else sparsegpt(weight, gram, sparsity, ridge)
    ours = prune_layer(*layers[name], sparsity, pattern, method).weight
    assert np.mean((ours != 0) == (theirs.numpy() != 0)) >= 0.999
    assert loss(ours, layers[name]) == pytest.approx(loss(theirs.numpy(), layers[name]), rel=1e-3)
