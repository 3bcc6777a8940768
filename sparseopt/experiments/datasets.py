"""Images, volumes and graphs inside pip packages, read without a download.

| name | what | package | terms |
|---|---|---|---|
| camera, coffee, chelsea | photographs | scikit-image | CC0 by the photographers |
| astronaut | photograph | scikit-image | NASA, no known restrictions |
| hubble_deep_field | astronomy | scikit-image | NASA, may be used freely |
| retina | medicine: eye ground, colour | scikit-image | CC0 |
| microaneurysms | medicine: eye ground, green channel | scikit-image | CC0 |
| immunohistochemistry | medicine: stained colon tissue | scikit-image | no known restrictions |
| shepp_logan_phantom | medicine: test phantom of a head | scikit-image, BSD-3 | no terms stated |
| brain | volume: T1-weighted template of the brain, 1 mm | nilearn | copyright notice stays, see below |
| counties | graph: US counties, unemployment in 2009 | bokeh-sampledata | public domain, see below |
| minnesota | graph: roads of Minnesota | pygsp | BSD-3; David Gleich, MatlabBGL |
| soho | graph: streets of Soho, deaths of cholera in 1854 | libpysal | BSD-3; after John Snow's map |

The terms of scikit-image's images are in the docstrings of `skimage.data`. The terms of the counties are in the licence
folder of the wheel (`datasets.json`, `geographic-boundaries.txt`): the rates are public domain, from the US Bureau of
Labor Statistics; the outlines are free to use with acknowledgement, from the US Census Bureau's TIGER/Line Shapefiles
of about 2009. The package itself is BSD-3.

The brain is the ICBM 152 template, release 2009a, nonlinear, symmetric (Fonov, Evans, McKinstry, Almli, Collins,
NeuroImage 47, 2009), an average of 152 people. Copyright 1993-2009 Louis Collins, McConnell Brain Imaging Centre,
Montreal Neurological Institute, McGill University: use, copy, change and distribution without fee are permitted if that
notice appears in all copies. nilearn itself is BSD-3 and states no terms for the file.
"""

import contextlib
import csv
import dataclasses
import gzip
import importlib.resources
import importlib.util
import io
import itertools
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy import sparse
from scipy.spatial import KDTree

from sparseopt.core.base.arguments import suggest
from sparseopt.experiments.read.volumes import Scan, from_above, read_scan
from sparseopt.experiments.task import Strict
from sparseopt.trend.base.graph import Graph

PICTURES = (
    "camera", "coffee", "chelsea", "astronaut", "hubble_deep_field", "retina", "microaneurysms",
    "immunohistochemistry", "shepp_logan_phantom",
)  # fmt: skip
VOLUMES = ("brain",)
# The files need none of the dependencies of these packages (pandas, shapely and more).
INSTALL = {
    "skimage": "pip install scikit-image",
    "bokeh_sampledata": "pip install --no-deps bokeh-sampledata",
    "pygsp": "pip install --no-deps pygsp",
    "nilearn": "pip install --no-deps nilearn",
    "nibabel": "pip install 'sparseopt[volumes]'",
    "libpysal": "pip install --no-deps libpysal",
    "shapefile": "pip install pyshp",
}
NOT_CONTIGUOUS = frozenset({"AK", "HI", "PR", "AS", "GU", "MP", "VI"})
# Boundaries are stored to five decimals of a degree, about a metre.
PLACES = 1e5
# A single common point is a corner where four counties meet.
BORDER_POINTS = 2
# Metres: length of a piece of a street, and distance between places on streets that meet.
PIECE, REACH = 20.0, 1.0
EARTH = 6_378_137.0  # metres, the radius of the Web Mercator projection


class Picture(Strict):
    """An image or a volume, or a part of it, in grey levels 0..255.

    Attributes:
        name: one of `PICTURES` or `VOLUMES`.
        crop: the part to use: first row, first column, height and width; for a volume the first place on its three axes
            (right, ahead, up) and three lengths.
        size: rows and columns to scale (the part of) the image to, with anti-aliasing; not for a volume.
        grey: convert to one channel, by luminance.
    """

    name: str = "camera"
    crop: tuple[int, int, int, int] | tuple[int, int, int, int, int, int] | None = None
    size: int | tuple[int, int] | None = None
    grey: bool = False

    def check(self) -> None:
        """Raise ValueError if the image or its package is missing, or if it does not have this part."""
        if self.name not in (*PICTURES, *VOLUMES):
            raise ValueError(f"there is no picture {self.name!r}: {suggest(self.name, (*PICTURES, *VOLUMES))}")
        if self.crop is not None and len(self.crop) != 2 * self.axes:
            raise ValueError(f"a crop of {self.name} has {2 * self.axes} numbers, given {self.crop}")
        if self.axes == 3 and self.size is not None:
            raise ValueError(f"{self.name} is a volume and is not scaled: leave out size={self.size}, and take a crop")
        for package in ("skimage",) if self.axes == 2 else ("nilearn", "nibabel"):
            require(package)

    @property
    def axes(self) -> int:
        """3 for a volume, 2 for an image."""
        return 3 if self.name in VOLUMES else 2

    def shown(self, values: np.ndarray) -> np.ndarray:
        """The drawable part of an array like `load()`: for a volume its middle slice from above, face upwards."""
        return values if self.axes == 2 else from_above(values)

    def load(self) -> np.ndarray:
        """`[height, width]`, `[height, width, channels]` or a volume `[right, ahead, up]`, float64.

        Raises:
            ValueError: as for `check`, or if a crop leaves the image.
        """
        self.check()
        if self.axes == 3:
            return self._part(np.asarray(_brain().values, np.float64))
        import skimage.data
        from skimage.color import rgb2gray
        from skimage.transform import resize

        stored = getattr(skimage.data, self.name)()
        image = np.asarray(stored, np.float64) * (255.0 if stored.dtype.kind == "f" else 1.0)
        image = self._part(image)
        if self.grey and image.ndim == 3:
            image = rgb2gray(image[..., :3])
        if self.size is not None:
            sizes = (self.size, self.size) if isinstance(self.size, int) else self.size
            image = resize(image, (*sizes, *image.shape[2:]), order=1, anti_aliasing=True, preserve_range=True)
        return image

    def _part(self, image: np.ndarray) -> np.ndarray:
        if self.crop is None:
            return image
        firsts, lengths, shape = self.crop[: self.axes], self.crop[self.axes :], image.shape[: self.axes]
        if not all(0 <= first < first + n <= most for first, n, most in zip(firsts, lengths, shape, strict=True)):
            raise ValueError(f"the crop {self.crop} leaves {self.name}, which is {shape}")
        return image[tuple(slice(first, first + n) for first, n in zip(firsts, lengths, strict=True))]


@dataclasses.dataclass(frozen=True)
class GraphData:
    """A graph in the plane; everything else is in the order of its nodes."""

    graph: Graph
    positions: np.ndarray  # [n, 2], degrees of longitude and latitude
    signal: np.ndarray | None = None  # [n], NaN where nothing was observed; None without a measured signal
    unit: str = ""
    names: tuple[str, ...] = ()
    polygons: tuple[tuple[np.ndarray, ...], ...] = ()  # the rings of each outline, [points, 2]; empty for others
    lines: tuple[np.ndarray, ...] = ()  # the streets, [points, 2]; empty for others
    marks: np.ndarray | None = None  # [m, 2], places to mark on the map


class GraphSource(Strict):
    """A graph by name.

    Attributes:
        name: "counties", "minnesota" or "soho".
        states: postal abbreviations, for the counties; empty for the 48 contiguous states and the capital.
    """

    name: Literal["counties", "minnesota", "soho"] = "counties"
    states: tuple[str, ...] = Field(default=())

    def check(self) -> None:
        """Raise ValueError if the package is missing, or states are given for another graph."""
        if self.states and self.name != "counties":
            raise ValueError(f"only the counties have states, given {self.states} with {self.name}")
        needed = {"counties": ("bokeh_sampledata",), "minnesota": ("pygsp",), "soho": ("libpysal", "shapefile")}
        for package in needed[self.name]:
            require(package)

    def load(self) -> GraphData:
        """The graph with its data; raises ValueError like `check` and `load_counties`."""
        self.check()
        if self.name == "counties":
            return load_counties(self.states)
        return load_minnesota() if self.name == "minnesota" else load_soho()


def require(package: str) -> Path:
    """The folder of an installed package, without importing it; ValueError with the command that installs it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"the data needs the package {package}: {INSTALL[package]}")
    return Path(found.origin).parent


def _brain() -> Scan:
    file = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    return read_scan(require("nilearn") / "datasets" / "data" / file)


def load_counties(states: tuple[str, ...] = ()) -> GraphData:
    """Counties, joined if their outlines share two points or more, with the unemployment rate of 2009 in percent.

    Caldwell County in Missouri has no neighbour: its outline in the source is too coarse to share a point.

    Args:
        states: postal abbreviations; empty for the 48 contiguous states and the capital.

    Raises:
        ValueError: if a state is unknown, a package is missing, or a file has another layout.
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

    There is no measured signal.
    """
    from scipy.io import loadmat

    file = require("pygsp") / "data" / "pointclouds" / "minnesota.mat"
    stored = loadmat(io.BytesIO(file.read_bytes()), spmatrix=False)
    upper = sparse.triu(stored["A"], 1).tocoo()
    edges = np.stack([upper.row, upper.col], axis=1).astype(np.int64)
    # pygsp adds this road too: in the file, two crossings are not joined to the rest.
    edges = np.concatenate([edges, [[348, 354]]])
    return GraphData(Graph.from_edges(edges, len(stored["xy"])), np.asarray(stored["xy"], np.float64))


def load_soho() -> GraphData:
    """Streets of Soho in pieces of about `PIECE` metres, with the deaths of cholera in 1854 nearest to each.

    The public pumps are marked.
    """
    folder = require("libpysal") / "examples" / "snow_maps"
    require("shapefile")
    import shapefile

    def read(name: str) -> tuple[list[np.ndarray], list[Any]]:
        with shapefile.Reader(str(folder / f"{name}.shp")) as file:
            return [np.asarray(shape.points, np.float64) for shape in file.shapes()], file.records()

    streets, (houses, deaths), pumps = read("Soho_Network")[0], read("SohoPeople"), read("SohoWater")[0]
    # Web Mercator stretches all lengths near a latitude by the same factor.
    metres = 1 / np.cosh(np.mean(np.concatenate(houses)[:, 1]) / EARTH)
    pieces = [piece for street in streets for piece in cut(metres * street, PIECE)]
    graph, nearest = join(pieces, metres * np.concatenate(houses), REACH)
    counts = np.bincount(nearest, [house["Count"] for house in deaths], len(pieces))

    def degrees(places: np.ndarray) -> np.ndarray:
        x, y = places.T / (metres * EARTH)
        return np.rad2deg(np.stack([x, np.arctan(np.sinh(y))], axis=1))

    middles = np.concatenate([_at(piece, _distances(piece)[-1:] / 2) for piece in pieces])
    lines, marks = tuple(degrees(piece) for piece in pieces), degrees(metres * np.concatenate(pumps))
    return GraphData(graph, degrees(middles), counts, f"deaths on {PIECE:g} m of street", lines=lines, marks=marks)


def cut(line: np.ndarray, length: float) -> list[np.ndarray]:
    """Cut a line `[points, 2]` into equal pieces of about this length."""
    along = _distances(line)
    ends = np.linspace(0, along[-1], max(round(along[-1] / length), 1) + 1)
    stops = [np.concatenate([[a], along[(along > a) & (along < b)], [b]]) for a, b in itertools.pairwise(ends)]
    return [_at(line, places) for places in stops]


def join(lines: Sequence[np.ndarray], points: np.ndarray, reach: float) -> tuple[Graph, np.ndarray]:
    """The graph that joins lines within `reach` of each other, and the line nearest to each point.

    Lines are compared at places at most `reach` apart, so that crossing lines are found too.
    """
    lengths = [_distances(line)[-1] for line in lines]
    places = [_at(line, np.linspace(0, m, int(m / reach) + 2)) for line, m in zip(lines, lengths, strict=True)]
    owner = np.repeat(np.arange(len(lines)), [len(part) for part in places])
    tree = KDTree(np.concatenate(places))
    pairs = np.sort(owner[tree.query_pairs(reach, output_type="ndarray")], axis=1)
    edges = np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)
    return Graph.from_edges(edges, len(lines)), owner[tree.query(points)[1]]


def _distances(line: np.ndarray) -> np.ndarray:
    """Distances from the first point of a line to each of its points, along the line."""
    return np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])


def _at(line: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The places at these distances from the first point of a line, along the line, `[stops, 2]`."""
    along = _distances(line)
    return np.stack([np.interp(stops, along, axis) for axis in line.T], axis=1)
