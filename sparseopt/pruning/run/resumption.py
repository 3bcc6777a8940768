"""The run folder of pruning, a `system.run_folder` with a model in it, and the fingerprint of its run.

    *.safetensors   a block is finished when its shard and the records of all its layers are there
    *.gguf          such shards of a GGUF file, which lies beside the folder

    with claimed(plan.folder):                                     # one writer at a time, nothing else in it
        if state_in(identity, plan) is State.FINISHED:
            report = read_report(identity, plan)
        else:
            progress = progress_in(identity, plan)       # where to resume

`progress.as_dict()` is plain JSON, which the first process sends to the others; `Progress.from_dict` reads it again.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.models import (
    OUTER_TAG,
    WHOLE_TAG,
    ModelError,
    PrunableModel,
    StreamedModel,
    block_tag,
    open_model,
    trained_tag,
)
from sparseopt.models.streaming.prunable import digest
from sparseopt.pruning.base.records import (
    AllocationRecord,
    BlockRecord,
    DistillationRecord,
    GridRecord,
    LayerRecord,
    RepairRecord,
    ShapeRecord,
)
from sparseopt.pruning.base.reports import PruneReport
from sparseopt.pruning.recipe.pass_recipe import PassRecipe, described
from sparseopt.pruning.run.output_form import is_file
from sparseopt.pruning.run.plan import Plan, SmallerPlan, shrink_plan
from sparseopt.system import run_folder
from sparseopt.system.files import temporary_of
from sparseopt.system.machine import versions
from sparseopt.system.run_folder import RUN, SUMMARY, Fingerprint, FolderError, State, read_start

# Another version may round differently, and a resumed run must give the result of an uninterrupted one, bit for bit.
DECISIVE = ("sparseopt", "jax", "jaxlib", "numpy", "scipy")
TRAINING = ("optax",)
# A folder that holds this holds a whole model.
INDEX = "model.safetensors.index.json"


class Identity:
    """The fingerprints of runs of one model.

    Attributes:
        model: the dense model.
        tokens: a digest of the windows that it sees; None while they are not known.
    """

    def __init__(self, model: PrunableModel) -> None:
        self.model = model
        self.tokens: str | None = None
        self._masks: dict[str, str] = {}

    @cached_property
    def weights(self) -> str:
        """A digest of the weights, for which the whole source is read once."""
        return self.model.check_finite()

    def _masks_in(self, source: str) -> str:
        if source not in self._masks:
            self._masks[source] = open_model(source).check_finite()
        return self._masks[source]

    def of(self, recipe: PassRecipe) -> Fingerprint:
        """What decides the result of a recipe's run, as plain JSON values."""
        found = versions()
        trains = recipe.reconstruction is not None or recipe.distillation is not None
        decisive = (*DECISIVE, *self.model.packages, *(TRAINING if trains else ()))
        device, masks = jax.devices()[0], recipe.get("masks")
        return run_folder.plain({
            "weights": self.weights,
            "tokens": self.tokens,
            "recipe": recipe_identity(recipe),
            **({} if masks is None else {"masks": self._masks_in(masks)}),
            "versions": {name: found[name] for name in decisive if name in found},
            **({"x64": True} if jax.config.read("jax_enable_x64") else {}),
            # The kind of a CPU repeats the platform's name.
            "device": " ".join(dict.fromkeys((device.platform, device.device_kind, platform.machine()))),
        })  # fmt: skip


def recipe_identity(recipe: PassRecipe) -> dict[str, Any]:
    """What in a recipe decides the result, as plain values, with digests of arrays and of the code of your objects."""
    own = (None if isinstance(recipe.method, str) else recipe.method, recipe.get("penalty"))
    leaves = [(path, _array(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(own)]
    arrays = digest((jax.tree_util.keystr(path), leaf, [leaf]) for path, leaf in leaves)
    sources = {f"{part.__module__}.{part.__qualname__}": _source(part) for part in _own_code(own)}
    code = {name: hashlib.sha256(source.encode()).hexdigest()[:16] for name, source in sources.items()}
    values = {name: value for name, value in recipe.as_dict().items() if name != "score"}
    return {**values, "arrays": arrays if leaves else None, "code": code}


def _array(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    value = np.asarray(leaf)
    return np.asarray(described(leaf)) if value.dtype == object else value


def _own_code(value: Any) -> Iterator[Any]:
    """The classes and functions in a value, except from Python and the `DECISIVE` packages."""
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
    """The source of a class or function; for a class without a file, as in a notebook, its functions' source."""
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        members = vars(part).values() if isinstance(part, type) else ()
        return "".join(_source(member) for member in members if inspect.isfunction(member))


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock the folder for this process, and check that it can be used, before any work.

    Raises:
        FolderError: if the folder is in use by another process, contains links, or contains anything but a run.
    """
    names = run_folder.contents(folder)
    others = [] if RUN in names else sorted(names)
    if INDEX in others:
        raise _holds_a_model(folder)
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise FolderError(
            f"the output folder {folder} is not empty (it holds {shown}) and holds no run; choose another or empty it"
        )
    with run_folder.claimed(folder):
        yield


def _holds_a_model(folder: Path, why: str = "") -> FolderError:
    return FolderError(f"the output folder {folder} is not empty (it holds a model); choose another or empty it{why}")


Finished = AllocationRecord | ShapeRecord | LayerRecord | GridRecord | RepairRecord | BlockRecord | DistillationRecord
KINDS: dict[str, type] = {each.kind: each for each in get_args(Finished)}
R = TypeVar("R", bound=Finished)


@dataclass
class Progress:
    """The progress of a run into a folder.

    Attributes:
        blocks: number of finished blocks of the model, from the first.
        tags: tags of the shards that stay.
        records: records of what is finished, in order.
    """

    blocks: int = 0
    tags: list[str] = field(default_factory=list)
    records: list[Finished] = field(default_factory=list)

    @property
    def layers(self) -> list[LayerRecord]:
        return self._all(LayerRecord)

    @property
    def grids(self) -> list[GridRecord]:
        return self._all(GridRecord)

    @property
    def repairs(self) -> list[RepairRecord]:
        return self._all(RepairRecord)

    @property
    def trained(self) -> list[BlockRecord]:
        return self._all(BlockRecord)

    @property
    def allocation(self) -> AllocationRecord | None:
        return next(iter(self._all(AllocationRecord)), None)

    @property
    def shape(self) -> ShapeRecord | None:
        return next(iter(self._all(ShapeRecord)), None)

    @property
    def distilled(self) -> DistillationRecord | None:
        return next(iter(self._all(DistillationRecord)), None)

    def _all(self, kind: type[R]) -> list[R]:
        return [record for record in self.records if isinstance(record, kind)]

    def as_dict(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "tags": self.tags, "records": [record.as_dict() for record in self.records]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Progress":
        return cls(values["blocks"], values["tags"], list(map(_record_of, values["records"])))


def _record_of(values: Mapping[str, Any]) -> Finished:
    return KINDS[values["kind"]].from_dict(values)  # type: ignore[attr-defined]


def state_in(identity: Identity, plan: Plan) -> State:
    """The state of the claimed folder of a plan. While the identity has no tokens, any tokens match.

    Raises:
        FolderError: if another run is there, listing every difference.
    """
    folder, wanted = plan.folder, identity.of(plan.recipe)
    if identity.tokens is None and (folder / RUN).is_file():
        wanted["tokens"] = read_start(folder)["fingerprint"].get("tokens")
    state, different = run_folder.state_of(folder, wanted)
    # The summary comes last: a run that was killed between index and summary is finished once more.
    ended = (folder / SUMMARY).is_file() and any((folder / last).is_file() for last in {INDEX, plan.form.last})
    if not different:
        return State.UNFINISHED if state is State.FINISHED and not ended else state
    if ended:
        raise _holds_a_model(folder, "\n  ".join([". It is the result of another run, these differ:", *different]))
    text = (
        f"another run was started in {folder}; choose another folder, empty this one, or use the same recipe, "
        "model and versions to resume it. These differ:"
    )
    raise FolderError("\n  ".join([text, *different]))


def read_report(identity: Identity, plan: Plan) -> PruneReport:
    """The report of a finished run; a FolderError if some of its files are missing."""
    found, folder = _read_progress(identity.model, plan), plan.folder
    if found.blocks < identity.model.num_blocks:
        missing = f"shard or records of block {found.blocks}" if found.tags else "the tensors outside the blocks"
        raise _holds_a_model(folder, f". Its run is finished, but {missing} are missing or damaged")
    summary = run_folder.read_json(folder / SUMMARY)
    if is_file(plan.output):
        _check_file(plan, summary)
    try:
        return PruneReport.from_summary(
            summary,
            plan.output,
            layers=found.layers,
            grids=found.grids,
            blocks=found.trained,
            repairs=found.repairs,
            shape=found.shape,
            distilled=found.distilled,
        )
    except (KeyError, TypeError) as error:
        raise _holds_a_model(folder, f". Its {SUMMARY} is not that of a pruning run ({error})") from error


def _check_file(plan: Plan, summary: Mapping[str, Any]) -> None:
    """Raise a FolderError if the file is not the one that the finished run wrote."""
    held = -1
    with contextlib.suppress(ModelError, OSError):
        held = plan.form.stored_bytes(plan.output)
    if held < summary.get("stored_bytes", 0):
        raise FolderError(
            f"{plan.output} is not the file that its run in {plan.folder} wrote: move it, and start the same command "
            "again"
        )


def progress_in(identity: Identity, plan: Plan) -> Progress:
    """The progress of a run in its claimed folder: a new one gets the fingerprint, an old one loses its unfinished
    block.

    Raises:
        FolderError: if another run was started there, listing every difference.
    """
    folder = plan.folder
    new = state_in(identity, plan) is State.NEW
    found = Progress() if new else _read_progress(identity.model, plan)
    if is_file(plan.output) and plan.output.exists() and found.blocks < identity.model.num_blocks:
        raise FolderError(f"{plan.output} exists and is not of this run; choose another output or remove it")
    if new:
        run_folder.write_start(folder, identity.of(plan.recipe))
        return found
    # Only names that a run writes: what else lies there is somebody else's.
    blocks = [tag(index) for index in range(identity.model.num_blocks) for tag in (block_tag, trained_tag)]
    for tag in (OUTER_TAG, WHOLE_TAG, *blocks):
        file = folder / plan.form.file_name(tag)
        for each in [temporary_of(file)] if tag in found.tags else [file, temporary_of(file)]:
            each.unlink(missing_ok=True)
    run_folder.write_records(folder, (record.as_dict() for record in found.records))
    return found


def _read_progress(model: PrunableModel, plan: Plan) -> Progress:
    def stored(tag: str) -> bool:
        file = plan.folder / plan.form.file_name(tag)
        with contextlib.suppress(ModelError):
            return file.is_file() and bool(plan.form.read(file))
        return False

    if not (plan.folder / RUN).is_file():
        return Progress()
    records, found = run_folder.read_records(plan.folder, _record_of)[0], Progress()
    if not isinstance(model, StreamedModel):
        # All tensors are in one shard, which comes after all records.
        whole = stored(WHOLE_TAG) and len(records) == len(plan.patterns)
        return Progress(model.num_blocks, [WHOLE_TAG], records) if whole else found
    found.records += {r.kind: r for r in records if isinstance(r, AllocationRecord | ShapeRecord)}.values()
    if not stored(OUTER_TAG) or (plan.smaller and found.shape is None):
        return found
    found.tags.append(OUTER_TAG)
    if found.shape is not None:
        plan = shrink_plan(model, cast(SmallerPlan, plan), found.shape.sizes)
    stays = plan.stays
    # Distillation is finished when all its shards are there, with or without the shards that they replace.
    last = [record for record in records if isinstance(record, DistillationRecord)][-1:]
    distilled = last if all(stored(trained_tag(index)) for index in stays) else []
    for index in range(model.num_blocks):
        tag = trained_tag(index) if distilled else block_tag(index)
        own = [record for record in records if getattr(record, "block", None) == index]
        if index in stays:
            pruned = sorted(record.layer for record in own if isinstance(record, LayerRecord))
            wanted = sorted(plan.layers(model, index))
            # Before its survey, a plan that chooses layers has all of them.
            whole = set(pruned) <= set(wanted) if plan.recipe.chooses_linears else pruned == wanted
            if not whole or not stored(tag):
                break
            found.tags.append(tag)
        found.blocks = index + 1
        found.records += own
    found.records += distilled
    return found
