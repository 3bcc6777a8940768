"""Floor 6: the run folder of pruning, a `system.run_folder` with a model in it, and the fingerprint of its run.

    *.safetensors   a block is finished when its shard and the records of all its linears are there

    with claimed(folders):                                         # one writer at a time, nothing else in them
        if is_finished(folder, identity, recipe):
            report = read_report(folder, identity, recipe)
        else:
            progress = progress_in(folder, identity, recipe)       # where to resume

`progress.as_dict()` is plain JSON, which the first process tells to the others; `Progress.from_dict` reads it again.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.models import OUTER_TAG, ModelError, PrunableModel, TorchModel, block_tag, shard_name
from sparseopt.models.packed import PACKED_INDEX
from sparseopt.models.prunable import digest
from sparseopt.models.safetensors_file import read_header
from sparseopt.pruning.recipe import Recipe, described
from sparseopt.pruning.reports import BlockRecord, LayerRecord, PruneReport
from sparseopt.system import run_folder
from sparseopt.system.machine import versions
from sparseopt.system.run_folder import RUN, SUMMARY, Fingerprint, FolderError, differences, read_start

# Another version may round differently, and a resumed run must give the result of an uninterrupted one, bit for bit.
DECISIVE = ("sparseopt", "jax", "jaxlib", "numpy")
# The packages that run the blocks, by the kind of model.
FLAX_ROUTE, TORCH_ROUTE = ("flax",), ("torch", "transformers")
TRAINING = ("optax",)
# A folder that holds one of these holds a whole model.
INDEXES = ("model.safetensors.index.json", PACKED_INDEX)


class Identity:
    """The fingerprints of the runs that share one pass over a model."""

    def __init__(self, model: PrunableModel, calibration: np.ndarray, heldout: np.ndarray) -> None:
        self._model = model
        # By block, as in their records.
        self.linears = [
            [model.weight_key(index, name).removesuffix(".weight") for name in model.block_linears(index)]
            for index in range(model.num_blocks)
        ]
        tokens = {"calibration": calibration, "held-out": heldout}
        self._tokens = digest((name, array, [array]) for name, array in tokens.items())

    @cached_property
    def _weights(self) -> str:
        """A digest; the whole source is read for it, once."""
        return self._model.check_finite()

    def of(self, recipe: Recipe) -> Fingerprint:
        """What decides the result of a recipe's run, as plain JSON values."""
        found = versions()
        route = TORCH_ROUTE if isinstance(self._model, TorchModel) else FLAX_ROUTE
        decisive = (*DECISIVE, *route, *(TRAINING if recipe.reconstruction is not None else ()))
        device = jax.devices()[0]
        return json.loads(
            json.dumps(
                {
                    "weights": self._weights,
                    "tokens": self._tokens,
                    "recipe": recipe_identity(recipe),
                    "versions": {name: found[name] for name in decisive if name in found},
                    # The kind of a CPU repeats the platform's name.
                    "device": " ".join(dict.fromkeys((device.platform, device.device_kind, platform.machine()))),
                }
            )
        )


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, with digests of what its text omits: the arrays and the code of your own objects."""
    own = (None if isinstance(recipe.method, str) else recipe.method, recipe.penalty)
    leaves = [(path, _array(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(own)]
    arrays = digest((jax.tree_util.keystr(path), leaf, [leaf]) for path, leaf in leaves)
    sources = {f"{part.__module__}.{part.__qualname__}": _source(part) for part in _own_code(own)}
    code = {name: hashlib.sha256(source.encode()).hexdigest()[:16] for name, source in sources.items()}
    return {**recipe.as_dict(), "arrays": arrays if leaves else None, "code": code}


def _array(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    value = np.asarray(leaf)
    return np.asarray(described(leaf)) if value.dtype == object else value


def _own_code(value: Any) -> Iterator[Any]:
    """The classes and functions that a value consists of, except those of Python and of the `DECISIVE` packages."""
    for kind in [inspect.unwrap(value)] if hasattr(value, "__qualname__") else type(value).__mro__:
        root = (getattr(kind, "__module__", None) or "builtins").partition(".")[0]
        if root == "__main__" or root not in {*DECISIVE, *sys.stdlib_module_names}:
            yield kind
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, partial):
        inner = [value.func, value.args, value.keywords]
    elif isinstance(value, dict):
        inner = list(value.values())
    else:
        inner = list(value) if isinstance(value, list | tuple) else []
    for part in inner:
        yield from _own_code(part)


def _source(part: Any) -> str:
    """The source of a class or function; for a class without a file, as in a notebook, that of its functions."""
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        members = vars(part).values() if isinstance(part, type) else ()
        return "".join(_source(member) for member in members if inspect.isfunction(member))


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
    """How far a run into a folder came: finished blocks, their records, and the tags of the shards that stay."""

    blocks: int = 0
    layers: list[LayerRecord] = field(default_factory=list)
    trained: list[BlockRecord] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    def add(self, record: LayerRecord | BlockRecord) -> None:
        if isinstance(record, LayerRecord):
            self.layers.append(record)
        else:
            self.trained.append(record)

    def of_block(self, index: int) -> list[LayerRecord | BlockRecord]:
        return [record for record in self.records if record.block == index]

    @property
    def records(self) -> list[LayerRecord | BlockRecord]:
        return [*self.layers, *self.trained]

    def as_dict(self) -> dict[str, Any]:
        records = [record.as_dict() for record in self.records]
        return {"blocks": self.blocks, "tags": self.tags, "records": records}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Progress":
        found = cls(values["blocks"], tags=values["tags"])
        for line in values["records"]:
            found.add(_record_of(line))
        return found


def _record_of(values: Mapping[str, Any]) -> LayerRecord | BlockRecord:
    return (LayerRecord if values["kind"] == "layer" else BlockRecord).from_dict(values)


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
    """The report of a finished run; a FolderError if files of it are missing."""
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
    run_folder.write_records(folder, (record.as_dict() for record in found.records))
    return found


def _read_progress(folder: Path, linears: Sequence[Sequence[str]], pack: bool) -> Progress:
    if not _is_whole(folder / shard_name(OUTER_TAG, pack)):
        return Progress()
    records, found = run_folder.read_records(folder, _record_of)[0], Progress(tags=[OUTER_TAG])
    for index, names in enumerate(linears):
        own = [record for record in records if record.block == index]
        pruned = sorted(record.layer for record in own if isinstance(record, LayerRecord))
        if pruned != sorted(names) or not _is_whole(folder / shard_name(block_tag(index), pack)):
            break
        found.blocks = index + 1
        found.tags.append(block_tag(index))
        for record in own:
            found.add(record)
    return found


def _is_whole(file: Path) -> bool:
    try:
        return file.is_file() and bool(read_header(file))
    except ModelError:
        return False
