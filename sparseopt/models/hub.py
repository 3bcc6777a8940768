"""Floor 5: models by their names on the Hugging Face hub, fetched once and pinned to a commit.

    OWNER/NAME            the repository's main branch
    OWNER/NAME@REVISION   a branch, a tag or a commit of it

Only what is needed is fetched: the configuration, the safetensors weights that the index names, and the files that go
along with the model, such as a tokenizer's and the licence. They lie in huggingface_hub's cache, so a second call
fetches nothing, and a machine without a network uses what the cache holds.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from sparseopt.models.errors import ModelError
from sparseopt.models.folder import (
    MAX_FILE,
    MAX_INDEX,
    PICKLES,
    TO_SAFETENSORS,
    is_carried,
    is_plain_name,
    read_json,
)
from sparseopt.models.packed import PACKED_INDEX

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Either kind of index; a model in one file needs none.
INDICES = (INDEX, PACKED_INDEX)

# Seconds that the hub has for an answer to the first question; downloads have their own limits.
TIMEOUT = 10.0

_LIKE_A_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+(@.*)?", re.ASCII)
_PART = r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9]([\w./+-]*[\w+-])?", re.ASCII)
_LONGEST = 96


@dataclass(frozen=True)
class HubName:
    """A model repository on the hub, and the revision asked for.

    Attributes:
        repository: `OWNER/NAME`.
        revision: a branch, tag or commit; None for the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def download_command(self) -> str:
        """The shell command that fetches it into a folder of its own."""
        revision = "" if self.revision is None else f" --revision {self.revision}"
        return f"hf download {self.repository}{revision} --local-dir FOLDER"


@dataclass(frozen=True)
class Snapshot:
    """A fetched repository.

    Attributes:
        folder: in huggingface_hub's cache.
        revision: the commit that the name stood for, a sha.
        offline: whether the hub was not asked, so that a branch may have moved on since.
    """

    folder: Path
    revision: str
    offline: bool


def parse_hub_name(text: str) -> HubName | None:
    """The name that `text` is, or None where it can only be a path: absolute, from `.` or `~`, deeper, a GGUF file.

    Raises:
        ModelError: for what has the form of a name but breaks the hub's rules.
    """
    if not _LIKE_A_NAME.fullmatch(text) or text.endswith(".gguf"):
        return None
    repository, at, revision = text.partition("@")
    wrong = ""
    if not _REPOSITORY.fullmatch(repository) or "--" in repository or ".." in repository or repository.endswith(".git"):
        wrong = "owner and name are letters, digits and single . _ - between them"
    elif len(repository) > _LONGEST:
        wrong = f"a name has at most {_LONGEST} characters, this one {len(repository)}"
    elif at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        wrong = f"after the @ stands a branch, a tag or a commit, given {revision!r}"
    if wrong:
        raise ModelError(
            f"there is no path {text}, and it is no name on the Hugging Face hub ({wrong}); give OWNER/NAME, "
            "OWNER/NAME@REVISION, or a folder or .gguf file on this machine"
        )
    return HubName(repository, revision if at else None)


def fetch(name: HubName) -> Snapshot:
    """Fetch a repository's configuration and weights, or find them in the cache.

    A bar on standard error shows the progress. Where the hub cannot be asked, a whole copy in the cache does, and a
    warning of this module's logger says so.

    Args:
        name: of the repository.

    Raises:
        ModelError: if the repository or its revision is unknown, its owner has to grant access, it has no safetensors,
            or the hub cannot be reached and the cache has no whole copy; says what to do.
    """
    try:
        files = _list_files(name)
    except _failures() as error:
        found = None if _is_unknown_revision(error) else _from_cache(name)
        if found is None:
            raise ModelError(_explain(error, name)) from error
        logger.warning(
            "%s: not fetched anew (%s); using the copy in the cache, commit %s",
            name,
            _short(error),
            found.revision,
        )
        return found
    _check_files(set(files), name)
    small = [file for file, size in files.items() if is_carried(file) and size <= MAX_FILE]
    if large := [file for file, size in files.items() if is_carried(file) and size > MAX_FILE]:
        logger.warning("%s: not fetched, for their size: %s", name, ", ".join(large))
    try:
        return Snapshot(*_download(name, small, only_cached=False), offline=False)
    except _failures() as error:
        raise ModelError(_explain(error, name)) from error


def _list_files(name: HubName) -> dict[str, int]:
    """The repository's files at the revision, with their bytes."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(name.repository, revision=name.revision, timeout=TIMEOUT, files_metadata=True)
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def _check_files(files: set[str], name: HubName) -> None:
    """Refuse a repository that holds no model in our sense before anything large is fetched."""
    has_weights = bool(files & {WEIGHTS, *INDICES})
    if has_weights and CONFIG in files:
        return
    if not has_weights and any(file.endswith(".gguf") for file in files):
        hint = (
            "it has GGUF files: fetch one with "
            f"`hf download {name.repository} FILE.gguf --local-dir FOLDER` and give the path of the file"
        )
    elif not has_weights and any(file.endswith(PICKLES) for file in files):
        hint = f"its {TO_SAFETENSORS.replace('IN', repr(name.repository))}"
    else:
        shown = sorted(files)
        held = ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
        hint = f"it holds {held or 'nothing'}; name the repository of a causal language model"
    missing = CONFIG if has_weights else WEIGHTS
    raise ModelError(f"{name} on the hub has no {missing}, expected are {CONFIG} and safetensors weights: {hint}")


def _from_cache(name: HubName) -> Snapshot | None:
    """A whole copy in the cache, or None."""
    try:
        return Snapshot(*_download(name, (), only_cached=True), offline=True)
    except _failures():
        return None


def _download(name: HubName, small: Sequence[str], *, only_cached: bool) -> tuple[Path, str]:
    """Folder and commit, with all files that are needed: first the small ones, then the weights that the index names.

    Raises:
        FileNotFoundError: if the cache alone has to do and lacks one of them.
    """
    from huggingface_hub import snapshot_download

    def get(revision: str | None, files: Sequence[str]) -> Path:
        # Patterns, for the library: without escaping, a bracket in a file's name would be one.
        patterns = [escape(file) for file in files]
        folder = snapshot_download(
            name.repository, revision=revision, allow_patterns=patterns, local_files_only=only_cached
        )
        return Path(folder)

    folder = get(name.revision, (CONFIG, *INDICES, *small))
    commit = folder.name
    weights = _weight_files(folder)
    folder = get(commit, weights)
    missing = [file for file in (CONFIG, *weights) if not (folder / file).is_file()]
    # What the hub itself lacks is told by who reads the folder.
    if missing and only_cached:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    return folder, commit


def _weight_files(folder: Path) -> list[str]:
    """The files of weights of a fetched folder; a broken index is left to who reads it."""
    indices = [folder / index for index in INDICES if (folder / index).is_file()]
    if not indices:
        return [WEIGHTS]
    try:
        named = [file for index in indices for file in read_json(index, MAX_INDEX)["weight_map"].values()]
        return sorted({file for file in named if is_plain_name(file)})
    except (ValueError, KeyError, AttributeError, TypeError):
        return []


def _failures() -> tuple[type[Exception], ...]:
    """What the library raises where the network, the hub or the disk fails: the HTTP client's errors and OSErrors."""
    # The client is httpx in one major version and httpx2 in the next; the errors module names the one in use.
    from huggingface_hub.errors import HTTPError

    return (HTTPError, OSError)


def _is_unknown_revision(error: Exception) -> bool:
    from huggingface_hub.errors import RevisionNotFoundError

    return isinstance(error, RevisionNotFoundError)


def _explain(error: Exception, name: HubName) -> str:
    """What was given, what is wrong, what to do."""
    from huggingface_hub import constants, errors

    repository = name.repository
    given = f"no path {name} exists on this machine, and "
    by_hand = f"fetch it where there is a network with `{name.download_command}` and give the folder"
    match error:
        # A gated repository is, to the library, a kind of unknown one.
        case errors.GatedRepoError():
            return (
                f"the owner of {repository} grants access on request: ask at https://huggingface.co/{repository}, then "
                "run `hf auth login` on this machine and start again"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"{given}the Hugging Face hub has no model repository {repository}, or it is private; check the "
                "spelling, give a folder or .gguf file on this machine, or run `hf auth login` for a private one"
            )
        case errors.RevisionNotFoundError():
            return (
                f"{repository} on the hub has no revision {name.revision or 'main'}; give a branch, a tag or a commit "
                f"of it, or {repository} alone for its main branch"
            )
        case errors.HfHubHTTPError() if not isinstance(error, errors.EntryNotFoundError):
            return (
                f"{given}the Hugging Face hub refused {name} ({_short(error)}); try again later, check `hf auth "
                f"whoami`, or {by_hand}"
            )
        case errors.OfflineModeIsEnabled() | errors.EntryNotFoundError() | errors.HTTPError():
            return (
                f"{given}the Hugging Face hub cannot be reached to fetch it ({_short(error)}), nor does the cache "
                f"{constants.HF_HUB_CACHE} hold a whole copy; {by_hand}"
            )
        case _:
            return (
                f"{name} could not be written to the cache {constants.HF_HUB_CACHE} ({_short(error)}); make room, or "
                "set HF_HUB_CACHE to a folder on another disk, and start again: what is there is not fetched twice"
            )


def _short(error: Any) -> str:
    """The kind of an error and the first line of its text."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip().rstrip('.')}" if lines else type(error).__name__
