"""Floor 6: activations between blocks: equal batches `[windows, T, D]`, in memory, on disk, or over several devices.

The values are the same in memory and on disk, to the bit; a batch on disk is in memory only while it is used. Its file
has no name: the system takes it away with the process, however that ends. Over several devices a batch is one array cut
by window, and each device runs a block on its own windows.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sparseopt.core.mesh import over, put, whole
from sparseopt.system.files import write_all

# Tokens a batch: enough for the matrix products to reach their rate, little enough to stay in cache.
BATCH_TOKENS = 2048
# Bytes of activations held at once where a model is only scored; more windows take another pass over its blocks.
PASS_BYTES = 2**28


class Batches(Protocol):
    """Equal batches in their order; a list is one."""

    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[Array]:
        """One after the other."""

    def __getitem__(self, index: int, /) -> Array:
        """One of them."""


class GrowingBatches(Batches, Protocol):
    """Batches that more can be put behind."""

    def append(self, batch: Array, /) -> None:
        """Put a batch behind the others."""


# Makes what a new stream is collected in; `list` keeps it in memory.
Store = Callable[[], GrowingBatches]


class DiskBatches:
    """Batches in one file on disk, read back one at a time.

    Attributes:
        shape: of each batch, `(windows, T, D)`; None before the first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Opened without a name: nothing stays behind, not even after SIGKILL.
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._count = 0
        self.shape: tuple[int, ...] | None = None
        self._dtype = np.dtype(np.float32)

    def append(self, batch: Array) -> None:
        """Put a batch behind the others.

        Raises:
            ValueError: for a batch of another shape or dtype than the first.
            OSError: if the disk refuses, a full one above all; the text says how many bytes were to be written.
        """
        values = np.ascontiguousarray(batch)
        if self.shape is None:
            self.shape, self._dtype = values.shape, values.dtype
        if (values.shape, values.dtype) != (self.shape, self._dtype):
            raise ValueError(f"a batch of {values.dtype} {values.shape} among those of {self._dtype} {self.shape}")
        try:
            self._file.seek(self._count * values.nbytes)
            write_all(self._file, values.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: activations of {values.nbytes:,} bytes could not be written in {self._folder}, "
                f"behind {self._count * values.nbytes:,} of the same stream; make room and start the same run again",
            ) from error
        self._count += 1

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def __iter__(self) -> Iterator[Array]:
        """One after the other."""
        return (self[index] for index in range(self._count))

    def __getitem__(self, index: int) -> Array:
        """One of them.

        Raises:
            IndexError: if there are not so many.
            OSError: if the disk gives fewer bytes than were written.
        """
        if self.shape is None or not 0 <= index < self._count:
            raise IndexError(f"batch {index} of {self._count}")
        values = np.empty(self.shape, self._dtype)
        self._file.seek(index * values.nbytes)
        read, target = 0, memoryview(values.reshape(-1).view(np.uint8).data)
        while read < values.nbytes:
            got = self._file.readinto(target[read:])
            if not got:
                raise OSError(f"activations in {self._folder} became shorter; start the same run again")
            read += got
        return jnp.asarray(values)


class SpreadBatches(list[Array]):
    """Batches `[windows, T, D]` that are cut by window over the devices of a mesh.

    Where the windows do not fill the last batch, copies of the first stand behind them: no batch needs a program of its
    own, and what is finite stays it. They count nowhere.

    Attributes:
        mesh: the devices.
        windows: how many there are, copies apart.
    """

    def __init__(self, mesh: Mesh, windows: int) -> None:
        super().__init__()
        self.mesh, self.windows = mesh, windows

    def counted(self, index: int) -> Bool[Array, "windows"]:
        """Which windows of a batch are no copies, cut as the batch is."""
        size = len(self[index])
        return put(np.arange(index * size, (index + 1) * size) < self.windows, over(self.mesh))


class Pairs:
    """Inputs of a block beside its targets, batch by batch."""

    def __init__(self, inputs: Batches, targets: Batches) -> None:
        self._inputs, self._targets = inputs, targets

    def __len__(self) -> int:
        """How many there are."""
        return len(self._inputs)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """One after the other."""
        return zip(self._inputs, self._targets, strict=True)

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        """One of them."""
        return self._inputs[index], self._targets[index]


def batch_shapes(batches: Batches) -> list[list[int]]:
    """The shape of each batch; none is read from disk for it."""
    if isinstance(batches, DiskBatches):
        return [list(batches.shape or ())] * len(batches)
    return [list(batch.shape) for batch in batches]


def disk_store(folder: Path) -> Store:
    """A store whose streams lie in a folder's file system; it raises `OSError` if no file can be made there."""
    return lambda: DiskBatches(folder)


def windows_per_batch(windows: int, time: int) -> int:
    """The largest divisor of the number of windows that makes batches of `BATCH_TOKENS` tokens at most, or one."""
    per_batch = max(1, min(windows, BATCH_TOKENS // time))
    while windows % per_batch:
        per_batch -= 1
    return per_batch


def make_batches(embedded: Float[Array, "windows T D"]) -> Batches:
    """Split windows into equal batches of about `BATCH_TOKENS` tokens; equal, so that one program serves all."""
    windows = embedded.shape[0]
    per_batch = windows_per_batch(windows, embedded.shape[1])
    return [embedded[i : i + per_batch] for i in range(0, windows, per_batch)]


def embed_batches(
    embedding: Callable[[Array], Array], tokens: Int[np.ndarray, "windows T"], store: Store = list
) -> Batches:
    """`make_batches` of embedded windows, embedded batch by batch; no batches of no windows."""
    found = store()
    per_batch = windows_per_batch(*tokens.shape) if len(tokens) else 1
    for start in range(0, len(tokens), per_batch):
        found.append(embedding(jnp.asarray(tokens[start : start + per_batch])))
    return found


def spread_batches(
    embedding: Callable[[Array], Array], tokens: Int[np.ndarray, "windows T"], mesh: Mesh
) -> SpreadBatches:
    """Embedded windows over a mesh, each device with its own; as few batches as `BATCH_TOKENS` a device allow."""
    windows, time = tokens.shape
    found = SpreadBatches(mesh, windows)
    if not windows:
        return found
    batches = -(-windows // (mesh.size * max(1, BATCH_TOKENS // time)))
    size = mesh.size * -(-windows // (mesh.size * batches))
    filled = np.concatenate([tokens, np.repeat(tokens[:1], -windows % size, axis=0)])
    shape = jax.eval_shape(embedding, jnp.asarray(filled[:size])).shape

    def embedded(ids: np.ndarray, part: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(embedding(jnp.asarray(ids[part[0]])))

    for start in range(0, len(filled), size):
        ids = filled[start : start + size]
        found.append(jax.make_array_from_callback(shape, over(mesh), partial(embedded, ids)))
    return found


def on_one_device(batches: Batches) -> Batches:
    """The same windows as one device has them, in each process; what is not spread stays as it is."""
    if not isinstance(batches, SpreadBatches) or not batches:
        return batches
    return make_batches(jnp.asarray(np.concatenate([whole(batch) for batch in batches])[: batches.windows]))


def first_windows(batches: Batches, count: int) -> Float[Array, "windows T D"]:
    """The first windows of a stream, in one array on one device; all of a shorter one."""
    taken: list[jax.Array] = []
    for batch in batches:
        if sum(map(len, taken)) >= count:
            break
        taken.append(jnp.asarray(whole(batch)) if isinstance(batches, SpreadBatches) else batch)
    return jnp.concatenate(taken)[: min(count, getattr(batches, "windows", count))]
