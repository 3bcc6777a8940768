"""Lossless storage of tensors with many zeros, as a bitmask and the kept values.

    bitmask  uint8 [ceil(n / 8)]   bit i, the highest of a byte first: whether entry i of the tensor in C order is kept
    values   [number kept]         the kept entries in that order, in the tensor's dtype

A tensor of n entries of b bytes, a fraction s of them zero, needs n (1 / 8 + (1 - s) b) bytes instead of n b: with half
of the entries zero, 0.5625 of a 16-bit tensor. An entry is left out if all its bits are zero. A negative zero has its
sign bit set and is kept, so every bit of the tensor is restored.

In a safetensors file the two halves are called NAME.bitmask and NAME.values; the header's metadata hold the format,
its version, and the dense shapes as JSON. A tensor that would not become smaller is stored unchanged.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from sparseopt.models.base.errors import ModelError, bulleted, checked, guarded
from sparseopt.models.files.folder import file_in, parse_json
from sparseopt.models.files.safetensors import Shape, StoredTensor, TensorInfo, read_header, read_metadata

# Not the names of a dense folder: a packed folder read as dense would be a wrong model.
PACKED_INDEX = "model.packed.index.json"
PACKED_PREFIX = "packed-"

FORMAT = "sparseopt-packed"
VERSION = "1"
BITMASK, VALUES = ".bitmask", ".values"
_SHAPES = TypeAdapter(dict[str, Shape])


def packed_nbytes(array: np.ndarray) -> int:
    """Bytes of an array's bitmask and values."""
    kept = np.count_nonzero(_bits(np.ascontiguousarray(array)))
    return -(-array.size // 8) + int(kept) * array.itemsize


def pack_array(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An array of any shape as a bitmask and the entries with any bit set."""
    flat = np.ascontiguousarray(array).reshape(-1)
    kept = _bits(flat) != 0
    return np.packbits(kept), flat[kept]


def unpack_array(bitmask: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The dense array: `unpack_array(*pack_array(x), x.shape)` is identical to `x`."""
    size, ones = math.prod(shape), int(np.bitwise_count(bitmask).sum())
    if bitmask.size != -(-size // 8):
        raise ModelError(f"the bitmask has {bitmask.size} bytes, the shape {list(shape)} needs {-(-size // 8)}")
    kept = np.unpackbits(bitmask, count=size).view(np.bool_)
    if ones != values.size:
        raise ModelError(f"the bitmask has {ones} ones and there are {values.size} values")
    if ones != np.count_nonzero(kept):
        raise ModelError("the bitmask has ones after its last entry")
    dense = np.zeros(size, values.dtype)
    _bits(dense)[kept] = _bits(values)
    return dense.reshape(shape)


@dataclass(frozen=True)
class PackedTensor(TensorInfo):
    """The place of a packed tensor, with its dense name and shape."""

    name: str
    bitmask: StoredTensor
    values: StoredTensor

    def read(self) -> np.ndarray:
        """The dense tensor; a `ModelError` if bitmask and values do not match."""
        bitmask, values = self.bitmask.read(), self.values.read()
        try:
            return unpack_array(bitmask, values, self.shape)
        except ModelError as error:
            raise ModelError(f"{self.name} in {self.values.file} is corrupt: {error}; copy the file again") from error

    def pieces(self) -> Iterator[np.ndarray]:
        yield self.read()


def pack_tensors(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors to store, packed where that is smaller, and the metadata of the file."""
    stored: dict[str, np.ndarray] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if name.endswith((BITMASK, VALUES)):
            raise ModelError(f"a tensor called {name} cannot be packed: {BITMASK} and {VALUES} are reserved endings")
        if packed_nbytes(tensor) < tensor.nbytes:
            stored[name + BITMASK], stored[name + VALUES] = pack_array(tensor)
            shapes[name] = list(tensor.shape)
        else:
            stored[name] = tensor
    return stored, {"format": FORMAT, "version": VERSION, "shapes": json.dumps(shapes)}


def read_packed_header(file: Path) -> dict[str, StoredTensor | PackedTensor]:
    """All tensors of a packed file by dense name; bitmasks are compared with values when read.

    Raises:
        ModelError: as for `read_header`; if the file is not packed, or packed by another version; listing every half
            that is missing, misshapen or without a dense shape.
    """
    metadata, entries = read_metadata(file), read_header(file)
    found = metadata.get("format")
    if found != FORMAT:
        raise ModelError(f"{file} is not packed: its format is {found!r}, expected {FORMAT!r}; pack the model again")
    if metadata.get("version") != VERSION:
        raise ModelError(
            f"{file} is packed in version {metadata.get('version')!r} of the format, this sparseopt reads "
            f"{VERSION!r}; install the version that wrote it"
        )
    shapes = _read_shapes(file, metadata.get("shapes"))
    problems: list[str] = []
    tensors: dict[str, StoredTensor | PackedTensor] = {}
    for name, shape in shapes.items():
        bitmask, values = entries.pop(name + BITMASK, None), entries.pop(name + VALUES, None)
        if bitmask is None or values is None:
            lacking = [name + ending for ending, half in ((BITMASK, bitmask), (VALUES, values)) if half is None]
            problems.append(f"missing: {', '.join(lacking)}")
            continue
        if name in entries:
            problems.append(f"{name} is stored dense and packed")
        problems += _half_problems(name, shape, bitmask, values)
        tensors[name] = PackedTensor(shape, values.dtype, name, bitmask, values)
    for name, entry in entries.items():
        if name.endswith((BITMASK, VALUES)):
            problems.append(f"{name} belongs to no tensor with a shape in the metadata")
        tensors.setdefault(name, entry)
    if problems:
        raise ModelError(
            f"{file} is corrupt ({len(problems)} problems); copy it again or pack the model again:" + bulleted(problems)
        )
    return tensors


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a whole packed model."""
    return file_in(folder, PACKED_INDEX).is_file()


def _read_shapes(file: Path, text: str | None) -> dict[str, tuple[int, ...]]:
    what, advice = f"{file} has no table of dense shapes in its metadata", "; copy it again"
    given = guarded(lambda: parse_json((text or "").encode()), what, advice)
    return {name: tuple(shape) for name, shape in checked(_SHAPES, given, what, advice).items()}


def _half_problems(name: str, shape: tuple[int, ...], bitmask: StoredTensor, values: StoredTensor) -> list[str]:
    problems, size = [], math.prod(shape)
    if bitmask.dtype != np.uint8 or bitmask.shape != (-(-size // 8),):
        problems.append(
            f"{name}{BITMASK} is {bitmask.dtype} {list(bitmask.shape)}, the shape {list(shape)} needs "
            f"uint8 [{-(-size // 8)}]"
        )
    if len(values.shape) != 1 or values.shape[0] > size:
        problems.append(f"{name}{VALUES} is {list(values.shape)}, expected one axis of at most {size}")
    return problems


def _bits(array: np.ndarray) -> np.ndarray:
    """A contiguous array's bit patterns as unsigned integers, in the same memory."""
    return array.view(f"u{array.itemsize}")
