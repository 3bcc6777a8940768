"""What a model must offer to be pruned: the names of its tensors, and which of them are weights of linear layers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from sparseopt.models.base.errors import ModelError
from sparseopt.models.files.in_memory import IN_MEMORY
from sparseopt.models.files.safetensors import TensorInfo
from sparseopt.models.files.source import Source


class PrunableModel(ABC):
    """An opened model with tensors by checkpoint name.

    `stored` and `weight_shape` use `[out, in]` for linear layers, whatever the layout of the files.

    Attributes:
        source: the files.
        config: its sizes, at least `vocab_size`, `hidden_size`, `num_layers` and `max_positions`.
        packages: the packages that run it.
    """

    source: Source
    config: Any
    packages: ClassVar[tuple[str, ...]]

    @property
    def num_blocks(self) -> int:
        return self.config.num_layers

    @abstractmethod
    def linear_keys(self) -> list[str]:
        """The checkpoint names of the weights of all linear layers in the blocks, in the model's order."""

    @abstractmethod
    def is_transposed(self, key: str) -> bool:
        """Whether a tensor is a layer's weight that the files store as `[in, out]`."""

    def exported_keys(self) -> list[str]:
        """The checkpoint names that an export holds."""
        return list(self.source.tensors)

    def weight_shape(self, key: str) -> tuple[int, int]:
        """`(out, in)` of a layer's weight."""
        rows, columns = self.source.tensors[key].shape
        return (columns, rows) if self.is_transposed(key) else (rows, columns)

    def stored(self, key: str) -> np.ndarray:
        """A tensor in its stored dtype."""
        return self.as_stored(key, self.source.read(key))

    def as_stored(self, key: str, value: np.ndarray) -> np.ndarray:
        """Convert a tensor from `[out, in]` to the layout of the files, or back, which is the same operation."""
        return value.T if self.is_transposed(key) else value

    def check_finite(self) -> str:
        """Read every tensor of an export once and return a digest of the bytes.

        Raises:
            ModelError: naming the first tensor that holds NaN or infinity.
        """
        tensors = self.source.tensors
        found = ((key, tensors[key], self._checked_pieces(key)) for key in self._keys_to_check())
        return digest(found, self.source.config)

    def _keys_to_check(self) -> Collection[str]:
        return self.exported_keys()

    def _checked_pieces(self, key: str) -> Iterator[np.ndarray]:
        """The `pieces` of a tensor in its source, checked."""
        for piece in self.source.pieces(key):
            self._check_values(key, piece)
            yield piece

    def _check_values(self, key: str, value: np.ndarray) -> None:
        bad = value.size - np.count_nonzero(np.isfinite(value))
        if bad:
            what, source = f"holds {bad} NaN or infinite values", self.source
            if source.name.endswith(IN_MEMORY):
                raise ModelError(f"{key} of {source.name} {what}; load the model again")
            raise ModelError(f"{key} in {source.path} {what}; download it again")


def digest(
    tensors: Iterable[tuple[str, TensorInfo | np.ndarray, Iterable[np.ndarray]]],
    config: Mapping[str, Any] | None = None,
) -> str:
    """32 hexadecimal digits of a configuration and of named tensors in pieces along their first axis."""
    state = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, info, pieces in tensors:
        state.update(f"{name} {info.dtype.name} {info.shape}".encode())
        for piece in pieces:
            state.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def check_count(source: Source, count: int, what: str) -> None:
    """Raise if there are more blocks or experts than tensors in the files, before memory is allocated for them."""
    if count > len(source.tensors):
        raise ModelError(
            f"{source.path} holds {len(source.tensors)} tensors, its configuration asks for {count} {what}; check that "
            "configuration and weights belong together"
        )
