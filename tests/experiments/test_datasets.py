"""The data sets have the shapes and graph properties that experiments rely on."""

import importlib.util
import sys
from collections.abc import Callable

import numpy as np
import pytest

from sparseopt.experiments.datasets import (
    PICTURES,
    GraphSource,
    Picture,
    cut,
    join,
    load_counties,
    load_minnesota,
    load_soho,
)

Source = Picture | GraphSource
SOURCES = [Picture(), Picture(name="brain"), *(GraphSource(name=name) for name in ("counties", "minnesota", "soho"))]


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_grey_levels(name: str) -> None:
    image = Picture(name=name, size=(24, 32), grey=True).load()
    assert image.shape == (24, 32)
    assert image.dtype == np.float64
    assert image.min() >= 0
    # Fractions in [0, 1] would be a picture that was not scaled to grey levels.
    assert 50 < image.max() <= 255


def test_a_crop_is_that_part_of_the_picture() -> None:
    whole, part = Picture(name="coffee").load(), Picture(name="coffee", crop=(10, 20, 30, 40)).load()
    assert part.shape == (30, 40, 3)
    np.testing.assert_array_equal(part, whole[10:40, 20:60])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (Picture(name="camara").load, "did you mean 'camera'"),
        (Picture(name="camera", crop=(500, 0, 20, 20)).load, "leaves camera"),
        (Picture(name="brain", crop=(26, 27, 180, 4, 4, 20)).load, "leaves brain"),
        (Picture(name="brain", crop=(0, 0, 8, 8)).check, "crop of brain has 6 numbers"),
        (Picture(name="brain", size=8).check, "is a volume and is not scaled"),
        (GraphSource(name="minnesota", states=("MN",)).check, "only the counties have states"),
        (lambda: load_counties(("XX",)), "no counties of XX"),
    ],
)
def test_what_there_is_not_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_the_brain_is_a_symmetric_volume_and_its_picture_looks_ahead() -> None:
    picture = Picture(name="brain", crop=(26, 27, 76, 145, 181, 2))
    brain = picture.load()
    assert brain.shape == (145, 181, 2)
    assert brain.min() == 0
    assert 200 < brain.max() <= 255
    assert np.abs(brain - brain[::-1]).mean() < 2  # left and right
    shown = picture.shown(brain)
    np.testing.assert_array_equal(shown[0], brain[:, -1, 1])
    assert "nilearn" not in sys.modules


def test_counties_border_on_their_neighbours() -> None:
    data = load_counties()
    assert data.graph.num_nodes == len(data.names) == len(data.polygons) == len(data.positions) == 3109
    assert data.signal is not None
    assert np.isfinite(data.signal).all()
    assert 0 < data.signal.min() < data.signal.max() < 40
    # The coarse outline of one county shares no point; all others hang together.
    assert [data.names[node] for node in data.graph.isolated] == ["Caldwell County, Missouri"]
    assert data.graph.num_components == 2
    assert 5 < data.graph.degrees.mean() < 6.5
    place = data.names.index("Los Angeles County, California")
    ends = data.graph.edges[(data.graph.edges == place).any(axis=1)]
    neighbours = {data.names[node].split(" County")[0] for node in ends.reshape(-1)} - {"Los Angeles"}
    assert {"Kern", "Ventura", "Orange", "San Bernardino"} <= neighbours
    # A city inside a county touches its hole only.
    city = data.names.index("Charlottesville city, Virginia")
    ends = data.graph.edges[(data.graph.edges == city).any(axis=1)]
    assert {data.names[node] for node in ends.reshape(-1)} >= {"Albemarle County, Virginia"}
    assert "bokeh_sampledata" not in sys.modules


def test_centroids_lie_within_the_outlines_box() -> None:
    data = load_counties(("co", "WY"))
    assert {name.rpartition(", ")[2] for name in data.names} == {"Colorado", "Wyoming"}
    for position, rings in zip(data.positions, data.polygons, strict=True):
        points = np.concatenate(rings)
        assert (points.min(axis=0) < position).all()
        assert (position < points.max(axis=0)).all()


def test_minnesota_is_one_connected_road_network() -> None:
    data = load_minnesota()
    assert (data.graph.num_nodes, data.graph.num_edges) == (2642, 3304)
    assert data.graph.num_components == 1
    assert data.graph.degrees.max() == 5
    assert data.signal is None
    assert (data.positions.min(axis=0) > [-98, 43]).all()
    assert (data.positions.max(axis=0) < [-89, 50]).all()


def test_streets_are_cut_in_equal_pieces_and_joined_where_they_meet_or_cross() -> None:
    through = np.array([[0.0, 0], [7, 0], [10, 0], [10, 30]])  # 40 long, with a bend at 10
    pieces = cut(through, 19)
    assert [len(piece) for piece in pieces] == [4, 2]
    np.testing.assert_allclose(pieces[0], [[0, 0], [7, 0], [10, 0], [10, 10]])
    np.testing.assert_allclose(pieces[1], [[10, 10], [10, 30]])
    ends_at_it = np.array([[5.2, 12], [5.2, 0.1]])
    crosses_it = np.array([[0.0, 25.3], [30, 20]])
    apart = np.array([[14.0, 0], [14, 18]])
    graph, nearest = join([*pieces, ends_at_it, crosses_it, apart], np.array([[6, 5.0], [9, 29], [13, 15], [2, -3]]), 1)
    assert graph.edges.tolist() == [[0, 1], [0, 2], [1, 3]]
    assert nearest.tolist() == [2, 1, 4, 0]


def test_the_streets_of_soho_hang_together_and_the_deaths_are_at_the_pump_of_broad_street() -> None:
    data = load_soho()
    assert data.graph.num_nodes == len(data.lines) == len(data.positions) == 699
    assert data.graph.num_components == 1
    assert data.signal is not None
    assert data.marks is not None
    assert data.signal.sum() == 392
    assert (np.abs(data.positions - [-0.1366, 51.5132]) < 0.007).all()
    worst = data.positions[data.signal.argmax()]
    assert np.linalg.norm((data.marks - worst) * [0.62, 1], axis=1).min() * 111_000 < 30  # metres
    assert "libpysal" not in sys.modules


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_missing_package_is_named_with_its_command(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        source.check()
