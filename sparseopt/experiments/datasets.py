"""Floor 7: pictures and graphs from inside pip packages, read without a download.

| name | what | package | terms |
|---|---|---|---|
| camera, coffee, chelsea | photographs | scikit-image | CC0 by the photographers |
| astronaut | photograph | scikit-image | NASA, no known restrictions |
| hubble_deep_field | astronomy | scikit-image | NASA, may be used freely |
| retina | medicine: eye ground, colour | scikit-image | CC0 |
| microaneurysms | medicine: eye ground, green channel | scikit-image | CC0 |
| immunohistochemistry | medicine: stained colon tissue | scikit-image | no known restrictions |
| shepp_logan_phantom | medicine: test phantom of a head | scikit-image, BSD-3 | no terms stated |
| counties | graph: US counties, unemployment in 2009 | bokeh-sampledata | public domain, see below |
| minnesota | graph: roads of Minnesota | pygsp | BSD-3; David Gleich, MatlabBGL |

The terms of scikit-image's pictures are in the docstrings of `skimage.data`. Those of the counties are in the
licence folder of the wheel (`datasets.json`, `geographic-boundaries.txt`): the rates are public domain, from the US
Bureau of Labor Statistics; the outlines are free to use with acknowledgement, from the US Census Bureau's
TIGER/Line Shapefiles of about 2009. The package itself is BSD-3.
"""

import contextlib
import csv
import dataclasses
import gzip
import importlib.resources
import importlib.util
import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from sparseopt.experiments.names import suggest
from sparseopt.experiments.task import Strict
from sparseopt.trend.graph import Graph

PICTURES = (
    "camera", "coffee", "chelsea", "astronaut", "hubble_deep_field", "retina", "microaneurysms",
    "immunohistochemistry", "shepp_logan_phantom",
)  # fmt: skip
# The files need none of the dependencies of these packages (pandas, shapely and more).
INSTALL = {
    "skimage": "pip install scikit-image",
    "bokeh_sampledata": "pip install --no-deps bokeh-sampledata",
    "pygsp": "pip install --no-deps pygsp",
}
NOT_CONTIGUOUS = frozenset({"AK", "HI", "PR", "AS", "GU", "MP", "VI"})
# Boundaries are stored to five decimals of a degree, about a metre.
PLACES = 1e5
# A single common point is a corner where four counties meet.
BORDER_POINTS = 2


class Picture(Strict):
    """A picture, or a part of it, in grey levels 0..255.

    Attributes:
        name: one of `PICTURES`.
        crop: first row, first column, height and width of the part to take.
        size: rows and columns to scale (the part of) the picture to, with smoothing against aliases.
        grey: one channel, by luminance.
    """

    name: str = "camera"
    crop: tuple[int, int, int, int] | None = None
    size: int | tuple[int, int] | None = None
    grey: bool = False

    def check(self) -> None:
        """Raise ValueError if the picture or its package is missing."""
        if self.name not in PICTURES:
            raise ValueError(f"there is no picture {self.name!r}: {suggest(self.name, PICTURES)}")
        require("skimage")

    def load(self) -> np.ndarray:
        """`[height, width]` or `[height, width, channels]`, float64; ValueError as `check`, or for a bad crop."""
        self.check()
        import skimage.data
        from skimage.color import rgb2gray
        from skimage.transform import resize

        stored = getattr(skimage.data, self.name)()
        image = np.asarray(stored, np.float64) * (255.0 if stored.dtype.kind == "f" else 1.0)
        if self.crop is not None:
            top, left, height, width = self.crop
            rows, columns = image.shape[:2]
            if not (0 <= top < top + height <= rows and 0 <= left < left + width <= columns):
                raise ValueError(f"the crop {self.crop} leaves {self.name}, which is {image.shape[:2]}")
            image = image[top : top + height, left : left + width]
        if self.grey and image.ndim == 3:
            image = rgb2gray(image[..., :3])
        if self.size is not None:
            sizes = (self.size, self.size) if isinstance(self.size, int) else self.size
            image = resize(image, (*sizes, *image.shape[2:]), order=1, anti_aliasing=True, preserve_range=True)
        return image


@dataclasses.dataclass(frozen=True)
class GraphData:
    """A graph in the plane; everything else is in the order of its nodes."""

    graph: Graph
    positions: np.ndarray  # [n, 2], x and y
    signal: np.ndarray | None = None  # [n], NaN where nothing was observed; None without a measured signal
    unit: str = ""
    names: tuple[str, ...] = ()
    polygons: tuple[tuple[np.ndarray, ...], ...] = ()  # the rings of each outline, [points, 2]; empty for points


class GraphSource(Strict):
    """A graph by name.

    Attributes:
        name: "counties" or "minnesota".
        states: of the counties, postal abbreviations; empty for the 48 contiguous states and the capital.
    """

    name: Literal["counties", "minnesota"] = "counties"
    states: tuple[str, ...] = Field(default=())

    def check(self) -> None:
        """Raise ValueError if the package is missing, or for states of a graph without states."""
        if self.states and self.name != "counties":
            raise ValueError(f"only the counties have states, given {self.states} with {self.name}")
        require("bokeh_sampledata" if self.name == "counties" else "pygsp")

    def load(self) -> GraphData:
        """The graph with its data; ValueError as `check` and `load_counties`."""
        self.check()
        return load_counties(self.states) if self.name == "counties" else load_minnesota()


def require(package: str) -> Path:
    """The folder of an installed package, without importing it; ValueError with the command that installs it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"the data needs the package {package}: {INSTALL[package]}")
    return Path(found.origin).parent


def load_counties(states: tuple[str, ...] = ()) -> GraphData:
    """Counties, joined if their outlines share two points or more, with the unemployment rate of 2009 in percent.

    Caldwell County in Missouri has no neighbour: its outline in the source is too coarse to share a point.

    Args:
        states: postal abbreviations; empty for the 48 contiguous states and the capital.

    Raises:
        ValueError: for an unknown state, a missing package, or a file of another layout.
    """
    folder = require("bokeh_sampledata") / "_data"
    wanted = {state.upper() for state in states}
    # immutable: SQLite looks for no journal in the folder, which may not be writable.
    file = f"{(folder / 'geographic_boundaries.db').as_uri()}?immutable=1"
    with contextlib.closing(sqlite3.connect(file, uri=True)) as database:
        rows = database.execute("SELECT id, state, metadata, geometry FROM us_counties ORDER BY id").fetchall()
    known = {row[1] for row in rows}
    if wanted - known:
        raise ValueError(f"no counties of {', '.join(sorted(wanted - known))}; known are {', '.join(sorted(known))}")
    rows = [row for row in rows if (row[1] in wanted if wanted else row[1] not in NOT_CONTIGUOUS)]
    rings = [list(_rings(row[3])) for row in rows]
    # A city inside a county borders on its hole; drawn later, the city covers the filled outline.
    outlines = [tuple(ring for hole, ring in parts if not hole) for parts in rings]
    with gzip.open(folder / "unemployment09.csv.gz", "rt", encoding="utf-8") as stream:
        rates = {row[1] + row[2]: float(row[8]) for row in csv.reader(stream)}
    return GraphData(
        graph=Graph.from_edges(_borders([[ring for _, ring in parts] for parts in rings]), len(rows)),
        positions=np.stack([_centroid(parts) for parts in outlines]),
        signal=np.array([rates.get(row[0], np.nan) for row in rows]),
        unit="unemployment rate in %",
        names=tuple(json.loads(row[2])["detailed_name"] for row in rows),
        polygons=tuple(outlines),
    )


def _rings(blob: bytes) -> Iterator[tuple[bool, np.ndarray]]:
    """The rings of a polygon or multipolygon in little-endian well-known binary, and whether each is a hole."""

    def number(place: int) -> int:
        return int.from_bytes(blob[place : place + 4], "little")

    kind = number(1)
    if blob[0] != 1 or kind not in (3, 6):
        raise ValueError(f"county outlines are polygons in little-endian WKB, found kind {kind}")
    polygons, place = (1, 0) if kind == 3 else (number(5), 9)
    for _ in range(polygons):
        ring_count = number(place + 5)
        place += 9
        for ring in range(ring_count):
            points = number(place)
            yield ring > 0, np.frombuffer(blob, "<f8", 2 * points, place + 4).reshape(points, 2)
            place += 4 + 16 * points


def _borders(rings: list[list[np.ndarray]]) -> np.ndarray:
    """Pairs of areas whose outlines share at least `BORDER_POINTS` points, `[m, 2]`."""
    points = [np.unique(np.rint(np.concatenate(parts) * PLACES).astype(np.int64), axis=0) for parts in rings]
    owner = np.repeat(np.arange(len(points)), [len(p) for p in points])
    unique, column = np.unique(np.concatenate(points), axis=0, return_inverse=True)
    touches = sparse.csr_array(
        (np.ones(owner.size, np.int32), (owner, column.reshape(-1))), shape=(len(points), len(unique))
    )
    shared = sparse.triu(touches @ touches.T, 1).tocoo()
    border = shared.data >= BORDER_POINTS
    return np.stack([shared.row[border], shared.col[border]], axis=1).astype(np.int64)


def _centroid(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """The centroid of the largest ring's area (the shoelace formula)."""

    def moments(ring: np.ndarray) -> tuple[float, np.ndarray]:
        middle = ring.mean(axis=0)
        here, there = ring[:-1] - middle, ring[1:] - middle
        cross = here[:, 0] * there[:, 1] - there[:, 0] * here[:, 1]
        area = cross.sum() / 2
        return abs(area), middle + (cross[:, None] * (here + there)).sum(axis=0) / (6 * area if area else np.inf)

    return max((moments(ring) for ring in parts), key=lambda found: found[0])[1]


def load_minnesota() -> GraphData:
    """2,642 crossings joined by 3,304 roads, one of them added to join the two components.

    Positions are degrees of longitude and latitude; there is no measured signal.
    """
    from scipy.io import loadmat

    file = require("pygsp") / "data" / "pointclouds" / "minnesota.mat"
    stored = loadmat(io.BytesIO(file.read_bytes()), spmatrix=False)
    upper = sparse.triu(stored["A"], 1).tocoo()
    edges = np.stack([upper.row, upper.col], axis=1).astype(np.int64)
    # pygsp adds this road too: in the file, two crossings are not joined to the rest.
    edges = np.concatenate([edges, [[348, 354]]])
    return GraphData(Graph.from_edges(edges, len(stored["xy"])), np.asarray(stored["xy"], np.float64))
