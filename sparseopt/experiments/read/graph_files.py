"""Edges, signals and fits of the trend filter as CSV, Parquet or NPZ files, with the ids of their nodes.

    node,rain            node,rain,piece
    Bern,12.5      ->    Bern,12.1,0
    Chur,11.8            Chur,12.1,0

All functions here raise a `FileError` for an invalid file.
"""

import collections
import contextlib
import csv
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparseopt.experiments.read.files import FileError, readable, write_npz
from sparseopt.experiments.read.tables import TABLE_KINDS, heading_of, is_number, read_table, write_parquet
from sparseopt.system.files import replacing

# The first column of a signal holds ids of nodes if it has one of these names; the column of pieces of a fit.
ID_NAMES, PIECE = ("node", "id"), "piece"
# A column of a series beside others holds its times if it has one of these names, and increases.
TIME_NAMES = ("time", "date", "timestamp", "datetime", "year", "t", "index")
MICROSECONDS = 24 * 3600 * 10**6  # of a day


@dataclasses.dataclass(frozen=True)
class NodeTable:
    """The values of a signal or a fit, and what its file calls nodes and values."""

    values: np.ndarray  # `[n]`, or `[n, channels]`
    names: tuple[str, ...]  # of the columns of values
    nodes: tuple[str, ...] | None = None  # the ids of the nodes; None for row numbers from 0
    nodes_name: str = "node"  # of the column of ids
    times: np.ndarray | None = None  # of the nodes of a series, `[n]`; None where the file has none
    times_name: str = ""  # of their column
    dates: tuple[str, ...] | None = None  # of the nodes, where the column holds dates; their times are days


def read_signal(path: str | Path, series: bool = False) -> NodeTable:
    """A signal with a column a channel; row j belongs to node j.

    In a CSV or Parquet file, a first column named `node` or `id` holds the ids of the nodes, numbers or texts; then a
    last column named `piece`, as `write_fit` adds it, is left out. Of a `series` a column of `TIME_NAMES` holds times,
    numbers or dates as in 2020-12-31.
    """
    file = readable(path, "a CSV or NPZ")
    heading = heading_of(file)
    named = bool(heading) and heading[0].lower() in ID_NAMES
    misplaced = any(name.lower() in ID_NAMES for name in heading[1:])
    if misplaced or "" in heading[:1] or any(name.startswith("__index_level_") for name in heading):
        raise FileError(
            f"{file} has the columns {heading[:8]}: the ids of the nodes stand in the first one, called node or id. "
            "pandas writes its index too: name it node and put it first, or use index=False"
        )
    last = len(heading) - (named and len(heading) > 2 and heading[-1] == PIECE)
    places = range(int(named), last)
    place = next((index for index in places if series and heading[index].lower() in TIME_NAMES), None)
    dates = None if place is None else _read_dates(file, place, heading[place])
    if not named and dates is None:
        return _with_names(read_table(file, ("signal", "y")), heading, series)
    columns = tuple(index for index in places if dates is None or index != place)
    if not columns:
        what = "the ids of the nodes" if named else "dates"
        raise FileError(f"{file} has {what} but no column of values")
    table = read_table(file, columns=columns)
    nodes = tuple(read_table(file, columns=(0,), texts=True)[:, 0]) if named else None
    for texts, what in ((nodes, "ids"), (dates and dates.dates, "dates")):
        if texts is not None and len(texts) != len(table):
            raise FileError(
                f"{file} has {len(texts)} {what} and {len(table)} rows of values; leave out comments and blanks"
            )
    if nodes is not None and (repeated := collections.Counter(nodes).most_common(1)[0])[1] > 1:
        raise FileError(f"{file} names the node {repeated[0]!r} in {repeated[1]} rows; give a node one row")
    names, nodes_name = [heading[index] for index in columns], heading[0] if named else "node"
    found = _with_names(table, names, series and dates is None, nodes, nodes_name)
    return found if dates is None else dataclasses.replace(found, **dates._asdict())


class _Dates(NamedTuple):
    """The fields of a table that a column of dates gives."""

    times: np.ndarray
    times_name: str
    dates: tuple[str, ...]


def _read_dates(file: Path, place: int, name: str) -> _Dates | None:
    """A column of dates, or None if it has numbers only, or begins with one."""
    texts = tuple(read_table(file, columns=(place,), texts=True)[:, 0])
    if is_number(next(filter(None, texts), "0")):
        return None
    dates = as_dates(texts)
    if np.isnat(dates).any():
        row = int(np.argmax(np.isnat(dates)))
        raise FileError(
            f"{file} has {texts[row]!r} in row {row + 1} of the column {name!r}, which holds dates: write every date "
            "as in 2020-12-31 or 2020-12-31T23:59, or leave out the column"
        )
    days = dates.astype(np.int64) / MICROSECONDS
    if not (np.diff(days) > 0).all():
        row = int(np.argmin(np.diff(days) > 0))
        raise FileError(
            f"{file} has {texts[row]} and then {texts[row + 1]} in the column {name!r}: sort the rows by it, and give "
            "a date one row"
        )
    return _Dates(days - days[0], name, texts)


def as_dates(texts: Sequence[str]) -> np.ndarray:
    """Dates, in UTC if they name a time zone; NaT for other texts."""
    dates = np.full(len(texts), "NaT", "datetime64[us]")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no explicit representation of timezones", UserWarning)
        for row, text in enumerate(texts):
            with contextlib.suppress(ValueError):
                dates[row] = np.datetime64(text, "us")
    return dates


def _with_names(
    table: np.ndarray, heading: list[str], series: bool, nodes: tuple[str, ...] | None = None, nodes_name: str = "node"
) -> NodeTable:
    """A table with the names of its columns: those of the file, if all differ."""
    count, times, times_name = table.shape[1], None, ""
    if len(heading) != count or len({*heading, nodes_name, PIECE}) != count + 2:
        names = ("value",) if count == 1 else tuple(f"channel_{i}" for i in range(count))
        return NodeTable(table[:, 0] if count == 1 else table, names, nodes, nodes_name)
    for place, name in enumerate(heading):
        if series and count > 1 and name.lower() in TIME_NAMES and np.all(np.diff(table[:, place]) > 0):
            times, times_name = table[:, place], name
            table, heading = np.delete(table, place, axis=1), [*heading[:place], *heading[place + 1 :]]
            break
    values = table[:, 0] if table.shape[1] == 1 else table
    return NodeTable(values, tuple(heading), nodes, nodes_name, times, times_name)


def read_edges(path: str | Path, nodes: tuple[str, ...] | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Edges `[m, 2]` int64 and weights `[m]` or None, from two columns of nodes and perhaps one of weights.

    The nodes are numbers from 0, or `nodes`, the ids of a signal.
    """
    if nodes is not None and Path(path).suffix.lower() in (".csv", ".parquet"):
        return _edges_of_ids(readable(path, "a CSV"), nodes)
    table = read_table(path, ("edges",))
    if table.shape[1] not in (2, 3):
        raise FileError(f"{path} has {table.shape[1]} columns; an edge is two node numbers and, if any, a weight")
    pairs = table[:, :2]
    # Beyond 2^53 not every whole number is a float.
    whole = np.isfinite(pairs) & (pairs == np.rint(pairs)) & (np.abs(pairs) < 2**53)
    if not whole.all():
        row = int(np.argmax(~whole.all(axis=1)))
        raise FileError(f"{path} names the nodes {pairs[row].tolist()} in row {row}; node numbers are whole, from 0")
    return pairs.astype(np.int64), table[:, 2] if table.shape[1] == 3 else None


def _edges_of_ids(file: Path, nodes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    texts = read_table(file, texts=True)
    if texts.shape[1] not in (2, 3):
        raise FileError(f"{file} has {texts.shape[1]} columns; an edge is two ids of nodes and, if any, a weight")
    place = {node: index for index, node in enumerate(nodes)}
    pairs = np.array([[place.get(node, -1) for node in row] for row in texts[:, :2]], np.int64).reshape(-1, 2)
    # The first row may be a heading, of other names than those of nodes and of no number.
    if file.suffix.lower() == ".csv" and len(pairs) and (pairs[0] < 0).all() and not any(map(is_number, texts[0])):
        texts, pairs = texts[1:], pairs[1:]
    if (pairs < 0).any():
        row, end = (int(i) for i in np.argwhere(pairs < 0)[0])
        raise FileError(
            f"{file} names the node {texts[row, end]!r} in its edge {row}, and the signal has no such id; edges name "
            "nodes by the ids of the signal"
        )
    try:
        return pairs, texts[:, 2].astype(np.float64) if texts.shape[1] == 3 else None
    except ValueError as error:
        raise FileError(f"cannot read the weights of {file}: {error}") from error


def write_fit(path: str | Path, fit: NodeTable, pieces: np.ndarray | None) -> None:
    """Write the ids of the nodes, their times, values and, unless None, pieces, in the format of the file's ending."""
    file = Path(path)
    kind = file.suffix.lower()
    nodes: Any = range(len(fit.values)) if fit.nodes is None else fit.nodes
    columns: dict[str, list[Any]] = {fit.nodes_name: list(nodes)}
    if fit.times is not None:
        columns[fit.times_name] = list(fit.dates or fit.times.tolist())
    for name, column in zip(fit.names, fit.values.reshape(len(fit.values), -1).T, strict=True):
        columns[name] = column.tolist()
    if pieces is not None:
        columns[PIECE] = pieces.tolist()
    if kind == ".csv":
        with (
            replacing(file, fit.values.nbytes) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as stream,
        ):
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns)
            # Python writes the shortest digits that give a number back.
            writer.writerows(zip(*columns.values(), strict=True))
    elif kind == ".npz":
        arrays: dict[str, Any] = {"signal": fit.values, "node": np.array(nodes)}
        arrays |= {} if fit.times is None else {"times": fit.times}
        write_npz(file, arrays if pieces is None else arrays | {PIECE: pieces})
    elif kind == ".parquet":
        write_parquet(file, columns)
    else:
        raise FileError(f"{file} must end in one of {', '.join(TABLE_KINDS)}")
