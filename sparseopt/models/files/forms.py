"""The forms in which a model is written: how a shard stores tensors, and which file completes the model.

    Form         safetensors, which transformers loads
    Compressed   layers of few bits, see `compressed`
    Joined       one GGUF file, of which every shard is a part, see `gguf.writer`

Reading returns the tensors that were given.
"""

import filecmp
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType

from sparseopt.layers.bits import Bits
from sparseopt.models.base.errors import ModelError, named
from sparseopt.models.files.compressed import compress_tensors, join_parts, quantization_config
from sparseopt.models.files.gguf.architectures import architecture_of
from sparseopt.models.files.gguf.base import Architecture
from sparseopt.models.files.gguf.header import GGUFTensor, Value, bytes_as
from sparseopt.models.files.gguf.header import read_header as read_gguf_header
from sparseopt.models.files.gguf.reader import GGUFSource
from sparseopt.models.files.gguf.shared import ROPE_FACTORS
from sparseopt.models.files.gguf.writer import (
    FLOATS,
    KINDS,
    Encoded,
    copied,
    metadata_of,
    on_grid,
    rounded,
    write_gguf,
)
from sparseopt.models.files.safetensors import TensorInfo, UnreadTensor, read_header, write_tensors
from sparseopt.models.files.source import FileTensor, Source

Readable = FileTensor | UnreadTensor


class Shard(NamedTuple):
    """A file to write: the bytes of its tensors as stored, and the function that writes it."""

    nbytes: int
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Form:
    """Safetensors, which transformers loads.

    Attributes:
        bits: the grid of every weight that is on one, by name.
    """

    bits: Mapping[str, Bits] = field(default_factory=dict)
    # How many copies of a tensor are on disk at the end.
    copies: ClassVar[int] = 1

    @property
    def last(self) -> str:
        """The path, in the model's folder, of the file that completes the model: its index."""
        return "model.safetensors.index.json"

    def file_name(self, tag: str) -> str:
        return f"model-{tag}.safetensors"

    def most_bytes(self, name: str, info: TensorInfo) -> int:
        """The largest possible size of a tensor as stored."""
        return info.nbytes

    def shard(self, tensors: Mapping[str, UnreadTensor]) -> Shard:
        return _safetensors(tensors)

    def read(self, file: Path) -> Mapping[str, Readable]:
        """The tensors of a shard by name; a ModelError if the file is not complete."""
        return read_header(file)

    def stored_bytes(self, file: Path) -> int:
        """The stored size of a shard's tensors."""
        return sum(tensor.nbytes for tensor in read_header(file).values())

    def config(self, config: dict[str, Any], linears: Collection[str]) -> dict[str, Any]:
        """The configuration to write; `linears` are the names of all matrices that may belong to a linear layer."""
        return config


class Compressed(Form):
    """Layers of few bits as stored by the compressed-tensors package, through which transformers loads them."""

    def most_bytes(self, name: str, info: TensorInfo) -> int:
        # 4 bytes for a scale, and rows filled up to whole numbers of 32 bits.
        return info.nbytes if name not in self.bits else info.nbytes // 4 + 8 * info.shape[0]

    def shard(self, tensors: Mapping[str, UnreadTensor]) -> Shard:
        on_grid = {name: tensor.read() for name, tensor in tensors.items() if name in self.bits}
        others = {name: tensor for name, tensor in tensors.items() if name not in on_grid}
        return _safetensors({**others, **compress_tensors(on_grid, self.bits)})

    def read(self, file: Path) -> Mapping[str, Readable]:
        return join_parts(file, read_header(file))

    def config(self, config: dict[str, Any], linears: Collection[str]) -> dict[str, Any]:
        # A tied head is not stored, and transformers puts parts beside the decoder, such as an image encoder, into
        # their own `model`.
        names = dict.fromkeys([*linears, "lm_head", *(f"model.{name}" for name in linears)])
        return {**config, "quantization_config": quantization_config(self.bits, names)}


@dataclass(frozen=True)
class Joined(Form):
    """One GGUF file, of which every shard is a part, itself a file in GGUF.

    A tensor that comes unchanged from a GGUF file is copied as stored there. Embedding and head are rounded to their
    own type, if there is one.

    Attributes:
        file: the path of the whole file.
        source: the dense model; provides metadata and tokenizer.
        model_config: the configuration of the model that is written.
        outer_bits: the grid of embedding and head; None leaves them unchanged.
    """

    # Copies in a shard and in the file.
    copies: ClassVar[int] = 2

    file: Path = field(kw_only=True)
    source: Source = field(kw_only=True)
    model_config: Mapping[str, Any] = field(kw_only=True)
    outer_bits: Bits | None = field(kw_only=True)

    @property
    def last(self) -> str:
        return str(self.file)

    def file_name(self, tag: str) -> str:
        return f"model-{tag}.gguf"

    def most_bytes(self, name: str, info: TensorInfo) -> int:
        return bytes_as(self._kind(name, info), info.shape)

    def shard(self, tensors: Mapping[str, UnreadTensor]) -> Shard:
        found = {self._architecture.gguf_name(name): self._encoded(name, tensor) for name, tensor in tensors.items()}
        # Without a tokenizer.
        metadata = {key: value for key, value in self._metadata.items() if not key.startswith("tokenizer.")}
        return self._written(found, metadata)

    def joined(self, shards: Iterable[Path]) -> Shard:
        """The whole file."""
        tensors = {name: copied(each) for file in shards for name, each in read_gguf_header(file).tensors.items()}
        if (factors := self._architecture.rope_factors(self.model_config)) is not None:
            tensors[ROPE_FACTORS] = rounded(lambda: [factors], GGMLQuantizationType.F32, factors.shape)
        shard = self._written(tensors, self._metadata)

        def write(file: Path) -> None:
            shard.write(file)
            # If a run was killed before its end was recorded, the file exists already.
            if self.file.exists() and not filecmp.cmp(file, self.file, shallow=False):
                raise ModelError(
                    f"{self.file} exists and is not of this run: move it, and start the same command again"
                )

        return Shard(shard.nbytes, write)

    def read(self, file: Path) -> Mapping[str, Readable]:
        found = GGUFSource(file)
        # A part has no tokenizer and few tensors, from which a configuration cannot be read.
        found.config = dict(self.model_config)
        return {
            name: UnreadTensor(each.shape, each.dtype, partial(found.pieces, name), each)
            for name, each in found.tensors.items()
        }

    def stored_bytes(self, file: Path) -> int:
        return sum(tensor.stored_bytes for tensor in read_gguf_header(file).tensors.values())

    def check(self, names: Iterable[str]) -> None:
        """Raise a ModelError if GGUF cannot describe a model with these tensors."""
        for name in names:
            self._architecture.gguf_name(name)
        assert self._metadata

    @cached_property
    def _architecture(self) -> Architecture:
        return architecture_of(self.model_config)[1]

    def _kind(self, name: str, info: TensorInfo) -> GGMLQuantizationType:
        """The storage type of a tensor."""
        if name in self.bits:
            return KINDS[self.bits[name].name]
        if len(info.shape) < 2:
            return GGMLQuantizationType.F32
        outer = self.outer_bits
        if outer is not None and self._is_outer(name) and info.shape[-1] % (outer.group or 1) == 0:
            return KINDS[outer.name]
        return FLOATS.get(info.dtype, GGMLQuantizationType.F32)

    def _is_outer(self, name: str) -> bool:
        return self._architecture.gguf_name(name) in ("token_embd.weight", "output.weight")

    def _encoded(self, name: str, tensor: UnreadTensor) -> Encoded:
        architecture, config, origin = self._architecture, self.model_config, tensor.origin
        rounds = self.outer_bits is not None and self._is_outer(name)
        if (
            isinstance(origin, GGUFTensor)
            and not rounds
            and (origin.quantised or self._kind(name, tensor) == origin.kind)
        ):
            return copied(origin)
        if name in self.bits:
            return on_grid(architecture.redo(name, tensor.read(), config), self.bits[name])

        def pieces() -> Iterable[np.ndarray]:
            for each in [tensor.read()] if architecture.moves_rows(name) else tensor.pieces():
                if self.outer_bits is not None and rounds:
                    named(name, partial(self.outer_bits.check_weight, each))
                yield architecture.redo(name, each, config)

        return rounded(pieces, self._kind(name, tensor), tensor.shape)

    @cached_property
    def _metadata(self) -> Mapping[str, Value]:
        return metadata_of(self.source, self.model_config)

    def _written(self, tensors: Mapping[str, Encoded], metadata: Mapping[str, Value]) -> Shard:
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        return Shard(nbytes, lambda file: write_gguf(file, metadata, tensors))


def _safetensors(tensors: Mapping[str, np.ndarray | UnreadTensor]) -> Shard:
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Shard(nbytes, lambda file: write_tensors(file, tensors))
