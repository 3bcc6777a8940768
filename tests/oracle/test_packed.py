"""Packed folders in transformers: it finds no weights in them, and computes the same logits after unpacking."""

from pathlib import Path

import numpy as np
import pytest

from sparseopt.models import load_decoder, unpack_folder
from sparseopt.pruning import Recipe, prune_model
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder
from tests.oracle.test_reference import reference_logits

pytestmark = pytest.mark.oracle


def test_transformers_refuses_a_packed_folder_and_loads_it_unpacked(tmp_path: Path, rng: np.random.Generator) -> None:
    from transformers import AutoModelForCausalLM

    source = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))
    tokens = rng.integers(0, len(VOCAB), (8, 40)).astype(np.int32)
    prune_model(source, tmp_path / "packed", Recipe(method="magnitude", calibration=tokens, pack=True))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "dense")
    ours = np.asarray(load_decoder(tmp_path / "packed")(tokens[:2]))
    np.testing.assert_allclose(ours, reference_logits(tmp_path / "dense", tokens[:2]), atol=1e-4)
