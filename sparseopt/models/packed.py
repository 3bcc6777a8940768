"""Floor 5: tensors with many zeros stored without loss as a bitmask and the values that are kept.

    bitmask  uint8 [ceil(n / 8)]   bit i, the highest of a byte first: whether entry i of the tensor in C order is kept
    values   [number kept]         the kept entries in that order, in the tensor's dtype

A tensor of n entries of b bytes, a fraction s of them zero, takes n (1 / 8 + (1 - s) b) bytes instead of n b: at half
zeros 0.5625 of a 16-bit tensor. An entry is left out when all its bits are zero. A negative zero has its sign bit set
and is kept, so every bit of the tensor is restored.

In a safetensors file the two halves are called NAME.bitmask and NAME.values; the header's metadata hold the format,
its version, and the dense shapes as JSON. A tensor that would not become smaller is stored unchanged.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparseopt.models.errors import ModelError
from sparseopt.models.folder import file_in, parse_json
from sparseopt.models.safetensors_file import StoredTensor, is_shape, read_header, read_metadata

# Not the names of a dense folder: a packed one read as dense would be a wrong model.
PACKED_INDEX = "model.packed.index.json"
PACKED_PREFIX = "packed-"

FORMAT = "sparseopt-packed"
VERSION = "1"
BITMASK, VALUES = ".bitmask", ".values"


@dataclass(frozen=True)
class Packed:
    """One packed array: the two halves and its dense shape."""

    bitmask: np.ndarray
    values: np.ndarray
    shape: tuple[int, ...]


def packed_nbytes(array: np.ndarray) -> int:
    """Bytes of an array's bitmask and kept values."""
    kept = np.count_nonzero(_bits(np.ascontiguousarray(array)))
    return -(-array.size // 8) + int(kept) * array.itemsize


def pack_array(array: np.ndarray) -> Packed:
    """An array of any shape as a bitmask and the entries with any bit set."""
    flat = np.ascontiguousarray(array).reshape(-1)
    kept = _bits(flat) != 0
    return Packed(np.packbits(kept), flat[kept], array.shape)


def unpack_array(packed: Packed) -> np.ndarray:
    """The dense array: `unpack_array(pack_array(x))` is identical to `x`."""
    size, ones = math.prod(packed.shape), int(np.bitwise_count(packed.bitmask).sum())
    if packed.bitmask.size != -(-size // 8):
        raise ModelError(
            f"the bitmask has {packed.bitmask.size} bytes, the shape {list(packed.shape)} needs {-(-size // 8)}"
        )
    kept = np.unpackbits(packed.bitmask, count=size).view(np.bool_)
    if ones != packed.values.size:
        raise ModelError(f"the bitmask has {ones} ones and there are {packed.values.size} values")
    if ones != np.count_nonzero(kept):
        raise ModelError("the bitmask has ones after its last entry")
    dense = np.zeros(size, packed.values.dtype)
    _bits(dense)[kept] = _bits(packed.values)
    return dense.reshape(packed.shape)


@dataclass(frozen=True)
class PackedTensor:
    """Where a packed tensor is stored, with its dense name and shape."""

    name: str
    shape: tuple[int, ...]
    bitmask: StoredTensor
    values: StoredTensor

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def read(self) -> np.ndarray:
        """The dense tensor; a `ModelError` if bitmask and values do not match."""
        packed = Packed(self.bitmask.read(), self.values.read(), self.shape)
        try:
            return unpack_array(packed)
        except ModelError as error:
            raise ModelError(f"{self.name} in {self.values.file} is corrupt: {error}; copy the file again") from error


def pack_tensors(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors to store, packed where that is smaller, and the metadata of the file."""
    stored: dict[str, np.ndarray] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if name.endswith((BITMASK, VALUES)):
            raise ModelError(f"a tensor called {name} cannot be packed: {BITMASK} and {VALUES} are reserved endings")
        if packed_nbytes(tensor) < tensor.nbytes:
            packed = pack_array(tensor)
            stored |= {name + BITMASK: packed.bitmask, name + VALUES: packed.values}
            shapes[name] = list(packed.shape)
        else:
            stored[name] = tensor
    return stored, {"format": FORMAT, "version": VERSION, "shapes": json.dumps(shapes)}


def read_packed_header(file: Path) -> dict[str, StoredTensor | PackedTensor]:
    """All tensors of a packed file by their dense names; only the header is read.

    A bitmask is compared with its values when its tensor is read.

    Raises:
        ModelError: as `read_header` does; if the file is not packed, or by another version; listing every half
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
        halves = [entries.pop(name + ending, None) for ending in (BITMASK, VALUES)]
        bitmask, values = halves
        if bitmask is None or values is None:
            lacking = [name + ending for ending, half in zip((BITMASK, VALUES), halves, strict=True) if half is None]
            problems.append(f"missing: {', '.join(lacking)}")
            continue
        if name in entries:
            problems.append(f"{name} is stored dense and packed")
        problems += _half_problems(name, shape, bitmask, values)
        tensors[name] = PackedTensor(name, shape, bitmask, values)
    for name, entry in entries.items():
        if name.endswith((BITMASK, VALUES)):
            problems.append(f"{name} belongs to no tensor with a shape in the metadata")
        tensors.setdefault(name, entry)
    if problems:
        raise ModelError(
            f"{file} is corrupt ({len(problems)} problems); copy it again or pack the model again:\n  "
            + "\n  ".join(problems)
        )
    return tensors


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a whole packed model."""
    return file_in(folder, PACKED_INDEX).is_file()


def _read_shapes(file: Path, text: str | None) -> dict[str, tuple[int, ...]]:
    reason = "an impossible shape"
    try:
        shapes = parse_json((text or "").encode())
        if isinstance(shapes, dict) and all(map(is_shape, shapes.values())):
            return {name: tuple(shape) for name, shape in shapes.items()}
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ModelError(f"{file} has no table of dense shapes in its metadata ({reason}); copy it again")


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
