"""Model types without a family, without torch; `tests/oracle` prunes such models with torch."""

import sys

import numpy as np
import pytest

from sparseopt.models import ModelError, load_decoder, open_model
from sparseopt.pruning import Recipe, perplexity, prune_model
from tests.models.tiny import random_tensors, tiny_config, write_folder


def test_without_torch_the_known_families_and_the_way_out_are_named(tmp_path, rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    config = tiny_config()
    folder = write_folder(tmp_path / "m", config | {"model_type": "nemotron"}, random_tensors(config, rng))
    text = r"unknown model_type 'nemotron'; known are .*llama.* is not installed: pip install 'sparseopt\[torch\]'"
    recipe = Recipe(calibration=np.zeros((6, 8), np.int32))
    calls = (lambda path: prune_model(path, tmp_path / "out", recipe), lambda path: perplexity(path, np.zeros((2, 8))))
    for call in calls:
        with pytest.raises(ModelError, match=text):
            call(folder)
    assert not (tmp_path / "out").exists()
    for call in (open_model, load_decoder):
        with pytest.raises(ModelError, match=r"'nemotron'.*known are .*llama.*`sparseopt prune`.*prune_module"):
            call(folder)
