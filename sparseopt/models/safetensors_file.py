"""Floor 5: safetensors files: a header checked against the file's size, tensors read one by one, safe writes.

Layout: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, the data.
Files are read without mapping them, so that resident memory holds one tensor and not the file.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sparseopt.models.errors import ModelError

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

# What a model may be written in.
WRITABLE = tuple(DTYPES[code] for code in ("F32", "F16", "BF16", "F64"))

# The format's own limit on a header, in bytes.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, first byte, shape and dtype."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, copied from the file.

        Raises:
            ModelError: if the file has shrunk since its header was checked.
        """
        count = math.prod(self.shape)
        flat = np.fromfile(self.file, self.dtype, count, offset=self.start)
        if flat.size != count:
            raise ModelError(f"{self.file} became shorter while it was read; copy it again")
        return flat.reshape(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file by name, nothing but the header read.

    Raises:
        ModelError: if the file is truncated, or its header is no JSON, does not describe its data byte by
            byte, or names a dtype that is not supported.
    """
    size = file.stat().st_size
    raw = _read_raw_header(file, size)
    length = len(raw)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        codes = {name: str(entry["dtype"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} has a corrupt header ({error}); download it again") from error

    unsupported = sorted({codes[name] for name in codes} - set(DTYPES))
    if unsupported:
        raise ModelError(f"{file} stores {', '.join(unsupported)}; supported are {', '.join(DTYPES)}; convert it first")
    expected_start, data = 0, 8 + length
    for name, span in sorted(spans.items(), key=lambda item: item[1]):
        nbytes = math.prod(shapes[name]) * DTYPES[codes[name]].itemsize
        if span != (expected_start, expected_start + nbytes):
            raise ModelError(
                f"{file} is corrupt: {name} {list(shapes[name])} {codes[name]} needs bytes {expected_start} "
                f"to {expected_start + nbytes}, its header says {list(span)}; download it again"
            )
        expected_start = span[1]
    if data + expected_start != size:
        state = "truncated" if data + expected_start > size else "corrupt (too long)"
        raise ModelError(
            f"{file} is {state}: its header describes {data + expected_start} bytes, it has {size}; download it again"
        )
    return {name: StoredTensor(file, data + spans[name][0], shapes[name], DTYPES[codes[name]]) for name in entries}


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors, by name; none is an empty dictionary.

    Raises:
        ModelError: if the file is truncated, or its header or these texts are not what the format allows.
    """
    try:
        metadata = json.loads(_read_raw_header(file, file.stat().st_size)).get("__metadata__", {})
        if all(isinstance(text, str) for text in metadata.values()):
            return metadata
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} has a corrupt header ({error}); download it again") from error
    raise ModelError(f"{file} has a corrupt header (metadata that is no text); download it again")


def _read_raw_header(file: Path, size: int) -> bytes:
    """The header's JSON text of a file of so many bytes."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ModelError(
                f"{file} is truncated or no safetensors file: it has {size} bytes and claims a header of "
                f"{length}; download it again"
            )
        return stream.read(length)


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file and wait until the disk has it. The caller renames it into place.

    Args:
        file: where to.
        tensors: arrays by name, in dtypes of `DTYPES`.
        metadata: texts for the header; None for those of a file that transformers loads.

    Raises:
        OSError: as the system reports it, a full disk for instance.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    # Widest dtype first, so that every tensor starts at a multiple of its item size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    start = 0
    for name, tensor in ordered.items():
        end = start + tensor.nbytes
        code = _CODES[tensor.dtype]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in ordered.values():
            stream.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
