"""Figures are closed after each test; `settings` is a tiny model with a text."""

import matplotlib
import pytest

from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.test_pipeline import TOKENIZER

matplotlib.use("Agg")
TEXT = "the quick brown fox jumps over the lazy dog, and then the dog tells the fox all about it.\n" * 60


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def settings(tmp_path, rng):
    folder = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "text.txt").write_text(TEXT)
    text = f"file:{tmp_path / 'text.txt'}"
    return {
        "name": "tiny", "source": str(folder), "calibration": text, "windows": 4, "seqlen": 32,
    }  # fmt: skip
