"""Tables as files: CSV with or without a heading, Parquet, NPZ. Invalid files are a `FileError`.

Every cell of a CSV file is read as a text: ids keep their zeros, and a wrong number is named with its place.
"""

import csv
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseopt.experiments.read.files import FileError, check_unpacked, npz_array, opened_npz, readable, reading
from sparseopt.system.files import replacing

if TYPE_CHECKING:
    from pandas import DataFrame, Series

TABLE_KINDS = (".csv", ".parquet", ".npz")
# The first column of a table holds ids if it has one of these names.
ID_NAMES = ("node", "id")
# How programs write a missing value.
NOT_THERE = ("", "nan", "na", "n/a", "null", "none", "?", "-")


def read_table(path: str | Path, names: tuple[str, ...] = (), headed: bool = True) -> "tuple[list[str], DataFrame]":
    """The heading, empty if there is none, and the cells below it; of an NPZ file the array with one of the `names`.

    In a CSV file the first row is the heading if it has a text and the table may be `headed`. There a # begins a note,
    unless the first column holds ids.
    """
    file = readable(path, "a CSV or NPZ")
    kind = file.suffix.lower()
    if kind not in TABLE_KINDS:
        raise FileError(f"{file} must end in one of {', '.join(TABLE_KINDS)}")
    with reading(f"numbers from {file}"):
        if kind == ".csv":
            heading = heading_of(file) if headed else []
            cells = _read_csv(file, heading, headed and not has_ids(heading))
        elif kind == ".parquet":
            cells = _read_parquet(file)
            heading, cells.columns = list(map(str, cells)), range(cells.shape[1])
        else:
            heading, cells = [], _read_npz(file, names)
    if cells.size == 0:
        raise FileError(f"{file} holds no rows of numbers; give one row a node or an edge")
    return heading, cells


def has_ids(heading: list[str]) -> bool:
    """Whether the first column holds the ids of the rows."""
    return bool(heading) and heading[0].lower() in ID_NAMES


def numbers(file: Path, heading: list[str], cells: "DataFrame") -> np.ndarray:
    """Columns as numbers, `[rows, columns]` in float64, NaN where a value is missing."""
    with reading(f"numbers from {file}"):
        return np.stack([_numbers(file, heading, cells[place]) for place in cells], axis=1)


def _numbers(file: Path, heading: list[str], column: "Series") -> np.ndarray:
    try:
        return column.to_numpy(np.float64)
    except ValueError:
        if file.suffix.lower() != ".csv":
            raise
    texts = column.str.partition("#")[0].str.strip()
    absent = texts.str.lower().isin(NOT_THERE)
    if (texts == "").any():
        _check_lengths(file)
    try:
        return texts.mask(absent, "nan").to_numpy(np.float64)
    except ValueError as error:
        row = next(row for row, text in enumerate(texts) if not absent.iloc[row] and not is_number(text))
        where = f"row {row + 1}"
        if heading:
            where = f"the column {heading[int(str(column.name))]!r}, row {row + 1} below the heading"
        advice = "separate columns by commas" if {*texts.iloc[row]} & {*";\t"} else "leave out columns of texts"
        raise ValueError(f"{texts.iloc[row]!r} in {where}, is no number: {advice}") from error


def _read_csv(file: Path, heading: list[str], noted: bool) -> "DataFrame":
    import pandas

    absent = [cell.lower() in NOT_THERE[2:] for cell in heading]
    if any(absent) and (all(absent) or any(map(is_number, heading))):
        raise FileError(f"{file} has {heading} in its first row; leave a cell empty where a value is missing")
    try:
        cells = pandas.read_csv(
            file, header=None, skiprows=int(bool(heading)), dtype=object, na_filter=False, skipinitialspace=True,
            index_col=False, comment="#" if noted else None, encoding="utf-8-sig",
        )  # fmt: skip
    except pandas.errors.EmptyDataError:
        return pandas.DataFrame()
    if cells.shape[1] > 1 or not noted:
        return cells
    # A blank line between two cells of a single column is an empty cell, and not beside a note.
    lines = (
        pandas.Series(file.read_text(encoding="utf-8-sig").splitlines()[int(bool(heading)) :])
        .str.strip()
        .str.strip('"')
    )
    note = lines.str.startswith("#").astype(float).mask(lines == "")
    return lines[(note.ffill() == 0) & (note.bfill() == 0)].reset_index(drop=True).to_frame(0)


def _check_lengths(file: Path) -> None:
    """A ValueError if rows below the heading differ in length: pandas fills short ones with empty cells."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = itertools.islice(csv.reader(stream), int(bool(heading_of(file))), None)
        lengths = {len(row) for row in rows if row and not row[0].startswith("#")}
    if len(lengths) > 1:
        raise ValueError(f"its rows have {' or '.join(map(str, sorted(lengths)))} cells; give all the same number")


def is_number(cell: str) -> bool:
    """Whether a cell is a number and not empty."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_parquet(file: Path) -> "DataFrame":
    with _parquet(file).ParquetFile(file) as stored:
        found = stored.metadata
        check_unpacked(8 * found.num_rows * found.num_columns, file)
        # Not by column: pyarrow aborts the process for some damaged statistics of a single column.
        groups = [found.row_group(index).total_byte_size for index in range(found.num_row_groups)]
        check_unpacked(sum(max(0, size) for size in groups), file)
        return stored.read().to_pandas(ignore_metadata=True)


def _read_npz(file: Path, names: tuple[str, ...]) -> "DataFrame":
    import pandas

    with opened_npz(file, "signal=y") as arrays:
        only = arrays.files if len(arrays.files) == 1 else []
        values = np.atleast_1d(npz_array(arrays, [*names, *only], file)[1])
        return pandas.DataFrame(values.reshape(len(values), -1) if values.size else None)


def write_table(file: Path, columns: dict[str, Any]) -> None:
    """Write columns by their names as CSV or Parquet."""
    import pandas

    table = pandas.DataFrame(columns)
    with replacing(file, int(table.memory_usage().sum())) as temporary:
        if file.suffix.lower() == ".csv":
            table.to_csv(temporary, index=False, na_rep="nan", lineterminator="\n")
        elif _parquet(file):  # which says what to install
            table.to_parquet(temporary, index=False)


def heading_of(file: Path) -> list[str]:
    """The names of a CSV file's columns; none if its first row is numbers."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        cells = [cell.strip() for cell in next(csv.reader([stream.readline()]), [])]
    numeric = all(not cell or is_number(cell) for cell in cells)
    return [] if numeric else [cell.removeprefix("#").strip() for cell in cells]


def _parquet(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise FileError(f"the file {file} needs pyarrow: pip install 'sparseopt[parquet]'") from error
    return pyarrow.parquet
