"""Safetensors files: a header checked against the file's size, tensors read one by one, safe writes.

Layout: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, the data.
Files are not memory-mapped: if one shrinks while it is read, that is an error, not a signal that ends the process.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import ml_dtypes
import numpy as np
from jaxtyping import Int
from pydantic import AfterValidator, BaseModel, Field, NonNegativeInt, TypeAdapter

from sparseopt.models.base.errors import JSON_OBJECT, ModelError, Said, checked, guarded
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

# Bytes of a tensor that are in memory at once, besides the result.
SLICE = 2**26


def is_shape(sizes: list[int]) -> bool:
    """Whether non-negative numbers can be the shape of an array."""
    # An empty array has no bytes in the file that would bound its other sizes.
    bound = 2**31 if 0 in sizes else 2**60
    return len(sizes) <= _MAX_AXES and math.prod(size or 1 for size in sizes) < bound


def _shape(sizes: list[int]) -> list[int]:
    if not is_shape(sizes):
        raise ValueError
    return sizes


Shape = Annotated[list[NonNegativeInt], AfterValidator(_shape), Said("an impossible shape")]
_Offsets = Annotated[list[int], Field(min_length=2, max_length=2), Said("not two whole numbers")]


class _Entry(BaseModel):
    """A tensor in the header of a file; the offsets count from the header's end."""

    dtype: Annotated[str, Said("no text")]
    shape: Shape
    data_offsets: _Offsets


_ENTRIES = TypeAdapter(dict[str, _Entry])
_METADATA = TypeAdapter(Annotated[dict[str, str], Said("metadata that is no text")])


@dataclass(frozen=True)
class TensorInfo:
    """What is known about a tensor before it is read.

    Attributes:
        shape: sizes of the axes, slowest axis first.
        dtype: dtype of the result; float32 for a quantised tensor.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor stored in a file in C order, from the byte `start` on."""

    file: Path
    start: int

    @property
    def stored_bytes(self) -> int:
        return self.nbytes

    def read(self) -> np.ndarray:
        return read_part(self.file, self.dtype, math.prod(self.shape), self.start).reshape(self.shape)

    def slices(self) -> Iterator[Self]:
        """The tensor cut along its first axis into tensors of about `SLICE` bytes when read."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, SLICE // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        if rows <= step:
            yield self
            return
        for first in range(0, rows, step):
            start, shape = self.start + first * (self.stored_bytes // rows), (min(step, rows - first), *self.shape[1:])
            yield replace(self, start=start, shape=shape)

    def pieces(self) -> Iterator[np.ndarray]:
        return (part.read() for part in self.slices())


@dataclass(frozen=True)
class UnreadTensor(TensorInfo):
    """A tensor that is read only when it is written, in `pieces` along its first axis.

    Attributes:
        origin: the tensor of a file that it equals unchanged, if any.
    """

    pieces: Callable[[], Iterable[np.ndarray]]
    origin: TensorInfo | None = None

    def read(self) -> np.ndarray:
        pieces = list(self.pieces())
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def picked_rows(pieces: Iterable[np.ndarray], rows: Int[np.ndarray, "rows"]) -> Iterator[np.ndarray]:
    """These rows, ascending, of an array that comes in pieces along its first axis; in as many pieces."""
    start = 0
    for piece in pieces:
        low, high = np.searchsorted(rows, [start, start + len(piece)])
        yield piece[rows[low:high] - start]
        start += len(piece)


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
            names an unsupported dtype.
    """
    size, what = file.stat().st_size, f"{file} has a corrupt header"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ModelError(
                f"{file} is truncated or no safetensors file: it has {size} bytes and claims a header of "
                f"{length}; download it again"
            )
        raw = stream.read(length)
    header = checked(JSON_OBJECT, guarded(lambda: parse_json(raw), what), what)
    checked(_METADATA, header.pop("__metadata__", {}), what)
    entries = checked(_ENTRIES, header, what)
    if unsupported := sorted({entry.dtype for entry in entries.values()} - set(DTYPES)):
        shown = ", ".join(code[:20] for code in unsupported[:8])
        raise ModelError(f"{file} stores {shown}; supported are {', '.join(DTYPES)}; convert it first")
    found, start, data = {}, 0, 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        tensor = found[name] = StoredTensor(tuple(entry.shape), DTYPES[entry.dtype], file, data + start)
        end = start + tensor.nbytes
        if entry.data_offsets != [start, end]:
            raise ModelError(
                f"{file} is corrupt: {name[:200]} {entry.shape} {entry.dtype} needs bytes {start} to {end}, its "
                f"header says {entry.data_offsets}; download it again"
            )
        start = end
    if data + start != size:
        state = "truncated" if data + start > size else "corrupt (too long)"
        raise ModelError(
            f"{file} is {state}: its header describes {data + start} bytes, it has {size}; download it again"
        )
    return {name: found[name] for name in entries}


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray | UnreadTensor]) -> None:
    """Write a safetensors file, with dtypes of `DTYPES`; an `UnreadTensor` is read when it is written."""
    # What transformers expects.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
