"""Tables of numbers or texts as files: CSV with or without a heading, Parquet, NPZ. Invalid files are a `FileError`."""

import csv
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.experiments.read.files import FileError, check_unpacked, npz_array, opened_npz, readable, reading
from sparseopt.system.files import replacing

TABLE_KINDS = (".csv", ".parquet", ".npz")
# How programs write a missing value.
NOT_THERE = ("na", "n/a", "null", "none", "?", "-")
# What NumPy says of a text that is no number.
NO_NUMBER = re.compile(r"could not convert string (.*) to float64 at row (\d+), column (\d+)")


def read_table(
    path: str | Path, names: tuple[str, ...] = (), columns: tuple[int, ...] = (), texts: bool = False
) -> np.ndarray:
    """A table `[rows, columns]` of numbers, float64, or of `texts`; of an NPZ file the array with one of the `names`.

    Of other files only the given `columns`, if any are given. Without them, the first row of texts may be a heading.
    """
    file = readable(path, "a CSV or NPZ")
    kind = file.suffix.lower()
    if kind not in TABLE_KINDS:
        raise FileError(f"{file} must end in one of {', '.join(TABLE_KINDS)}")
    with reading(f"numbers from {file}"):
        if kind == ".npz":
            table = _read_npz(file, names)
        else:
            table = {".csv": _read_csv, ".parquet": _read_parquet}[kind](file, columns, texts)
    if table.size == 0 or table.ndim == 0:
        raise FileError(f"{file} holds no rows of numbers; give one row a node or an edge")
    return table.reshape(len(table), -1)


def _read_csv(file: Path, columns: tuple[int, ...], texts: bool) -> np.ndarray:
    cells, heading = _first_row(file), bool(heading_of(file)) and not (texts and not columns)
    absent = [cell.lower() in NOT_THERE for cell in cells]
    if heading and any(absent) and (all(absent) or any(map(is_number, cells))):
        raise FileError(f"{file} has {cells} in its first row; leave a cell empty where a value is missing")
    with file.open(encoding="utf-8-sig") as stream, warnings.catch_warnings():
        # The caller reports an empty table.
        warnings.filterwarnings("ignore", "loadtxt: input contained no data", UserWarning)
        try:
            return np.loadtxt(
                _with_blanks(stream, heading) if len(cells) == 1 and not texts else file,
                dtype=object if texts else np.float64,
                delimiter=",",
                skiprows=int(heading),
                ndmin=2,
                usecols=columns or None,
                comments=None if columns or texts else "#",  # an id may have one
                quotechar='"',
                converters=str.strip if texts else _number,
                encoding="utf-8-sig",
            )
        except ValueError as error:
            if (found := NO_NUMBER.match(str(error))) is None:
                raise
            text, row, column = found[1], int(found[2]) + 1, int(found[3])
            where = f"the column {cells[column - 1]!r}, row {row} below the heading" if heading else f"row {row}"
            advice = "separate columns by commas" if ";" in text or "\\t" in text else "leave out columns of texts"
            raise ValueError(f"{text} in {where}, is no number: {advice}") from error


def _number(cell: str) -> float:
    return float("nan" if not cell or cell.strip().lower() in NOT_THERE else cell)


def _with_blanks(lines: Iterable[str], heading: bool) -> Iterator[str]:
    """The lines of a table; a blank one between two cells of a single column is an empty cell."""
    blank, inside = 0, False
    for number, line in enumerate(lines):
        if not line.strip():
            blank += 1
            continue
        cell = "," not in line and not line.lstrip().startswith("#") and not (heading and number == 0)
        yield from itertools.repeat('""', blank if inside and cell else 0)
        yield line
        blank, inside = 0, cell


def is_numbers(cells: list[str]) -> bool:
    """Whether all cells are numbers or empty."""
    return all(not cell or is_number(cell) for cell in cells)


def is_number(cell: str) -> bool:
    """Whether a cell is a number and not empty."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_parquet(file: Path, columns: tuple[int, ...], texts: bool) -> np.ndarray:
    with _parquet(file).ParquetFile(file) as stored:
        found = stored.metadata
        check_unpacked(8 * found.num_rows * found.num_columns, file)
        # Not by column: pyarrow aborts the process for some damaged statistics of a single column.
        groups = [found.row_group(index).total_byte_size for index in range(found.num_row_groups)]
        check_unpacked(sum(max(0, size) for size in groups), file)
        table = stored.read()
    kept = [table.column(index) for index in columns or range(table.num_columns)]
    if texts:
        return np.array([[str(cell) for cell in column.to_pylist()] for column in kept], object).T
    return np.stack([np.asarray(column.to_numpy(), np.float64) for column in kept], axis=1)


def write_parquet(file: Path, columns: dict[str, list[Any]]) -> None:
    """Write columns by their names."""
    parquet = _parquet(file)  # says what to install

    import pyarrow

    table = pyarrow.table(columns)
    with replacing(file, table.nbytes) as temporary:
        parquet.write_table(table, temporary)


def _read_npz(file: Path, names: tuple[str, ...]) -> np.ndarray:
    with opened_npz(file, "signal=y") as arrays:
        only = arrays.files if len(arrays.files) == 1 else []
        return np.asarray(npz_array(arrays, [*names, *only], file)[1], np.float64)


def heading_of(file: Path) -> list[str]:
    """The names of the columns; none for an NPZ file, and for a CSV file whose first row is numbers."""
    try:
        if file.suffix.lower() == ".parquet":
            with _parquet(file).ParquetFile(file) as stored:
                return list(stored.schema_arrow.names)
        cells = _first_row(file) if file.suffix.lower() == ".csv" else []
    except Exception:
        return []  # reading the table says what is wrong
    return [] if is_numbers(cells) else [cell.removeprefix("#").strip() for cell in cells]


def _first_row(file: Path) -> list[str]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        return [cell.strip() for cell in next(csv.reader([stream.readline()]), [])]


def _parquet(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise FileError(f"the file {file} needs pyarrow: pip install 'sparseopt[parquet]'") from error
    return pyarrow.parquet
