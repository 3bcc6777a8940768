"""Writing GGUF files with the `gguf` package: their metadata, and tensors in the format's storage types.

A tensor is copied from another GGUF file as stored there, or packed with its own scales if it is on a grid, or rounded
to a type.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType
from gguf.quants import quantize
from jaxtyping import Float

from sparseopt.layers.bits import Bits, multiples_of
from sparseopt.models.files.gguf.architectures import architecture_of
from sparseopt.models.files.gguf.header import GGUFTensor, Value, bytes_as, text
from sparseopt.models.files.gguf.reader import GGUFSource
from sparseopt.models.files.gguf.vocabulary import tokenizer_values
from sparseopt.models.files.in_memory import IN_MEMORY
from sparseopt.models.files.source import Source

# The types of grids, and for GGUF's other types the grid without an offset of the same or the next larger width.
KINDS = {"q4_0": Kind.Q4_0, "q5_0": Kind.Q5_0, "q8_0": Kind.Q8_0}
SAME_WIDTH = {
    **dict.fromkeys((Kind.Q2_K, Kind.Q3_K, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.IQ4_NL, Kind.IQ4_XS), "q4_0"),
    **dict.fromkeys((Kind.Q5_0, Kind.Q5_1, Kind.Q5_K), "q5_0"),
    **dict.fromkeys((Kind.Q6_K, Kind.Q8_0, Kind.Q8_K), "q8_0"),
}
FLOATS = {np.dtype(np.float32): Kind.F32, np.dtype(np.float16): Kind.F16, np.dtype(ml_dtypes.bfloat16): Kind.BF16}
# The version of GGUF's quantised types.
QUANTISATION = 2
# These describe the file that was read, not the one to write: its parts, types of tensors and places of data.
_OF_THE_FILE = ("split.", "quantize.imatrix.")
_OF_THE_TENSORS = ("general.file_type", "general.quantization_version", "general.alignment")
# Wrong for a smaller model.
_OF_THE_SIZE = ("general.size_label", "general.parameter_count")
# Metadata that the writer sets itself.
_OWN = ("general.architecture", "general.file_type", "general.quantization_version")


class Encoded(NamedTuple):
    """A tensor as stored: its type, its shape, and its bytes in pieces."""

    kind: Kind
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return bytes_as(self.kind, self.shape)


def copied(tensor: GGUFTensor) -> Encoded:
    """A tensor as another file stores it, byte for byte."""
    return Encoded(tensor.kind, tensor.shape, tensor.raw)


def rounded(pieces: Callable[[], Iterable[np.ndarray]], kind: Kind, shape: tuple[int, ...]) -> Encoded:
    """Round values, in pieces along their first axis, to a type."""
    return Encoded(kind, shape, lambda: (quantize(piece.astype(np.float32), kind) for piece in pieces()))


def on_grid(weight: Float[np.ndarray, "out in"], bits: Bits) -> Encoded:
    """Store a weight on a grid exactly; a ValueError if it is on none."""
    kind = KINDS[bits.name]
    multiples, scales = multiples_of(weight, bits)
    # A block: its scale, and 32 multiples.
    whole = multiples.reshape(-1, 32)
    parts: list[np.ndarray] = [scales.reshape(-1, 1).view(np.uint8)]
    if kind == Kind.Q8_0:
        parts.append(whole.view(np.uint8))
    else:
        # Half-bytes of the first and of the last 16; the fifth bits of all 32 come before them.
        above = (whole - np.int8(bits.low)).astype(np.uint8)
        if kind == Kind.Q5_0:
            parts.append(np.packbits(above >> 4, axis=1, bitorder="little"))
        parts.append((above[:, :16] & 15) | (above[:, 16:] & 15) << 4)
    blocks = np.concatenate(parts, axis=1)
    return Encoded(kind, weight.shape, lambda: [blocks])


def write_gguf(file: Path, metadata: Mapping[str, Value], tensors: Mapping[str, Encoded]) -> None:
    """Write a file with this metadata and these tensors, by GGUF name."""
    writer = GGUFWriter(file, metadata["general.architecture"].value)
    for key, value in metadata.items():
        # The package rejects empty arrays.
        if key not in _OWN and value.value != []:
            writer.add_key_value(key, value.value, value.kind, value.item)
    writer.add_file_type(_file_type(tensors))
    writer.add_quantization_version(QUANTISATION)
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (stream,) = list(writer.fout or ())
        writer.write_padding(stream, stream.tell())
        for tensor in tensors.values():
            for piece in tensor.pieces():
                stream.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            writer.write_padding(stream, tensor.nbytes)
    finally:
        # Also if opening failed.
        for each in writer.fout or ():
            each.close()


def _file_type(tensors: Mapping[str, Encoded]) -> LlamaFileType:
    """The most common type among matrices, which programs show."""
    sizes: dict[Kind, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.kind] = sizes.get(tensor.kind, 0) + math.prod(tensor.shape)
    kind = max(sizes, key=lambda each: sizes[each], default=Kind.F32)
    names = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M", "Q3_K": "MOSTLY_Q3_K_M"}
    name = names.get(kind.name, f"MOSTLY_{kind.name}")
    return LlamaFileType[name] if name in LlamaFileType.__members__ else LlamaFileType.GUESSED


def metadata_of(source: Source, config: Mapping[str, Any]) -> dict[str, Value]:
    """The metadata of a file for the model with this configuration, by key.

    Metadata of a GGUF source are kept with their types, and differing fields of the architecture replace them. Other
    sources provide the name, the architecture and the tokenizer, if the model has one. The writer adds
    `general.file_type`, `general.quantization_version` and `general.alignment`.

    Args:
        source: the model to write, or the dense one from which a smaller model is made.
        config: the Hugging Face configuration of the model to write.

    Raises:
        ModelError: if GGUF cannot describe the configuration or the tokenizer.
    """
    name, architecture = architecture_of(config)
    fields = {f"{name}.{key}": value for key, value in architecture.write_config(config).items()}
    if isinstance(source, GGUFSource):
        before = {f"{name}.{key}": value for key, value in architecture.write_config(source.config).items()}
        kept = {
            key: value
            for key, value in source.values.items()
            if not key.startswith(_OF_THE_FILE) and key not in _OF_THE_TENSORS
        }
        return kept if fields == before else _resized(kept, before, fields)
    return {
        "general.architecture": text(name),
        "general.name": text(_short_name(source)),
        **fields,
        **tokenizer_values(source, config, name),
    }


def _resized(kept: dict[str, Value], before: dict[str, Value], fields: dict[str, Value]) -> dict[str, Value]:
    """The metadata of a GGUF file with the fields of a smaller model."""
    prefix = next(iter(fields)).partition(".")[0] + "."
    # A list has an entry for each of the original blocks.
    stale = [key for key, (value, *_) in kept.items() if key.startswith(prefix) and isinstance(value, list)]
    gone = {*stale, *_OF_THE_SIZE, *(before.keys() - fields.keys())}
    kept = {key: value for key, value in kept.items() if key not in gone}
    # What followed from the old fields need not follow from the new ones, so every field is written.
    return kept | {key: value for key, value in fields.items() if key not in kept or before.get(key) != value}


def _short_name(source: Source) -> str:
    """The last component of a folder's path or of a name on the hub, without its revision."""
    path = PurePath(source.name.removesuffix(IN_MEMORY).rstrip("/"))
    return path.name.partition("@")[0] if source.revision else path.name or source.path.resolve().name
