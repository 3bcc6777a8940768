"""Floor 5: images and tables of numbers as files; all functions here raise a `FileError` for an invalid file.

image  PNG, TIFF, JPEG, ... grey or colour, 8 or 16 bit
table  CSV (with or without a heading), Parquet, NPZ

Files may be malicious. Pickled data are refused, and the claimed size of the contents is checked before memory is
allocated.
"""

import io
import itertools
import math
import os
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.system.files import write_whole

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Formats that are only data: Pillow's reader of PostScript, for example, starts a program.
IMAGE_FORMATS = ("PNG", "TIFF", "JPEG", "WEBP", "BMP", "GIF", "PPM")
# Pillow's own limit for decompression bombs.
MAX_PIXELS = 89_478_485
TABLE_KINDS = (".csv", ".parquet", ".npz")
# How programs write a missing value.
NOT_THERE = ("na", "n/a", "null", "none", "?", "-")
PICKLES = (".npy", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")
# The largest size of an unpacked table: this many bytes, or this many times the size of the file.
FREE_BYTES, MAX_RATIO = 2**28, 100


class FileError(ValueError):
    """A file that cannot be read or must not be written; the text says why and what to do."""


def read_image(path: str | Path) -> np.ndarray:
    """An image of at most `MAX_PIXELS` as `[height, width]` or `[height, width, channels]`, uint8 or uint16."""
    from PIL import Image

    file = readable(path, "a PNG or TIFF")
    try:
        if _is_deep_colour_png(file):
            return _read_deep_png(file)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                # A program may have disabled Pillow's own limit.
                _check_pixels(image.size, file)
                if image.format == "TIFF" and image.mode in ("RGB", "RGBA"):
                    return _read_colour_tiff(file)
                plain = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}.get(image.mode, image.mode)
                return _checked_image(np.asarray(image.convert(plain)), file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise FileError(f"{file} is too large to read: {error}; crop it or scale it down first") from error
    except (FileError, ModuleNotFoundError):
        raise
    except Exception as error:  # decoders raise all kinds of errors for broken files
        raise FileError(f"cannot read {file} as an image: {str(error)[:300] or type(error).__name__}") from error


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 or uint16 pixels in the format of the file's ending, the whole file or nothing."""
    write_whole(Path(path), encoded_image(Path(path), image))


def encoded_image(file: Path, image: np.ndarray) -> bytes:
    """What `write_image` writes; a FileError where the format cannot hold such pixels."""
    from PIL import Image

    deep, kind, stream = image.dtype == np.uint16, file.suffix.lower(), io.BytesIO()
    if deep and kind not in (".png", ".tif", ".tiff"):
        raise FileError(f"{file} cannot hold 16-bit pixels; name a .png or .tif file")
    if deep and image.ndim == 3 and kind == ".png":
        import png

        height, width, channels = image.shape
        writer = png.Writer(width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=16)
        writer.write(stream, image.reshape(height, width * channels))
    elif deep and image.ndim == 3 and image.shape[-1] == 2:
        raise FileError(f"{file} cannot hold 16-bit grey with opacity; name a .png file")
    elif deep and image.ndim == 3:
        import tifffile

        tifffile.imwrite(stream, image)
    else:
        try:
            Image.fromarray(image).save(stream, Image.registered_extensions()[kind])
        except (KeyError, TypeError, ValueError, OSError) as error:
            why = f"unknown file extension: {kind}" if isinstance(error, KeyError) else error
            raise FileError(f"cannot write {file}: {why}; name a .png file") from error
    return stream.getvalue()


def _is_deep_colour_png(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(26)
    # Bytes 24 and 25 of a PNG are the bit depth and the colour type; Pillow reads type 0, grey, in full depth.
    return head.startswith(PNG_SIGNATURE) and len(head) == 26 and head[24] == 16 and head[25] != 0


def _read_deep_png(file: Path) -> np.ndarray:
    import png

    with file.open("rb") as stream:
        _check_pixels(struct.unpack(">II", stream.read(24)[16:]), file)
    # `asDirect` reads rows on demand: a stream with more data than claimed is never unpacked completely.
    width, height, rows, info = png.Reader(filename=str(file)).asDirect()
    pixels = np.empty((height, width * info["planes"]), np.uint16)
    count = 0
    for count, row in enumerate(rows, 1):
        pixels[count - 1] = row
    if count != height:
        raise FileError(f"cannot read {file} as an image: it has {count} of {height} rows")
    return _checked_image(pixels.reshape(height, width, info["planes"]), file)


def _read_colour_tiff(file: Path) -> np.ndarray:
    """A TIFF in colour; Pillow reduces 16 bits to 8, tifffile keeps them."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        series = tiff.series[0]
        # tifffile may read another size than Pillow; the channels may be the first or the last axis.
        _check_pixels((math.prod(series.shape) // 4, 1), file)
        values = series.asarray()
        return _checked_image(np.moveaxis(values, 0, -1) if series.axes.startswith("S") else values, file)


def _check_pixels(size: tuple[int, ...], file: Path) -> None:
    if math.prod(size) > MAX_PIXELS:
        raise FileError(
            f"{file} claims {math.prod(size):,} pixels, at most {MAX_PIXELS:,} are read; crop it or scale it down first"
        )


def _checked_image(image: np.ndarray, file: Path) -> np.ndarray:
    image = image.astype(image.dtype.newbyteorder("="), copy=False)
    if image.ndim not in (2, 3) or image.size == 0 or image.dtype not in (np.uint8, np.uint16):
        raise FileError(f"{file} holds {image.dtype} of shape {list(image.shape)}; give 8- or 16-bit grey or colour")
    return image


def read_table(path: str | Path, names: tuple[str, ...] = (), columns: tuple[int, ...] = ()) -> np.ndarray:
    """A numeric table `[rows, columns]`, float64; of an NPZ file the array with one of the `names`.

    Of other files only the given `columns`, if any are given.
    """
    file = readable(path, "a CSV or NPZ")
    kind = file.suffix.lower()
    if kind not in TABLE_KINDS:
        raise FileError(f"{file} must end in one of {', '.join(TABLE_KINDS)}")
    try:
        if kind == ".npz":
            table = _read_npz(file, names)
        else:
            table = {".csv": _read_csv, ".parquet": _read_parquet}[kind](file, columns)
    except (FileError, ModuleNotFoundError):
        raise
    except Exception as error:  # pyarrow, zipfile and zlib have their own classes of errors
        raise FileError(f"cannot read numbers from {file}: {str(error)[:300] or type(error).__name__}") from error
    if table.size == 0 or table.ndim == 0:
        raise FileError(f"{file} holds no rows of numbers; give one row a node or an edge")
    return table.reshape(len(table), -1)


def _read_csv(file: Path, columns: tuple[int, ...]) -> np.ndarray:
    with file.open(encoding="utf-8-sig") as stream:
        first = stream.readline().strip().split(",")
        heading = not is_numbers(first)
        absent = [cell.strip().lower() in NOT_THERE for cell in first]
        if heading and any(absent) and (all(absent) or any(map(is_number, first))):
            raise FileError(f"{file} has {first} in its first row; leave a cell empty where a value is missing")
        stream.seek(0)
        with warnings.catch_warnings():
            # The caller reports an empty table.
            warnings.filterwarnings("ignore", "loadtxt: input contained no data", UserWarning)
            return np.loadtxt(
                _with_blanks(stream, heading) if len(first) == 1 else file,
                delimiter=",",
                skiprows=int(heading),
                ndmin=2,
                usecols=columns or None,
                comments=None if columns else "#",  # an id may have one
                quotechar='"',
                converters=lambda cell: float(cell or "nan"),
                encoding="utf-8-sig",
            )


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


def write_npz(file: Path, arrays: dict[str, Any]) -> None:
    """Write an archive by exactly this name, to which NumPy would add an ending of its own."""
    with file.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def _read_parquet(file: Path, columns: tuple[int, ...]) -> np.ndarray:
    table = parquet_table(file)
    kept = columns or range(table.num_columns)
    return np.stack([np.asarray(table.column(i).to_numpy(), np.float64) for i in kept], axis=1)


def parquet_table(file: Path) -> Any:
    """A Parquet file as a table, after its claimed size was checked."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise FileError(f"reading {file} needs pyarrow: pip install pyarrow") from error
    with pyarrow.parquet.ParquetFile(file) as stored:
        found = stored.metadata
        check_unpacked(8 * found.num_rows * found.num_columns, file)
        # Not by column: pyarrow aborts the process for some damaged statistics of a single column.
        groups = [found.row_group(index).total_byte_size for index in range(found.num_row_groups)]
        check_unpacked(sum(max(0, size) for size in groups), file)
        return stored.read()


def _read_npz(file: Path, names: tuple[str, ...]) -> np.ndarray:
    with opened_npz(file, "signal=y") as arrays:
        found = [name for name in names if name in arrays] or ([arrays.files[0]] if len(arrays.files) == 1 else [])
        if not found:
            raise ValueError(f"it holds {', '.join(arrays.files[:8])}, expected one of {', '.join(names)}")
        member = found[0] if found[0] in arrays.zip.namelist() else f"{found[0]}.npy"
        check_npy(arrays.zip, member, file)
        return np.asarray(arrays[found[0]], np.float64)


def opened_npz(file: Path, example: str) -> Any:
    """The arrays of an archive, unread; `example` says in an error how one is written."""
    if not zipfile.is_zipfile(file):
        raise ValueError(f"it is not an NPZ archive; write it with numpy.savez(FILE, {example})")
    return np.load(file, allow_pickle=False)


def check_npy(archive: zipfile.ZipFile, member: str, file: Path) -> None:
    """Raise an error unless the header of an array is one of plain numbers and fits its size."""
    info = archive.getinfo(member)
    check_unpacked(info.file_size, file)
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{member} is in version {version} of the format; write it again with numpy.savez")
        shape, _, dtype = read(stream)
        start = stream.tell()
    if dtype.kind not in "biuf":
        pickled = dtype.hasobject
        why = "Python objects, which are pickled and can run code when loaded" if pickled else f"{dtype}"
        raise ValueError(f"{member} holds {why}; convert it: numpy.savez(FILE, signal=numpy.asarray(y, float))")
    if not all(size >= 0 for size in shape) or start + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{member} claims the shape {list(shape)[:8]} and has {info.file_size} bytes; write it again")


def check_unpacked(claimed: int, file: Path) -> None:
    """A FileError if contents claim to be too large for their file."""
    most = max(FREE_BYTES, MAX_RATIO * file.stat().st_size)
    if claimed > most:
        raise FileError(
            f"{file} would unpack to {claimed:,} bytes, at most {most:,} for a file of its size; it is corrupt, or "
            "compressed beyond that: write it again without compression"
        )


def readable(path: str | Path, instead: str) -> Path:
    """The path of a file that exists and is not of a kind that can run code; `instead` is what to write."""
    file = Path(path)
    if not file.is_file():
        raise FileError(f"there is no file {file}")
    if file.suffix.lower() in PICKLES:
        raise FileError(
            f"{file} is of a kind that can hold pickled objects, which can run code when loaded, and is not read; if "
            f"you trust who made it, load it where it was made and write {instead} file"
        )
    return file


def check_output(path: str | Path, kinds: tuple[str, ...] | None, force: bool) -> Path:
    """The path; a FileError if its folder is missing, its ending not in `kinds`, or it exists without `force`."""
    file = Path(path)
    if kinds is not None and file.suffix.lower() not in kinds:
        raise FileError(f"the output {file} must end in one of {', '.join(kinds)}")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise FileError(f"the folder of the output {file} does not exist or cannot be written; make it first")
    if file.exists() and not force:
        raise FileError(f"the output {file} exists already; name another, or give --force to replace it")
    return file
