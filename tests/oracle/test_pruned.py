"""A pruned export in transformers: it has the same zeros and logits."""

from pathlib import Path

import numpy as np
import pytest

from sparseopt.models import bundled_model, encode_text, load_decoder, load_tokenizer, open_model
from sparseopt.pruning import Recipe, audit_sparsity, prune_model
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder
from tests.oracle.test_reference import TEXT, reference_logits

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize(("method", "preset"), [("maiht", "paper"), ("maiht", "tuned"), ("wanda", None)])
def test_a_pruned_tiny_model_gives_our_logits(
    tmp_path: Path, rng: np.random.Generator, method: str, preset: str | None
) -> None:
    source = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))
    tokens = rng.integers(0, len(VOCAB), (10, 40)).astype(np.int32)
    prune_model(source, tmp_path / "out", Recipe(method=method, preset=preset, calibration=tokens))
    assert all(audit.zeros == audit.size // 2 for audit in audit_sparsity(tmp_path / "out"))
    ours = np.asarray(load_decoder(tmp_path / "out")(tokens[:2]))
    np.testing.assert_allclose(ours, reference_logits(tmp_path / "out", tokens[:2]), atol=1e-4)


def test_a_real_model_pruned_by_maiht_gives_the_reference_logits(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = open_model(bundled_model())
    recipe = Recipe(preset="paper", calibration="pydoc", windows=2, seqlen=256, heldout_windows=0, score="none")
    prune_model(bundled_model(), tmp_path / "out", recipe)
    tokens = encode_text(load_tokenizer(model.source), TEXT)[None]
    ours = np.asarray(load_decoder(tmp_path / "out")(tokens))
    np.testing.assert_allclose(ours, reference_logits(tmp_path / "out", tokens), atol=2e-3, rtol=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, linear in loaded.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2, name
