"""The bundled model: exported, pruned and made smaller as transformers reads it; methods as their papers have them."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import (
    StreamedModel,
    bundled_model,
    encode_text,
    load_decoder,
    load_tokenizer,
    open_model,
    possible_kv_heads,
    sizes_of,
)
from sparseopt.pruning import Recipe, prune_layer, prune_model
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.text.windows import begin_windows, text_windows
from tests.jitted import run
from tests.layers.layers import error_of, sparsegpt, wanda
from tests.models.reshape.test_shrunk import write_smaller
from tests.models.tiny import copy_model
from tests.oracle.conftest import reference, reference_logits

pytestmark = pytest.mark.oracle

TEXT = (
    "The harbour lay quiet in the early light. In 1936 two hundred ships called here; by the end of the century "
    "hardly thirty did, and the cranes along the northern quay had long been sold for scrap."
)
LINEARS = ("self_attn.q_proj", "mlp.down_proj")


class Layer(NamedTuple):
    weight: np.ndarray
    gram: np.ndarray


@pytest.fixture(scope="module")
def model() -> StreamedModel:
    return open_model(bundled_model())


@pytest.fixture(scope="module")
def layers(model: StreamedModel) -> dict[str, Layer]:
    """Linears of the first block, with the inputs of 8,192 tokens.

    Quantised weights have few values, so that scores tie; a relative change of 1e-3 separates them.
    """
    ids = begin_windows(*text_windows(model.source, "pydoc", "calibration", 16, 512))
    block = model.block(0)
    grams = BlockRunner().grams(block, make_batches(model.embedding()(jnp.asarray(ids))))
    rng, found = np.random.default_rng(0), {}
    for name in LINEARS:
        weight = np.asarray(block.read(f"{name}.weight"))
        weight = (weight * (1 + 1e-3 * rng.standard_normal(weight.shape))).astype(np.float32)
        found[name] = Layer(weight, np.asarray(grams[block.linears[name]].gram))
    return found


# Whole numbers of weights in every row and block: the papers do not say how to round.
@pytest.mark.parametrize(
    ("name", "pattern", "sparsity"), [(LINEARS[0], "2:4", None), (LINEARS[1], "unstructured", 0.75)]
)
@pytest.mark.parametrize(("method", "plain"), [("wanda", wanda), ("sparsegpt", sparsegpt)])
def test_masks_and_losses_are_those_of_the_paper(layers, method, plain, name, pattern, sparsity):
    layer = layers[name]
    ours, theirs = prune_layer(*layer, sparsity, pattern, method).weight, plain(*layer, pattern, sparsity)
    assert np.mean((ours != 0) == (theirs != 0)) >= 0.999
    assert error_of(ours, *layer) == pytest.approx(error_of(theirs, *layer), rel=1e-3)


def test_from_gguf_it_gives_the_reference_logits_and_tokens(model, tmp_path):
    from transformers import AutoTokenizer

    copy_model(model, tmp_path)
    tokens = encode_text(load_tokenizer(model.source), TEXT)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokens.tolist()
    assert theirs.decode(tokens) == TEXT
    expected = reference_logits(tmp_path, tokens[None])
    np.testing.assert_allclose(run(model.decoder(), tokens[None]), expected, atol=2e-3, rtol=1e-4)


def test_made_smaller_and_pruned_by_maiht_it_gives_the_reference_logits_and_carries_its_tokenizer_along(
    model, tmp_path
):
    import torch
    from transformers import AutoTokenizer

    sizes = replace(sizes_of(model), channels=64, kv_heads=possible_kv_heads(model)[0], blocks=(3,))
    folder = write_smaller(model, sizes, tmp_path / "small")
    recipe = Recipe(preset="paper", calibration="pydoc", windows=2, seqlen=256, heldout_windows=0, score="none")
    prune_model(folder, tmp_path / "out", recipe)
    tokenizer, loaded = AutoTokenizer.from_pretrained(tmp_path / "out"), reference(tmp_path / "out")
    tokens = np.array(tokenizer(TEXT, return_tensors="np")["input_ids"])
    assert tokenizer.decode(tokens[0]) == TEXT
    ours = run(load_decoder(tmp_path / "out"), tokens)
    np.testing.assert_allclose(ours, reference_logits(loaded, tokens), atol=1e-3)
    linears = [part for part in loaded.model.layers.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linears) == 7
    assert all(int((part.weight == 0).sum()) == part.weight.numel() // 2 for part in linears)
