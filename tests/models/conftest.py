"""The golden models, each written and opened once for all tests of a process, and tensors of the tiny one."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from sparseopt.models import StreamedModel, open_model
from tests.models.tiny import GOLDEN, random_tensors, tiny_config, write_golden


class Golden(NamedTuple):
    """A golden model: its folder, which no test changes, the reference's arrays, and the opened model."""

    folder: Path
    arrays: dict[str, np.ndarray]
    model: StreamedModel


@pytest.fixture
def tensors(rng):
    return random_tensors(tiny_config(), rng)


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    place = tmp_path_factory.mktemp("golden")

    @cache
    def opened(name):
        arrays = write_golden(GOLDEN / f"{name}.npz", place / name)
        (place / name / "NOTICE").write_text("goes along")
        return Golden(place / name, arrays, open_model(place / name))

    return opened
