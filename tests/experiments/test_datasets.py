"""The data sets have the shapes and graph properties that experiments rely on."""

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest

from sparseopt.experiments.datasets import PICTURES, Picture


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_grey_levels(name: str) -> None:
    image = Picture(name=name, size=(24, 32), grey=True).load()
    assert (image.shape, image.dtype) == ((24, 32), np.float64)
    assert image.min() >= 0
    # Fractions in [0, 1] would be a picture that was not scaled to grey levels.
    assert 50 < image.max() <= 255


def test_a_crop_is_that_part_of_the_picture() -> None:
    whole, part = Picture(name="coffee").load(), Picture(name="coffee", crop=(10, 20, 30, 40)).load()
    np.testing.assert_array_equal(part, whole[10:40, 20:60])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "camara"}, "did you mean 'camera'"),
        ({"name": "camera", "crop": (500, 0, 20, 20)}, "leaves camera"),
        ({"name": "brain", "crop": (26, 27, 180, 4, 4, 20)}, "leaves brain"),
        ({"name": "brain", "crop": (0, 0, 8, 8)}, "crop of brain has 6 numbers"),
        ({"name": "brain", "size": 8}, "brain is a volume .* size=8"),
    ],
)
def test_what_there_is_not_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Picture(**fields).load()


def test_the_brain_is_a_symmetric_volume_and_its_picture_looks_ahead() -> None:
    picture = Picture(name="brain", crop=(26, 27, 76, 145, 181, 2))
    brain = picture.load()
    assert brain.shape == (145, 181, 2)
    assert brain.min() == 0
    assert 200 < brain.max() <= 255
    assert np.abs(brain - brain[::-1]).mean() < 2  # left and right
    np.testing.assert_array_equal(picture.shown(brain)[0], brain[:, -1, 1])
    assert "nilearn" not in sys.modules


@pytest.mark.parametrize("source", [Picture(), Picture(name="brain")], ids=lambda source: source.name)
def test_a_missing_package_is_named_with_its_command(source: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        source.check()
