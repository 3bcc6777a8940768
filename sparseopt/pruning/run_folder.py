"""Floor 6: the folder of a pruning run: whose it is, what it is a run of, and how far it has come.

    run.lock     held by the process that writes; ends with it, however that ends
    run.json     the fingerprint, see `identity`
    summary.json     of a finished run
    *.safetensors, records.jsonl     a block is finished when its shard and the records of all its linears are there

A run into a folder with the same fingerprint resumes after the last finished block, and a finished one is not repeated;
with another fingerprint it is refused, and told what differs. Everything is written under another name and renamed, so
what has its final name is whole.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseopt.models import OUTER_TAG, ModelError, block_tag, shard_name
from sparseopt.models.folder import LOCK, RECORDS, RUN, SUMMARY
from sparseopt.models.packed import PACKED_INDEX
from sparseopt.models.safetensors_file import read_header
from sparseopt.pruning.identity import Fingerprint, Identity
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.reports import BlockRecord, LayerRecord, PruneReport
from sparseopt.system.files import InUse, locked, refuse_links, temporary_of, write_whole

# A folder that holds one of these holds a whole model.
INDEXES = ("model.safetensors.index.json", PACKED_INDEX)


class FolderError(ModelError):
    """An output folder that this run may not use; says why and what to do."""


@contextlib.contextmanager
def claimed(folders: Sequence[Path]) -> Iterator[None]:
    """Hold every folder for one process, and look whether it can be used at all, before any work.

    Raises:
        FolderError: for a folder in use by another process, one with links, or one with anything but a run in it.
    """
    with contextlib.ExitStack() as held:
        for folder in folders:
            held.enter_context(_locked(folder))
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        entries = set() if made else {entry.name for entry in folder.iterdir()}
        _check_entries(folder, entries)
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
    except OSError as error:
        raise _unusable(folder, error) from error
    except ValueError as error:
        raise FolderError(str(error)) from error
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder / LOCK))
        except InUse as owner:
            raise FolderError(f"{folder} is in use by {owner}; wait for it, or choose another folder") from None
        except OSError as error:
            raise _unusable(folder, error) from error
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            # A run that was refused leaves no trace.
            with contextlib.suppress(OSError):
                for place in made:
                    place.rmdir()


def _unusable(folder: Path, error: OSError) -> FolderError:
    return FolderError(f"cannot use {folder} as output folder: {error.strerror}; choose another")


def _holding_a_model(folder: Path, why: str = "") -> FolderError:
    return FolderError(f"the output folder {folder} is not empty (it holds a model); choose another or empty it{why}")


def _check_entries(folder: Path, entries: set[str]) -> None:
    if entries & set(INDEXES) and RUN not in entries:
        raise _holding_a_model(folder)
    # The fingerprint's own temporary file is what a run leaves that was killed before it had written anything.
    others = sorted(entries - {LOCK, temporary_of(Path(RUN)).name})
    if others and RUN not in entries:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise FolderError(
            f"the output folder {folder} is not empty (it holds {shown}), and no run was begun there; choose another "
            "or empty it"
        )


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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as one process tells them to another."""
        records = {name: [r.as_dict() for r in getattr(self, name)] for name in ("layers", "trained")}
        return {"blocks": self.blocks, "tags": self.tags, **records}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Progress":
        """What `as_dict` told."""
        layers = [LayerRecord.from_dict(record) for record in values["layers"]]
        trained = [BlockRecord.from_dict(record) for record in values["trained"]]
        return cls(values["blocks"], layers, trained, list(values["tags"]))


def is_finished(folder: Path, identity: Identity, recipe: Recipe) -> bool:
    """Whether the run of a recipe is finished in a claimed folder.

    Raises:
        FolderError: if another run is, listing every difference, or if files of it are missing.
    """
    # The summary comes last: a run that was killed between index and summary is finished once more.
    if not (folder / SUMMARY).is_file() or not any((folder / index).is_file() for index in INDEXES):
        return False
    if different := _differences(_read_json(folder / RUN), identity.of(recipe)):
        raise _holding_a_model(folder, f". Its run is another one, these differ:\n  {different}")
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
        raise _holding_a_model(folder, f". Its run is finished, but {missing} are missing or damaged")
    summary = _read_json(folder / SUMMARY)
    try:
        return PruneReport.from_summary(summary, folder, found.layers, found.trained)
    except (KeyError, TypeError) as error:
        raise _holding_a_model(folder, f". Its {SUMMARY} is not that of a pruning run ({error})") from error


def progress_in(folder: Path, identity: Identity, recipe: Recipe) -> Progress:
    """Look at a claimed folder; a new one gets the fingerprint, an old one loses what belongs to no finished block.

    Raises:
        FolderError: if the run that was begun there is another one, listing every difference.
    """
    file, wanted = folder / RUN, identity.of(recipe)
    if not file.is_file():
        write_whole(file, json.dumps(wanted, indent=2) + "\n")
        return Progress()
    if different := _differences(_read_json(file), wanted):
        raise FolderError(
            f"another run was begun in {folder}; choose another folder, empty this one, or go on with the same recipe, "
            f"model and versions. These differ:\n  {different}"
        )
    found = _read_progress(folder, identity.linears, recipe.pack)
    _drop_rest(folder, found, recipe.pack)
    return found


def _read_progress(folder: Path, linears: Sequence[Sequence[str]], pack: bool) -> Progress:
    if not _is_whole(folder / shard_name(OUTER_TAG, pack)):
        return Progress()
    layers, trained = _read_records(folder / RECORDS)
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


def _drop_rest(folder: Path, progress: Progress, pack: bool) -> None:
    kept = {shard_name(tag, pack) for tag in progress.tags}
    for entry in folder.iterdir():
        if entry.suffix in (".partial", ".tmp", ".safetensors") and entry.name not in kept:
            entry.unlink()
    records = [json.dumps(r.as_dict()) + "\n" for r in progress.layers]
    records += [json.dumps(r.as_dict()) + "\n" for r in progress.trained]
    write_whole(folder / RECORDS, "".join(records))


def _is_whole(file: Path) -> bool:
    """Whether a shard is there with all its bytes; a renamed file is, unless the disk failed."""
    try:
        return file.is_file() and bool(read_header(file))
    except ModelError:
        return False


def _differences(found: Fingerprint, wanted: Fingerprint) -> str:
    """A line for each; empty for none."""
    old, new = dict(_flat(found)), dict(_flat(wanted))
    return "\n  ".join(
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value


def _read_json(file: Path) -> Fingerprint:
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{file} is no valid JSON ({error}); empty the folder and start again") from error
    return found if isinstance(found, dict) else {}


def _read_records(file: Path) -> tuple[list[LayerRecord], list[BlockRecord]]:
    """The records of a broken run; a line that was cut off ends them."""
    layers: list[LayerRecord] = []
    trained: list[BlockRecord] = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    for line in lines:
        try:
            values = json.loads(line)
            if values["kind"] == "layer":
                layers.append(LayerRecord.from_dict(values))
            else:
                trained.append(BlockRecord.from_dict(values))
        except (ValueError, KeyError, TypeError):
            break
    return layers, trained
