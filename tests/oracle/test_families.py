"""Every family against transformers: logits layer by layer; pruned, exported and loaded, in one file and in shards.

`make families` records the results for the table in the documentation, see `conftest`.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import load_decoder, open_model
from sparseopt.models.files.safetensors import read_header
from sparseopt.pruning import Recipe, audit_sparsity, prune_model
from tests.oracle.conftest import Proof
from tests.oracle.make_golden import CASES, build_model, run_layers

pytestmark = pytest.mark.oracle

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 24)).astype(np.int32)
CALIBRATION = np.random.default_rng(1).integers(0, 40, (10, 32)).astype(np.int32)


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in read_header(file).items():
            found[name] = (tensor.dtype.name, tensor.shape, tensor.read().tobytes())
    return found


def reference(folder: Path) -> Any:
    """The model as transformers loads it, float32; every tensor of it must come from the files."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return model.eval()


@pytest.mark.parametrize("name", list(CASES))
def test_every_layer_and_the_logits_are_the_references(name: str, tmp_path: Path, proof: Proof) -> None:
    build_model(name).save_pretrained(tmp_path)
    hidden, logits = run_layers(reference(tmp_path), TOKENS)
    model = open_model(tmp_path)
    np.testing.assert_allclose(model.embedding()(TOKENS), hidden[0], atol=1e-4, err_msg="embedding")
    for index in range(model.num_blocks):
        x = model.block(index)(jnp.asarray(hidden[index]))
        np.testing.assert_allclose(x, hidden[index + 1], atol=1e-4, err_msg=f"block {index}")
    np.testing.assert_allclose(model.head()(jnp.asarray(hidden[-1])), logits, atol=1e-4, err_msg="head")
    whole = np.asarray(model.decoder()(TOKENS))
    np.testing.assert_allclose(whole, logits, atol=1e-4, err_msg="whole model")
    proof.record(CASES[name]["model_type"], "logits", case=name, largest_error=float(np.abs(whole - logits).max()))


@pytest.mark.parametrize(("preset", "dtype"), [("paper", "float32"), ("tuned", "bfloat16")])
@pytest.mark.parametrize("name", list(CASES))
def test_a_pruned_export_is_loaded_with_our_logits_and_untouched_bytes(
    name: str, preset: str, dtype: str, tmp_path: Path, proof: Proof
) -> None:
    import torch

    source, output = tmp_path / "source", tmp_path / "out"
    size = "1GB" if dtype == "float32" else "10KB"
    build_model(name).to(getattr(torch, dtype)).save_pretrained(source, max_shard_size=size)
    assert len(list(source.glob("*.safetensors"))) > 1 or size == "1GB"
    recipe = Recipe(preset=preset, calibration=CALIBRATION, min_expert_tokens=8)
    report = prune_model(source, output, recipe)
    before, after = stored_bytes(source), stored_bytes(output)
    assert set(before) == set(after)
    pruned = {f"{record.layer}.weight" for record in report.layers}
    assert pruned <= set(before)
    for key, (dtype_name, shape, raw) in before.items():
        assert after[key][:2] == (dtype_name, shape), key
        assert (after[key][2] == raw) == (key not in pruned), key
    assert {value[0] for value in after.values()} == {dtype}
    assert all(audit.zeros == audit.size // 2 for audit in audit_sparsity(output))
    _, logits = run_layers(reference(output), TOKENS)
    ours = np.asarray(load_decoder(output)(TOKENS))
    np.testing.assert_allclose(ours, logits, atol=1e-4)
    assert np.abs(ours - np.asarray(load_decoder(source)(TOKENS))).max() > 1e-2
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == CASES[name]["model_type"]
    error = float(np.abs(ours - logits).max())
    proof.record(CASES[name]["model_type"], "pruned", case=name, preset=preset, dtype=dtype, largest_error=error)
