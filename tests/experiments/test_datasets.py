"""The data sets have the shapes and graph properties that experiments rely on."""

import importlib.util
import sys

import numpy as np
import pytest

from sparseopt.experiments.datasets import PICTURES, GraphSource, Picture, load_counties, load_minnesota


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


def test_wrong_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'camera'"):
        Picture(name="camara").load()
    with pytest.raises(ValueError, match="leaves camera"):
        Picture(name="camera", crop=(500, 0, 20, 20)).load()


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


def test_an_unknown_state_is_named() -> None:
    with pytest.raises(ValueError, match="no counties of XX"):
        load_counties(("XX",))
    with pytest.raises(ValueError, match="only the counties have states"):
        GraphSource(name="minnesota", states=("MN",)).check()


def test_minnesota_is_one_connected_road_network() -> None:
    data = load_minnesota()
    assert (data.graph.num_nodes, data.graph.num_edges) == (2642, 3304)
    assert data.graph.num_components == 1
    assert data.graph.degrees.max() == 5
    assert data.signal is None
    assert (data.positions.min(axis=0) > [-98, 43]).all()
    assert (data.positions.max(axis=0) < [-89, 50]).all()


@pytest.mark.parametrize("source", [Picture(), GraphSource(name="counties"), GraphSource(name="minnesota")])
def test_a_missing_package_is_named_with_its_command(
    source: Picture | GraphSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        source.check()
