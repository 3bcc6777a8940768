"""Floor 6: the run folder of pruning: a `system.run_folder` with a model in it.

    *.safetensors   a block is finished when its shard and the records of all its linears are there

    with claimed(folders):                                         # one writer at a time, nothing else in them
        if is_finished(folder, identity, recipe):
            report = read_report(folder, identity, recipe)
        else:
            progress = progress_in(folder, identity, recipe)       # where to resume

`progress.as_dict()` is plain JSON, which the first process tells to the others; `Progress.from_dict` reads it again.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseopt.models import OUTER_TAG, ModelError, block_tag, shard_name
from sparseopt.models.packed import PACKED_INDEX
from sparseopt.models.safetensors_file import read_header
from sparseopt.pruning.identity import Identity
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.reports import BlockRecord, LayerRecord, PruneReport
from sparseopt.system import run_folder
from sparseopt.system.run_folder import RUN, SUMMARY, FolderError, differences, read_start

# A folder that holds one of these holds a whole model.
INDEXES = ("model.safetensors.index.json", PACKED_INDEX)


@contextlib.contextmanager
def claimed(folders: Sequence[Path]) -> Iterator[None]:
    """Hold every folder for this process, and check that it can be used, before any work.

    Raises:
        FolderError: for a folder in use by another process, one with links, or one with anything but a run in it.
    """
    with contextlib.ExitStack() as held:
        for folder in folders:
            _check_entries(folder)
            held.enter_context(run_folder.claimed(folder))
        yield


def _check_entries(folder: Path) -> None:
    names = run_folder.contents(folder)
    if RUN in names:
        return
    if names & set(INDEXES):
        raise _holds_a_model(folder)
    if others := sorted(names):
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise FolderError(
            f"the output folder {folder} is not empty (it holds {shown}) and holds no run; choose another or empty it"
        )


def _holds_a_model(folder: Path, why: str = "") -> FolderError:
    return FolderError(f"the output folder {folder} is not empty (it holds a model); choose another or empty it{why}")


@dataclass
class Progress:
    """How far an earlier run into a folder came.

    Attributes:
        blocks: finished blocks, counted from the first.
        layers: the records of their linears.
        trained: the records of their reconstruction.
        tags: of the shards that stay.
    """

    blocks: int = 0
    layers: list[LayerRecord] = field(default_factory=list)
    trained: list[BlockRecord] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of `records.jsonl`."""
        return [record.as_dict() for record in self.layers] + [record.as_dict() for record in self.trained]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"blocks": self.blocks, "tags": self.tags, "records": self.records}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Progress":
        """The inverse of `as_dict`."""
        return cls(values["blocks"], *_by_kind([_record_of(line) for line in values["records"]]), list(values["tags"]))


def _record_of(values: Mapping[str, Any]) -> LayerRecord | BlockRecord:
    return (LayerRecord if values["kind"] == "layer" else BlockRecord).from_dict(values)


def _by_kind(records: Sequence[LayerRecord | BlockRecord]) -> tuple[list[LayerRecord], list[BlockRecord]]:
    layers = [record for record in records if isinstance(record, LayerRecord)]
    return layers, [record for record in records if isinstance(record, BlockRecord)]


def is_finished(folder: Path, identity: Identity, recipe: Recipe) -> bool:
    """Whether the run of a recipe is finished in a claimed folder.

    Raises:
        FolderError: if another run is finished there, listing every difference, or if files of it are missing.
    """
    # The summary comes last: a run that was killed between index and summary is finished once more.
    if not (folder / SUMMARY).is_file() or not any((folder / index).is_file() for index in INDEXES):
        return False
    if different := differences(read_start(folder)["fingerprint"], identity.of(recipe)):
        raise _holds_a_model(folder, "\n  ".join([". It is the result of another run, these differ:", *different]))
    read_report(folder, identity, recipe)
    return True


def read_report(folder: Path, identity: Identity, recipe: Recipe) -> PruneReport:
    """The report of a finished run.

    Raises:
        FolderError: if files of it are missing.
    """
    found = _read_progress(folder, identity.linears, recipe.pack)
    if found.blocks < len(identity.linears):
        missing = f"shard or records of block {found.blocks}" if found.tags else "the tensors outside the blocks"
        raise _holds_a_model(folder, f". Its run is finished, but {missing} are missing or damaged")
    summary = run_folder.read_json(folder / SUMMARY)
    try:
        return PruneReport.from_summary(summary, folder, found.layers, found.trained)
    except (KeyError, TypeError) as error:
        raise _holds_a_model(folder, f". Its {SUMMARY} is not that of a pruning run ({error})") from error


def progress_in(folder: Path, identity: Identity, recipe: Recipe) -> Progress:
    """How far a run came in a claimed folder: a new one gets the fingerprint, an old one loses its unfinished block.

    Raises:
        FolderError: if another run was started there, listing every difference.
    """
    wanted = identity.of(recipe)
    if not (folder / RUN).is_file():
        run_folder.write_start(folder, wanted)
        return Progress()
    if different := differences(read_start(folder)["fingerprint"], wanted):
        text = (
            f"another run was started in {folder}; choose another folder, empty this one, or use the same recipe, "
            "model and versions to resume it. These differ:"
        )
        raise FolderError("\n  ".join([text, *different]))
    found = _read_progress(folder, identity.linears, recipe.pack)
    kept = {shard_name(tag, recipe.pack) for tag in found.tags}
    for entry in folder.iterdir():
        if entry.suffix in (".partial", ".tmp", ".safetensors") and entry.name not in kept:
            entry.unlink()
    run_folder.write_records(folder, found.records)
    return found


def _read_progress(folder: Path, linears: Sequence[Sequence[str]], pack: bool) -> Progress:
    if not _is_whole(folder / shard_name(OUTER_TAG, pack)):
        return Progress()
    layers, trained = _by_kind(run_folder.read_records(folder, _record_of)[0])
    found = Progress(tags=[OUTER_TAG])
    for index, names in enumerate(linears):
        own = [record for record in layers if record.block == index]
        whole = _is_whole(folder / shard_name(block_tag(index), pack))
        if not whole or sorted(record.layer for record in own) != sorted(names):
            break
        found.blocks = index + 1
        found.tags.append(block_tag(index))
        found.layers += own
        found.trained += [record for record in trained if record.block == index]
    return found


def _is_whole(file: Path) -> bool:
    """Whether a shard is there with all its bytes; a renamed file is, unless the disk failed."""
    try:
        return file.is_file() and bool(read_header(file))
    except ModelError:
        return False
