"""Floor 5: a model's folder rewritten one shard at a time, dense to packed or packed to dense."""

from dataclasses import dataclass
from pathlib import Path

from sparseopt.core.types import Observer
from sparseopt.models.errors import ModelError
from sparseopt.models.export import OUTER_TAG, ShardedWriter, block_tag, unread
from sparseopt.models.packed import PACKED_INDEX, is_packed
from sparseopt.models.source import FolderSource
from sparseopt.models.streaming import open_model


@dataclass(frozen=True)
class Rewritten:
    """A rewritten folder, with the bytes of its tensors dense and as stored."""

    output: Path
    dense_bytes: int
    stored_bytes: int

    @property
    def ratio(self) -> float:
        return self.stored_bytes / self.dense_bytes


def pack_folder(source: str | Path, output: str | Path, *, observer: Observer | None = None) -> Rewritten:
    """Rewrite a dense model folder with its tensors packed where that makes them smaller, see `packed`.

    Args:
        source: a Hugging Face folder with safetensors, of a model that was pruned.
        output: a folder that does not exist yet or is empty.
        observer: called with ("shards", those done, all).

    Raises:
        ModelError: before any work, if the source is no dense folder or the output cannot be used.
        DiskError: later, if the disk refuses.
    """
    folder = _folder(source)
    if is_packed(folder):
        raise ModelError(f"{folder} is packed already; copy it, or unpack it with `sparseopt unpack`")
    return _rewrite(folder, output, pack=True, observer=observer)


def unpack_folder(source: str | Path, output: str | Path, *, observer: Observer | None = None) -> Rewritten:
    """Rewrite a packed model folder as a dense one that transformers loads.

    Its tensors are identical to those of the model that was packed. All files that are no weights are copied.

    Args:
        source: a folder written by `sparseopt prune --pack` or `pack_folder`.
        output: a folder that does not exist yet or is empty.
        observer: called with ("shards", those done, all).

    Raises:
        ModelError: before any work, if the source is not packed or corrupt or the output cannot be used; later if
            a shard turns out to be corrupt.
        DiskError: later, if the disk refuses.
    """
    folder = _folder(source)
    if not is_packed(folder):
        raise ModelError(f"{folder} is not packed: it has no {PACKED_INDEX}; a dense folder needs no unpacking")
    return _rewrite(folder, output, pack=False, observer=observer)


def _folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; give the folder of a pruned model on this machine")
    return folder


def _rewrite(folder: Path, output: str | Path, *, pack: bool, observer: Observer | None) -> Rewritten:
    model = open_model(FolderSource(folder))
    # The shards are those that pruning writes, not those of the folder: memory holds one block at a time.
    shards = {OUTER_TAG: model.outer_keys()} | {
        block_tag(index): list(model.block_keys(index).values()) for index in range(model.num_blocks)
    }
    writer = ShardedWriter(output, model.source, pack=pack, keys=model.exported_keys())
    for done, (tag, keys) in enumerate(shards.items(), 1):
        writer.write(tag, unread(model.source, keys))
        if observer:
            observer("shards", done, len(shards))
    writer.finish()
    return Rewritten(writer.output, writer.dense_bytes, writer.stored_bytes)
