"""Edges, signals and fits of the trend filter as CSV, Parquet or NPZ files, with the ids of their nodes.

    node,rain            node,rain,piece
    Bern,12.5      ->    Bern,12.1,0
    Chur,11.8            Chur,12.1,0

All functions here raise a `FileError` for an invalid file.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseopt.experiments.read.files import FileError, write_npz
from sparseopt.experiments.read.tables import (
    ID_NAMES,
    TABLE_KINDS,
    has_ids,
    is_number,
    numbers,
    read_table,
    write_table,
)

if TYPE_CHECKING:
    from pandas import DataFrame, Series

PIECE = "piece"  # the column of pieces of a fit
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

    def split(self, names: Sequence[str]) -> tuple["NodeTable", np.ndarray]:
        """The table without the columns of these names, and these columns, `[n, names]`."""
        if unknown := [name for name in names if name not in self.names]:
            raise FileError(f"the columns are {', '.join(self.names)}, given {', '.join(unknown)}")
        columns = dict(zip(self.names, self.values.reshape(len(self.values), -1).T, strict=True))
        taken = np.column_stack([columns.pop(name) for name in names])
        if not columns:
            raise FileError(f"the columns {', '.join(names)} leave none for the signal")
        values = np.column_stack([*columns.values()])
        return dataclasses.replace(self, values=values[:, 0] if len(columns) == 1 else values, names=(*columns,)), taken


def read_signal(path: str | Path, series: bool = False) -> NodeTable:
    """A signal with a column a channel; row j belongs to node j.

    In a CSV or Parquet file, a first column named `node` or `id` holds the ids of the nodes, numbers or texts; then a
    last column named `piece`, as `write_fit` adds it, is left out. Of a `series` a column of `TIME_NAMES` holds times,
    numbers or dates as in 2020-12-31.
    """
    heading, cells = read_table(path, ("signal", "y"))
    named = has_ids(heading)
    misplaced = any(name.lower() in ID_NAMES for name in heading[1:])
    if misplaced or "" in heading[:1] or any(name.startswith("__index_level_") for name in heading):
        raise FileError(
            f"{path} has the columns {heading[:8]}: the ids of the nodes stand in the first one, called node or id. "
            "pandas writes its index too: name it node and put it first, or use index=False"
        )
    if named and cells.shape[1] < len(heading):
        raise FileError(f"{path} has {len(heading)} columns in its heading and {cells.shape[1]} below it")
    last = len(heading) - (len(heading) > 2 and heading[-1] == PIECE) if named else cells.shape[1]
    columns = list(range(int(named), last))
    timed = (place for place in columns[: len(heading)] if series and heading[place].lower() in TIME_NAMES)
    place = next(timed, None)
    dates = None if place is None else _dates_of(path, heading[place], cells[place])
    columns = [column for column in columns if dates is None or column != place]
    if not columns:
        what = "the ids of the nodes" if named else "dates"
        raise FileError(f"{path} has {what} but no column of values")
    values, nodes = numbers(Path(path), heading, cells[columns]), None
    if named:
        ids = _texts(cells[0])
        if ids.duplicated().any():
            repeated, count = next(ids.value_counts().items())
            raise FileError(f"{path} names the node {repeated!r} in {count} rows; give a node one row")
        nodes = tuple(ids)
    names = [heading[column] for column in columns] if len(heading) == cells.shape[1] or named else []
    found = _with_names(values, names, series and dates is None, nodes, heading[0] if named else "node")
    return found if dates is None else dataclasses.replace(found, **dates)


def _texts(column: "Series") -> "Series":
    return column.map(str).str.strip()


def _dates_of(path: str | Path, name: str, column: "Series") -> dict[str, Any] | None:
    """The fields of a table that a column of dates gives; None if it has numbers only, or begins with one."""
    texts = tuple(_texts(column))
    if is_number(next(filter(None, texts), "0")):
        return None
    dates = as_dates(texts)
    if np.isnat(dates).any():
        row = int(np.argmax(np.isnat(dates)))
        raise FileError(
            f"{path} has {texts[row]!r} in row {row + 1} of the column {name!r}, which holds dates: write every date "
            "as in 2020-12-31 or 2020-12-31T23:59, or leave out the column"
        )
    days = dates.astype(np.int64) / MICROSECONDS
    if not (np.diff(days) > 0).all():
        row = int(np.argmin(np.diff(days) > 0))
        raise FileError(
            f"{path} has {texts[row]} and then {texts[row + 1]} in the column {name!r}: sort the rows by it, and give "
            "a date one row"
        )
    return {"times": days - days[0], "times_name": name, "dates": texts}


def as_dates(texts: Sequence[str]) -> np.ndarray:
    """Dates, in UTC if they name a time zone; NaT for other texts."""
    import pandas

    found = pandas.to_datetime(pandas.Series(texts), format="ISO8601", errors="coerce", utc=True)
    return found.dt.tz_localize(None).to_numpy("datetime64[us]")


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
    file = Path(path)
    by_id = nodes is not None and file.suffix.lower() in (".csv", ".parquet")
    heading, cells = read_table(file, ("edges",), headed=not by_id)
    if cells.shape[1] not in (2, 3):
        ends = "ids of nodes" if by_id else "node numbers"
        raise FileError(f"{file} has {cells.shape[1]} columns; an edge is two {ends} and, if any, a weight")
    if by_id:
        return _edges_of_ids(file, cells, nodes or ())
    table = numbers(file, heading, cells)
    pairs = table[:, :2]
    # Beyond 2^53 not every whole number is a float.
    whole = np.isfinite(pairs) & (pairs == np.rint(pairs)) & (np.abs(pairs) < 2**53)
    if not whole.all():
        row = int(np.argmax(~whole.all(axis=1)))
        raise FileError(f"{file} names the nodes {pairs[row].tolist()} in row {row}; node numbers are whole, from 0")
    return pairs.astype(np.int64), table[:, 2] if table.shape[1] == 3 else None


def _edges_of_ids(file: Path, cells: "DataFrame", nodes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    import pandas

    known, texts = pandas.Index(nodes), cells.apply(_texts)
    pairs = np.stack([known.get_indexer(texts[end]) for end in (0, 1)], axis=1).astype(np.int64)
    # The first row may be a heading, of other names than those of nodes and of no number.
    if file.suffix.lower() == ".csv" and (pairs[0] < 0).all() and not any(map(is_number, texts.iloc[0])):
        cells, texts, pairs = cells[1:], texts[1:], pairs[1:]
    if (pairs < 0).any():
        row, end = (int(i) for i in np.argwhere(pairs < 0)[0])
        raise FileError(
            f"{file} names the node {texts.iloc[row, end]!r} in its edge {row}, and the signal has no such id; edges "
            "name nodes by the ids of the signal"
        )
    return pairs, numbers(file, [], cells[[2]])[:, 0] if cells.shape[1] == 3 else None


def write_fit(path: str | Path, fit: NodeTable, pieces: np.ndarray | None) -> None:
    """Write the ids of the nodes, their times, values and, unless None, pieces, in the format of the file's ending."""
    file = Path(path)
    kind = file.suffix.lower()
    nodes = np.arange(len(fit.values)) if fit.nodes is None else np.array(fit.nodes)
    columns: dict[str, Any] = {fit.nodes_name: nodes}
    if fit.times is not None:
        columns[fit.times_name] = fit.dates or fit.times
    columns |= dict(zip(fit.names, fit.values.reshape(len(fit.values), -1).T, strict=True))
    if pieces is not None:
        columns[PIECE] = pieces
    if kind in (".csv", ".parquet"):
        write_table(file, columns)
    elif kind == ".npz":
        arrays: dict[str, Any] = {"signal": fit.values, "node": nodes}
        arrays |= {} if fit.times is None else {"times": fit.times}
        write_npz(file, arrays if pieces is None else arrays | {PIECE: pieces})
    else:
        raise FileError(f"{file} must end in one of {', '.join(TABLE_KINDS)}")
