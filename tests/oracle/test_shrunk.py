"""Smaller models in transformers: every family loads them with our logits, and it refuses what we refuse."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseopt.models import load_decoder, open_model, possible_kv_heads, sizes_of
from tests.models.reshape.test_shrunk import opened, reduced, write_smaller
from tests.oracle.make_golden import CASES, build_model
from tests.oracle.test_families import TOKENS, reference

pytestmark = pytest.mark.oracle


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(CASES))
def test_a_smaller_model_is_loaded_with_our_logits(name: str, dtype: str, tmp_path: Path) -> None:
    import torch

    build_model(name).to(getattr(torch, dtype)).save_pretrained(tmp_path / "source")
    model = open_model(tmp_path / "source")
    for blocks in ((0, 2), (1,)):
        folder = write_smaller(model, reduced(model, blocks), tmp_path / f"out-{len(blocks)}")
        loaded = reference(folder)
        assert loaded.config.get_text_config().num_hidden_layers == len(blocks)
        logits = logits_of(loaded, TOKENS)
        np.testing.assert_allclose(np.asarray(load_decoder(folder)(TOKENS)), logits, atol=1e-4)


@pytest.mark.parametrize("name", ["legacy_rope", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "qwen3_moe"])
def test_three_groups_of_four_are_refused_where_transformers_refuses_them(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model = opened(name, tmp_path)
    config = {**model.source.config, "num_key_value_heads": 3, "num_attention_heads": 3, "head_dim": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = replace(model.config, num_heads=3, num_kv_heads=3, head_dim=4)
    if model.family.refuses(wanted) is None:
        AutoConfig.from_pretrained(tmp_path)
    else:
        with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
            AutoConfig.from_pretrained(tmp_path)


def test_the_tokenizer_is_carried_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from sparseopt.models import bundled_model

    dense = open_model(bundled_model())
    sizes = replace(sizes_of(dense), channels=64, kv_heads=possible_kv_heads(dense)[0], blocks=(3,))
    folder = write_smaller(dense, sizes, tmp_path / "out")
    text = "The harbour lay quiet in the early light."
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = np.array(tokenizer(text, return_tensors="np")["input_ids"])
    assert tokenizer.decode(tokens[0]) == text
    logits = logits_of(reference(folder), tokens)
    np.testing.assert_allclose(np.asarray(load_decoder(folder)(tokens)), logits, atol=1e-3)
