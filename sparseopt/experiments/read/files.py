"""Rules for reading and writing files of numbers. All functions raise a `FileError`, which says what to do.

Files may be malicious. Pickled data are rejected, and the claimed size of the contents is checked before memory is
allocated.
"""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PICKLES = (".npy", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")
# The largest size of an unpacked file: this many bytes, or this many times the size of the file.
FREE_BYTES, MAX_RATIO = 2**28, 100


class FileError(ValueError):
    """Raised if a file cannot be read or must not be written; the message says why and what to do."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Context in which any error of a reader becomes a FileError that says what cannot be read."""
    try:
        yield
    except (FileError, ModuleNotFoundError):
        raise
    except Exception as error:  # of NumPy, pyarrow, zipfile, Pillow and others, each with its own classes
        why = str(error).partition("; use `usecols`")[0][:300] or type(error).__name__
        raise FileError(f"cannot read {what}: {why}") from error


def opened_npz(file: Path, example: str) -> Any:
    """The arrays of an archive, unread; `example` shows in an error how to write one."""
    if not zipfile.is_zipfile(file):
        raise ValueError(f"it is not an NPZ archive; write it with numpy.savez(FILE, {example})")
    return np.load(file, allow_pickle=False)


def npz_array(arrays: Any, names: Sequence[str], file: Path) -> tuple[str, np.ndarray]:
    """The first of the names that an archive has, and its array, after checking its header."""
    name = next((name for name in names if name in arrays), None)
    if name is None:
        raise ValueError(f"it holds {', '.join(arrays.files[:8])}, expected one of {', '.join(names)}")
    _check_npy(arrays.zip, name if name in arrays.zip.namelist() else f"{name}.npy", file)
    return name, arrays[name]


def _check_npy(archive: zipfile.ZipFile, member: str, file: Path) -> None:
    """Raise an error unless an array's header describes plain numbers and matches its size."""
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
    """The path of a file that exists and cannot run code; `instead` says what to write otherwise."""
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


def write_npz(file: Path, arrays: dict[str, Any]) -> None:
    """Write an archive with exactly this name, to which NumPy would add an ending."""
    with file.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
