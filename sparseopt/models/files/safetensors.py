"""Safetensors files: a header checked against the file's size, tensors read one by one, safe writes.

Layout: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, the data.
Files are not memory-mapped: one that shrinks while it is read is an error, not a signal that ends the process.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sparseopt.models.base.errors import ModelError
from sparseopt.models.files.folder import parse_json

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES: dict[np.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}

# Dtypes in which a model may be written.
WRITABLE = tuple(DTYPES[code] for code in ("F32", "F16", "BF16", "F64"))

# NumPy's own limit.
_MAX_AXES = 64
# The format's own limit on a header, in bytes.
_MAX_HEADER = 100_000_000

# Bytes of a tensor that are in memory at once besides what is made of it.
SLICE = 2**26


def slices(tensor: Any) -> Iterator[Any]:
    """A tensor on file, cut along its first axis into others of about `SLICE` bytes once they are read.

    It is a dataclass with `start`, `shape`, `dtype` and `nbytes`.
    """
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, SLICE // max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
    if rows <= step:
        yield tensor
        return
    for first in range(0, rows, step):
        start, shape = tensor.start + first * (tensor.nbytes // rows), (min(step, rows - first), *tensor.shape[1:])
        yield replace(tensor, start=start, shape=shape)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: its file, first byte, shape and dtype."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        return read_part(self.file, self.dtype, math.prod(self.shape), self.start).reshape(self.shape)


@dataclass(frozen=True)
class UnreadTensor:
    """A tensor that is read only when it is written, in pieces along its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        pieces = list(self.pieces())
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def read_part(file: Path, dtype: np.dtype, count: int, start: int) -> np.ndarray:
    """`count` numbers of a file from byte `start` on; a shorter file or a disk error is a `ModelError`."""
    try:
        found = np.fromfile(file, dtype, count, offset=start)
    except OSError as error:
        raise ModelError(
            f"could not read {file} from byte {start:,} on: {error.strerror or error}; check the disk, copy the file "
            "again if it is damaged, and start the same command again"
        ) from error
    if found.size != count:
        raise ModelError(f"{file} became shorter while it was read; copy it again and start the same command again")
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file by name; only the header is read.

    Raises:
        ModelError: if the file is truncated, or its header is no JSON, does not describe every byte of the data, or
            names a dtype that is not supported.
    """
    entries, data, size = _read_raw_header(file)
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        problem = _entry_problem(entry)
        if problem:
            raise ModelError(f"{file} has a corrupt header ({name[:200]}: {problem}); download it again")
    if unsupported := sorted({entry["dtype"] for entry in entries.values()} - set(DTYPES)):
        shown = ", ".join(code[:20] for code in unsupported[:8])
        raise ModelError(f"{file} stores {shown}; supported are {', '.join(DTYPES)}; convert it first")
    found, start = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        tensor = found[name] = StoredTensor(file, data + start, tuple(entry["shape"]), DTYPES[entry["dtype"]])
        end = start + tensor.nbytes
        if entry["data_offsets"] != [start, end]:
            raise ModelError(
                f"{file} is corrupt: {name[:200]} {entry['shape']} {entry['dtype']} needs bytes {start} to {end}, its "
                f"header says {entry['data_offsets']}; download it again"
            )
        start = end
    if data + start != size:
        state = "truncated" if data + start > size else "corrupt (too long)"
        raise ModelError(
            f"{file} is {state}: its header describes {data + start} bytes, it has {size}; download it again"
        )
    return {name: found[name] for name in entries}


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, empty if there is none."""
    return _read_raw_header(file)[0].get("__metadata__", {})


def is_shape(sizes: Any) -> bool:
    """Whether a list can be the sizes of an array."""
    if not isinstance(sizes, list) or len(sizes) > _MAX_AXES:
        return False
    whole = all(type(size) is int and 0 <= size < 2**63 for size in sizes)
    # An empty array has no bytes in the file that would bound its other sizes.
    return whole and math.prod(size or 1 for size in sizes) < (2**31 if 0 in sizes else 2**60)


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        return "no dtype, shape and data_offsets"
    if not isinstance(entry["dtype"], str):
        return "a dtype that is no text"
    if not is_shape(entry["shape"]):
        return "an impossible shape"
    span = entry["data_offsets"]
    if not isinstance(span, list) or len(span) != 2 or any(type(place) is not int for place in span):
        return "data_offsets that are not two whole numbers"
    return None


def _read_raw_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON object, its metadata checked; the first byte of the data; the bytes of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ModelError(
                f"{file} is truncated or no safetensors file: it has {size} bytes and claims a header of "
                f"{length}; download it again"
            )
        raw = stream.read(length)
    try:
        header = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} has a corrupt header ({error}); download it again") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        what = "no JSON object" if metadata is None else "metadata that is no text"
        raise ModelError(f"{file} has a corrupt header ({what}); download it again")
    return header, 8 + length, size


def write_tensors(
    file: Path, tensors: Mapping[str, np.ndarray | UnreadTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, in dtypes of `DTYPES`; an `UnreadTensor` is read when it is written.

    Without metadata the header has those that transformers expects.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    # Widest dtype first, so that every tensor starts at a multiple of its item size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    start = 0
    for name, tensor in ordered.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in ordered.values():
            for piece in tensor.pieces() if isinstance(tensor, UnreadTensor) else [tensor]:
                stream.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
