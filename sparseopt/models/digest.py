"""Floor 5: the digest of a model's weights, by which a run recognises its source."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


class Digest:
    """A digest of a configuration and of tensors added one by one: names, shapes, dtypes and bytes."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self._hash = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)

    def add(self, name: str, value: np.ndarray) -> None:
        self.add_pieces(name, value.shape, value.dtype, [value])

    def add_pieces(self, name: str, shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray]) -> None:
        """Add a tensor in pieces along its first axis; the digest is that of the whole."""
        self._hash.update(f"{name} {dtype.name} {shape}".encode())
        for piece in pieces:
            self._hash.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)

    @property
    def text(self) -> str:
        """32 hexadecimal digits."""
        return self._hash.hexdigest()
