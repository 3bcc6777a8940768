"""Tiny models and their tokens, each written once, and a text; tests read them and write elsewhere."""

from functools import cache

import numpy as np
import pytest

from sparseopt.pruning.base import activations
from tests.models.tiny import VOCAB
from tests.pruning.whole_runs import write_model


@pytest.fixture(scope="module")
def module_monkeypatch():
    """`monkeypatch` for all tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def several_batches(module_monkeypatch):
    """Batches of one window or two: files of tests that have the same share their programs."""
    module_monkeypatch.setattr(activations, "BATCH_TOKENS", 48)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """`models("experts")`: the folder of a model in `MODELS`."""
    return cache(lambda name: write_model(tmp_path_factory.mktemp("models") / name, name))


@pytest.fixture(scope="module")
def source(models, request):
    """The model of a file of tests: its `TINY`, otherwise one whose linears one program solves."""
    return models(getattr(request.module, "TINY", "square"))


@pytest.fixture(scope="session")
def tokens():
    return np.random.default_rng(8).integers(0, len(VOCAB), (7, 24)).astype(np.int32)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text to calibrate on, as recipes name it."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog, and then the dog tells all.\n" * 60)
    return f"file:{file}"
