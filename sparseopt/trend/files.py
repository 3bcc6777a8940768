"""Floor 5: images, edge lists and signals as files; nothing is overwritten unless asked.

image          PNG, TIFF, JPEG, ... grey or colour, 8 or 16 bit
edges, signal  CSV (with or without a heading), Parquet, NPZ
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TABLE_KINDS = (".csv", ".parquet", ".npz")


class FileError(ValueError):
    """A file that cannot be read or must not be written; the text says what was found and what to do."""


def read_image(path: str | Path) -> np.ndarray:
    """An image as `[height, width]` or `[height, width, channels]`, uint8 or uint16.

    Raises:
        FileError: if there is no such file, or it is no image of these kinds.
    """
    from PIL import Image, UnidentifiedImageError

    file = Path(path)
    _must_exist(file)
    if _is_deep_colour_png(file):
        return _read_deep_png(file)
    try:
        with Image.open(file) as image:
            if image.format == "TIFF" and image.mode in ("RGB", "RGBA"):
                # Pillow cuts 16-bit colour down to 8 bits; tifffile keeps it.
                import tifffile

                return _checked_image(tifffile.imread(file), file)
            plain = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}.get(image.mode, image.mode)
            return _checked_image(np.asarray(image.convert(plain)), file)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(f"cannot read {file} as an image: {error}") from error


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 or uint16 pixels; the kind follows from the name's ending.

    Raises:
        FileError: for an ending that cannot hold the pixels.
    """
    from PIL import Image

    file = Path(path)
    deep = image.dtype == np.uint16
    kind = file.suffix.lower()
    if deep and kind not in (".png", ".tif", ".tiff"):
        raise FileError(f"{file} cannot hold 16-bit pixels; name a .png or .tif file")
    if deep and image.ndim == 3 and kind == ".png":
        import png

        height, width, channels = image.shape
        writer = png.Writer(width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=16)
        with file.open("wb") as stream:
            writer.write(stream, image.reshape(height, width * channels))
    elif deep and image.ndim == 3:
        import tifffile

        tifffile.imwrite(file, image)
    else:
        try:
            Image.fromarray(image).save(file)
        except (ValueError, OSError) as error:
            raise FileError(f"cannot write {file}: {error}; name a .png file") from error


def _is_deep_colour_png(file: Path) -> bool:
    head = file.open("rb").read(26)
    # Bytes 24 and 25 of a PNG are the bit depth and the colour type; 0 is grey, which Pillow reads whole.
    return head.startswith(PNG_SIGNATURE) and len(head) == 26 and head[24] == 16 and head[25] != 0


def _read_deep_png(file: Path) -> np.ndarray:
    import png

    try:
        width, height, rows, info = png.Reader(filename=str(file)).asDirect()
        pixels = np.vstack([np.asarray(row, np.uint16) for row in rows])
    except (png.Error, ValueError) as error:
        raise FileError(f"cannot read {file} as an image: {error}") from error
    return pixels.reshape(height, width, info["planes"])


def _checked_image(image: np.ndarray, file: Path) -> np.ndarray:
    if image.ndim not in (2, 3) or image.dtype not in (np.uint8, np.uint16):
        raise FileError(f"{file} holds {image.dtype} of shape {list(image.shape)}; give 8- or 16-bit grey or colour")
    return image


def read_table(path: str | Path, names: tuple[str, ...] = ()) -> np.ndarray:
    """A numeric table `[rows, columns]`, float64; an NPZ file's array is looked up by `names`.

    Raises:
        FileError: if the file is missing, of another kind, or not numeric.
    """
    file = Path(path)
    _must_exist(file)
    kind = file.suffix.lower()
    if kind not in TABLE_KINDS:
        raise FileError(f"{file} is none of {', '.join(TABLE_KINDS)}")
    try:
        table = {".csv": _read_csv, ".parquet": _read_parquet}[kind](file) if kind != ".npz" else _read_npz(file, names)
    except (ValueError, TypeError, OSError) as error:
        raise FileError(f"cannot read numbers from {file}: {error}") from error
    return table.reshape(len(table), -1)


def _read_csv(file: Path) -> np.ndarray:
    with file.open(encoding="utf-8") as stream:
        first = stream.readline()
    try:
        [float(cell or "nan") for cell in first.strip().split(",")]
        heading = 0
    except ValueError:
        heading = 1
    return np.loadtxt(file, delimiter=",", skiprows=heading, ndmin=2, converters=lambda cell: float(cell or "nan"))


def _read_parquet(file: Path) -> np.ndarray:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise FileError(f"reading {file} needs pyarrow: pip install pyarrow") from error
    table = pyarrow.parquet.read_table(file)
    return np.stack([np.asarray(column.to_numpy(), np.float64) for column in table.columns], axis=1)


def _read_npz(file: Path, names: tuple[str, ...]) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:
        found = [name for name in names if name in arrays] or ([arrays.files[0]] if len(arrays.files) == 1 else [])
        if not found:
            raise ValueError(f"it holds {', '.join(arrays.files)}, expected one of {', '.join(names)}")
        return np.asarray(arrays[found[0]], np.float64)


def read_edges(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Edges `[m, 2]` int64 and weights `[m]` or None: the first two columns are node numbers from 0, a third weights.

    Raises:
        FileError: for another number of columns, or node numbers that are not whole.
    """
    table = read_table(path, ("edges",))
    if table.shape[1] not in (2, 3):
        raise FileError(f"{path} has {table.shape[1]} columns; an edge is two node numbers and, if any, a weight")
    pairs = table[:, :2]
    if not (np.isfinite(pairs).all() and (pairs == np.rint(pairs)).all()):
        row = int(np.argmax(~(np.isfinite(pairs) & (pairs == np.rint(pairs))).all(axis=1)))
        raise FileError(f"{path} names the nodes {pairs[row].tolist()} in row {row}; node numbers are whole, from 0")
    return pairs.astype(np.int64), table[:, 2] if table.shape[1] == 3 else None


def read_signal(path: str | Path) -> np.ndarray:
    """A signal `[n]`, or `[n, channels]` with a column a channel; row j belongs to node j."""
    table = read_table(path, ("signal", "y"))
    return table[:, 0] if table.shape[1] == 1 else table


def write_signal(path: str | Path, signal: np.ndarray) -> None:
    """Write `[n]` or `[n, channels]` in the kind that the name's ending says."""
    file = Path(path)
    kind = file.suffix.lower()
    columns = signal.reshape(len(signal), -1)
    if kind == ".csv":
        np.savetxt(file, columns, delimiter=",", fmt="%.17g")
    elif kind == ".npz":
        np.savez_compressed(file, signal=signal)
    elif kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table: Any = {f"channel_{i}": columns[:, i] for i in range(columns.shape[1])}
        pyarrow.parquet.write_table(pyarrow.table(table), file)
    else:
        raise FileError(f"{file} is none of {', '.join(TABLE_KINDS)}")


def check_output(path: str | Path, kinds: tuple[str, ...] | None, force: bool) -> Path:
    """The path, if it may be written.

    Raises:
        FileError: if its folder is missing, its ending is not one of `kinds`, or it exists and `force` is off.
    """
    file = Path(path)
    if kinds is not None and file.suffix.lower() not in kinds:
        raise FileError(f"the output {file} must end in one of {', '.join(kinds)}")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise FileError(f"the folder of the output {file} does not exist or cannot be written; make it first")
    if file.exists() and not force:
        raise FileError(f"the output {file} exists already; name another, or give --force to replace it")
    return file


def _must_exist(file: Path) -> None:
    if not file.is_file():
        raise FileError(f"there is no file {file}")
