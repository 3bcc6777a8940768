"""GGUF files: header, metadata and tensor table, every length checked against the file's size.

Layout (version 2 and 3, little-endian): magic, version, counts; metadata as (key, type, value); the tensor table as
(name, sizes fastest axis first, type, offset); the data, aligned. The `gguf` package decodes quantised blocks.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from jaxtyping import Int

from sparseopt.models.base.errors import ModelError
from sparseopt.models.base.fields import shown
from sparseopt.models.files.safetensors import StoredTensor, is_shape, picked_rows, read_part

# Metadata value types 0 to 12 other than strings and arrays.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY
# Depth of nested arrays: the format allows them, but no writer makes any.
_MAX_DEPTH = 4
# ggml has four axes.
_MAX_AXES = 4

_PLAIN = {
    GGMLQuantizationType.F64: np.dtype(np.float64),
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


def bytes_as(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a type."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


@dataclass(frozen=True)
class GGUFTensor(StoredTensor):
    """The place of a tensor and its storage type; a quantised tensor is read as float32."""

    kind: GGMLQuantizationType

    @property
    def quantised(self) -> bool:
        return self.kind not in _PLAIN

    @property
    def stored_bytes(self) -> int:
        return bytes_as(self.kind, self.shape)

    def raw(self) -> Iterator[np.ndarray]:
        """The bytes of the tensor as stored, in pieces along its first axis."""
        for piece in self.slices():
            part = read_part(self.file, np.dtype(np.uint8), piece.stored_bytes, piece.start)
            yield part.reshape(*piece.shape[:-1], -1)

    def read(self) -> np.ndarray:
        """The tensor; a quantised tensor is read piece by piece, since dequantising needs several times its memory."""
        if not self.quantised:
            return super().read()
        found, first = np.empty(self.shape, self.dtype), 0
        for piece in self.slices():
            raw = read_part(self.file, np.dtype(np.uint8), piece.stored_bytes, piece.start)
            try:
                found[first : first + piece.shape[0]] = dequantize(raw, self.kind).reshape(piece.shape)
            except NotImplementedError as error:
                kind = self.kind.name
                raise ModelError(f"{self.file} has a tensor of type {kind}, which is not supported") from error
            first += piece.shape[0]
        return found


@dataclass(frozen=True, eq=False)
class PickedTensor(GGUFTensor):
    """Some rows, ascending, of the tensor that the other fields place, which has more."""

    rows: Int[np.ndarray, "rows"]
    whole: GGUFTensor

    def raw(self) -> Iterator[np.ndarray]:
        return picked_rows(self.whole.raw(), self.rows)

    def pieces(self) -> Iterator[np.ndarray]:
        return picked_rows(self.whole.pieces(), self.rows)

    def read(self) -> np.ndarray:
        return np.concatenate(list(self.pieces()))


class Value(NamedTuple):
    """A value of the metadata with its type and, for an array, the type of its items."""

    value: Any
    kind: GGUFValueType
    item: GGUFValueType | None = None


def count(value: int) -> Value:
    """A whole number, as converters store it."""
    return Value(value, GGUFValueType.UINT32)


def number(value: float) -> Value:
    """A real number, as converters store it."""
    return Value(float(value), GGUFValueType.FLOAT32)


def flag(value: bool) -> Value:
    """A truth value."""
    return Value(value, GGUFValueType.BOOL)


def text(value: str) -> Value:
    """A string."""
    return Value(value, GGUFValueType.STRING)


class GGUFHeader(NamedTuple):
    """A file's metadata by key and its tensors by GGUF name."""

    values: dict[str, Value]
    tensors: dict[str, GGUFTensor]

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata without types."""
        return {key: value for key, (value, *_) in self.values.items()}


class _Reader:
    """Reads little-endian values, never past the end of the file."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self.stream, self.file, self.size = stream, file, file.stat().st_size

    def corrupt(self, what: str) -> ModelError:
        return ModelError(f"{self.file} is truncated or corrupt: {what}; download it again")

    def take(self, count: int) -> bytes:
        position = self.stream.tell()
        if count > self.size - position:
            raise self.corrupt(f"{count} bytes wanted at byte {position}, the file has {self.size}")
        return self.stream.read(count)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.corrupt(f"a string before byte {self.stream.tell()} is not UTF-8") from error

    def typed(self) -> Value:
        """The next type and its value."""
        kind, place = self.scalar("I"), self.stream.tell()
        item = self.scalar("I") if kind == _ARRAY else None
        self.stream.seek(place)
        value = self.value(kind)
        try:
            return Value(value, GGUFValueType(kind), None if item is None else GGUFValueType(item))
        except ValueError as error:
            raise self.corrupt(f"unknown metadata type {item} before byte {self.stream.tell()}") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            if depth == _MAX_DEPTH:
                raise self.corrupt(f"more than {depth} nested arrays before byte {self.stream.tell()}")
            item, count = self.scalar("I"), self.scalar("Q")
            if item in _SCALARS:
                width = struct.calcsize("<" + _SCALARS[item])
                return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(self.bounded(count, width))))
            self.bounded(count, 8)
            return [self.value(item, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.corrupt(f"unknown metadata type {kind} before byte {self.stream.tell()}")
        return self.scalar(_SCALARS[kind])

    def bounded(self, count: int, width: int) -> int:
        """The bytes of `count` items of at least `width` bytes, which must fit in the rest of the file."""
        if count * width > self.size - self.stream.tell():
            raise self.corrupt(f"{count} items claimed at byte {self.stream.tell()}, the file has {self.size} bytes")
        return count * width


def read_header(file: Path) -> GGUFHeader:
    """The metadata and tensor table of a GGUF file; no tensor is read.

    Raises:
        ModelError: if the file is not GGUF version 2 or 3, is truncated or corrupt, or has a tensor of an unknown type
            or outside the file.
    """
    with file.open("rb") as stream:
        reader = _Reader(stream, file)
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{file} is no GGUF file (it does not begin with 'GGUF'); check the path")
        version = reader.scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{file} is GGUF version {version}, little-endian 2 and 3 are supported; convert it again")
        num_tensors, num_values = reader.scalar("Q"), reader.scalar("Q")
        reader.bounded(num_tensors, 24)
        reader.bounded(num_values, 12)
        values: dict[str, Value] = {}
        for _ in range(num_values):
            key = reader.text()
            if key in values:
                raise reader.corrupt(f"the key {key[:200]} is given twice")
            values[key] = reader.typed()
        table = [_read_entry(reader) for _ in range(num_tensors)]
        alignment = values["general.alignment"].value if "general.alignment" in values else 32
        if type(alignment) is not int or not 1 <= alignment <= 2**20:
            raise reader.corrupt(f"general.alignment is {shown(alignment)}")
        data = -(-stream.tell() // alignment) * alignment
        float32 = np.dtype(np.float32)
        tensors = {
            name: GGUFTensor(shape, _PLAIN.get(kind, float32), file, data + offset, kind)
            for name, shape, kind, offset in table
        }
        if len(tensors) < len(table):
            raise reader.corrupt("a tensor's name is given twice")
        _check_places(reader, tensors)
    return GGUFHeader(values, tensors)


def _check_places(reader: _Reader, tensors: dict[str, GGUFTensor]) -> None:
    """Raise if tensors lie outside the file or overlap, which would make a model larger than its file."""
    free = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stored_bytes)):
        end = tensor.start + tensor.stored_bytes
        if end > reader.size:
            raise reader.corrupt(f"tensor {name[:200]} ends at byte {end} of {reader.size}")
        if tensor.start < free:
            raise reader.corrupt(f"tensor {name[:200]} begins at byte {tensor.start}, in the tensor before it")
        free = end


def _read_entry(reader: _Reader) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name, axes = reader.text(), reader.scalar("I")
    sizes = [reader.scalar("Q") for _ in range(axes)] if axes <= _MAX_AXES else []
    code, offset = reader.scalar("I"), reader.scalar("Q")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise reader.corrupt(f"tensor {name[:200]} has the unknown type {code}") from error
    if not sizes or not is_shape(sizes) or sizes[0] % GGML_QUANT_SIZES[kind][0]:
        raise reader.corrupt(f"tensor {name[:200]} of type {kind.name} has the sizes {sizes}")
    return name, tuple(reversed(sizes)), kind, offset
