"""Activations between blocks: equal batches `[windows, T, D]`, in memory, on disk, or over several devices.

`Batches` is the interface and keeps its batches in memory; no other file knows how else they are stored. A block's
outputs are stored like its inputs, see `Batches.empty`.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sparseopt.core.base.mesh import on_device, over, put, whole
from sparseopt.models import StreamedModel
from sparseopt.system.files import write_all

# Tokens in a batch: enough for the matrix products to reach their rate, few enough to stay in cache.
BATCH_TOKENS = 2048
# Bytes of activations held at once when a model is only scored; more windows need another pass over its blocks.
PASS_BYTES = 2**28

Embedding = Callable[[Array], Array]


class Batches:
    """Equal batches, in order, in memory.

    Attributes:
        mesh: the devices that the windows of each batch are spread over; None for one device.
    """

    mesh: Mesh | None = None

    def __init__(self, batches: Iterable[Array] = ()) -> None:
        self._kept = list(batches)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Array:
        return self._kept[index]

    def __iter__(self) -> Iterator[Array]:
        return (self[index] for index in range(len(self)))

    def append(self, batch: Array) -> None:
        self._kept.append(batch)

    @property
    def shapes(self) -> list[list[int]]:
        """The shape of each batch; nothing is read from disk."""
        return [list(batch.shape) for batch in self._kept]

    @property
    def windows(self) -> int:
        return sum(shape[0] for shape in self.shapes)

    def empty(self) -> "Batches":
        """A new empty collection that stores batches where these are stored."""
        return Batches()

    def counted(self, index: int) -> Bool[Array, "windows"] | None:
        """Which windows of a batch count; None for all."""
        del index
        return None

    def first(self, count: int) -> "Batches":
        """The first windows on one device; all if there are fewer."""
        taken: list[np.ndarray] = []
        count = min(count, self.windows)
        for batch in self:
            if sum(map(len, taken)) >= count:
                break
            taken.append(np.asarray(batch) if self.mesh is None else whole(batch))
        found = self.empty() if self.mesh is None else Batches()
        return _split(np.concatenate(taken)[:count], found) if taken else found

    def on_one_device(self) -> "Batches":
        return self if self.mesh is None else self.first(self.windows)

    def embed(self, embedding: Embedding, tokens: Int[np.ndarray, "windows T"]) -> "Batches":
        """Windows of token ids, embedded batch by batch and stored where these batches are."""
        return _split(tokens, self.empty(), embedding) if len(tokens) else self.empty()


class DiskBatches(Batches):
    """Batches in one file on disk; each is in memory only while it is used, with identical values."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Opened without a name: no file is left, not even after SIGKILL.
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._count = 0
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.float32)

    def append(self, batch: Array) -> None:
        values = np.ascontiguousarray(batch)
        if not self._count:
            self._shape, self._dtype = values.shape, values.dtype
        if (values.shape, values.dtype) != (self._shape, self._dtype):
            raise ValueError(f"a batch of {values.dtype} {values.shape} among those of {self._dtype} {self._shape}")
        try:
            self._file.seek(self._count * values.nbytes)
            write_all(self._file, values.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: activations of {values.nbytes:,} bytes could not be written in {self._folder}, "
                f"after {self._count * values.nbytes:,} of the same stream; make room and start the same run again",
            ) from error
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Array:
        if not 0 <= index < self._count:
            raise IndexError(f"batch {index} of {self._count}")
        size = math.prod(self._shape)
        self._file.seek(index * size * self._dtype.itemsize)
        values = np.fromfile(self._file, self._dtype, size)
        if len(values) < size:
            raise OSError(f"activations in {self._folder} became shorter; start the same run again")
        return on_device(values.reshape(self._shape))

    @property
    def shapes(self) -> list[list[int]]:
        return [list(self._shape)] * self._count

    def empty(self) -> "DiskBatches":
        return DiskBatches(self._folder)


class SpreadBatches(Batches):
    """Batches that are cut by window over the devices of a mesh; each device runs a block on its own windows.

    The last batch is filled with copies of the first window, so that it needs no program of its own.
    They count nowhere.
    """

    def __init__(self, mesh: Mesh, windows: int = 0) -> None:
        super().__init__()
        self.mesh: Mesh = mesh
        self._windows = windows

    @property
    def windows(self) -> int:
        return self._windows

    def empty(self) -> "SpreadBatches":
        return SpreadBatches(self.mesh, self._windows)

    def counted(self, index: int) -> Bool[Array, "windows"]:
        size = len(self[index])
        return put(np.arange(index * size, (index + 1) * size) < self._windows, over(self.mesh))

    def embed(self, embedding: Embedding, tokens: Int[np.ndarray, "windows T"]) -> "SpreadBatches":
        """As few batches as `BATCH_TOKENS` per device allows."""
        windows, time = tokens.shape
        found = SpreadBatches(self.mesh, windows)
        if not windows:
            return found
        batches = -(-windows // (self.mesh.size * max(1, BATCH_TOKENS // time)))
        size = self.mesh.size * -(-windows // (self.mesh.size * batches))
        filled = np.concatenate([tokens, np.repeat(tokens[:1], -windows % size, axis=0)])
        shape = jax.eval_shape(embedding, jnp.asarray(filled[:size])).shape

        def embedded(ids: np.ndarray, part: tuple[slice, ...]) -> np.ndarray:
            return np.asarray(embedding(jnp.asarray(ids[part[0]])))

        for start in range(0, len(filled), size):
            ids = filled[start : start + size]
            found.append(jax.make_array_from_callback(shape, over(self.mesh), partial(embedded, ids)))
        return found


@dataclass(frozen=True)
class Stream:
    """Activations before one block, of the calibration windows and of the held-out windows, which may be none."""

    calibration: Batches
    heldout: Batches

    def on_one_device(self) -> "Stream":
        """The same windows on one device, in each process."""
        return Stream(self.calibration.on_one_device(), self.heldout.on_one_device())


def embed_windows(model: StreamedModel, kind: Batches, *parts: Int[np.ndarray, "windows T"]) -> list[Batches]:
    """Windows of token ids before the first block, stored as `kind` is; only their rows of the embedding are read."""
    rows, ids = np.unique(np.concatenate([part.ravel() for part in parts]), return_inverse=True)
    embedding, ends = model.embedding(rows), np.cumsum([part.size for part in parts])
    numbered = np.split(ids.astype(np.int32), ends[:-1])
    return [kind.embed(embedding, own.reshape(part.shape)) for part, own in zip(parts, numbered, strict=True)]


def windows_per_batch(windows: int, time: int) -> int:
    """The largest divisor of the number of windows that makes batches of `BATCH_TOKENS` tokens at most, or one."""
    per_batch = max(1, min(windows, BATCH_TOKENS // time))
    while windows % per_batch:
        per_batch -= 1
    return per_batch


def make_batches(embedded: Float[Array, "windows T D"]) -> Batches:
    """Split windows into equal batches of about `BATCH_TOKENS` tokens; equal, so that one program serves all."""
    return _split(embedded, Batches())


def _split(windows: Array | np.ndarray, found: Batches, embedding: Embedding = lambda part: part) -> Batches:
    per_batch = windows_per_batch(*windows.shape[:2])
    for start in range(0, len(windows), per_batch):
        found.append(embedding(jnp.asarray(windows[start : start + per_batch])))
    return found
