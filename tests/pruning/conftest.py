"""A tiny model and its tokens, one for each test file without a model."""

import numpy as np
import pytest

from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(7)
    return write_folder(tmp_path_factory.mktemp("model"), tiny_config(), random_tensors(tiny_config(), rng))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(8).integers(0, len(VOCAB), (7, 24)).astype(np.int32)
