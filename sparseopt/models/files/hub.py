"""Models on the Hugging Face hub, fetched by name once and pinned to a commit.

    OWNER/NAME            the repository's main branch
    OWNER/NAME@REVISION   a branch, a tag or a commit of it

Only what is needed is fetched: the configuration, the safetensors weights that the index names, and the files that an
export copies, such as the tokenizer and the licence. They are stored in huggingface_hub's cache, so a second call
fetches nothing, and a machine without a network uses the cache.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from sparseopt.models.base.errors import ModelError, listed
from sparseopt.models.files.folder import (
    MAX_FILE,
    MAX_INDEX,
    PACKED_INDEX,
    PICKLES,
    TO_SAFETENSORS,
    TO_UNPACK,
    is_carried,
    is_plain_name,
    read_json,
)

logger = logging.getLogger(__name__)

# A model in one file needs no index.
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Seconds to wait for the hub's first answer; downloads have their own limits.
TIMEOUT = 10.0

_LIKE_A_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+(@.*)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9]([\w./+-]*[\w+-])?", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """A repository `OWNER/NAME` on the hub and a revision; None for the main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_hub_name(text: str) -> HubName | None:
    """`text` as a name, or None if it can only be a path: absolute, starting with `.` or `~`, deeper, or a GGUF file.

    Raises:
        ModelError: if the text has the form of a name but breaks the hub's rules.
    """
    if not _LIKE_A_NAME.fullmatch(text) or text.endswith(".gguf"):
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    repository, at, revision = text.partition("@")
    try:
        validate_repo_id(repository)
        if at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
            raise HFValidationError(f"the @ must be followed by a branch, a tag or a commit, given {revision!r}")
    except HFValidationError as error:
        raise ModelError(
            f"there is no path {text}, and it is no name on the Hugging Face hub ({error}); give OWNER/NAME, "
            "OWNER/NAME@REVISION, or a folder or .gguf file on this machine"
        ) from error
    return HubName(repository, revision if at else None)


def fetch(name: HubName) -> tuple[Path, str]:
    """Fetch a repository if needed; return its folder in huggingface_hub's cache and its commit.

    A progress bar appears on standard error. If the hub cannot be reached, a complete copy in the cache is used, and
    this module's logger warns about it.

    Raises:
        ModelError: if the repository or its revision is unknown, its owner must grant access, it has no safetensors, or
            the hub cannot be reached and the cache has no complete copy; says what to do.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError

    # Failures of the network, the hub or the disk. The HTTP client and its errors depend on the library's version.
    failures = (HTTPError, OSError)
    small: list[str] = []
    unreached: Exception | None = None

    def get(revision: str | None, files: Sequence[str]) -> Path:
        # The library reads these as patterns: brackets in a file's name must be escaped.
        wanted, only_cached = [escape(file) for file in files], unreached is not None
        return Path(
            snapshot_download(name.repository, revision=revision, allow_patterns=wanted, local_files_only=only_cached)
        )

    try:
        try:
            info = HfApi().model_info(name.repository, revision=name.revision, timeout=TIMEOUT, files_metadata=True)
            small = _small_files({file.rfilename: file.size or 0 for file in info.siblings or []}, name)
        except RevisionNotFoundError:
            raise
        except failures as error:
            unreached = error
        folder = get(name.revision, (CONFIG, INDEX, *small))
        weights = _weight_files(folder)
        folder = get(folder.name, weights)
        # Files that the hub itself lacks are reported when the folder is read.
        if unreached and not all((folder / file).is_file() for file in (CONFIG, *weights)):
            raise unreached
    except failures as error:
        raise ModelError(_explain(unreached or error, name)) from error
    if unreached:
        logger.warning(
            "%s: not fetched again (%s); using the copy in the cache, commit %s", name, _short(unreached), folder.name
        )
    return folder, folder.name


def _small_files(files: Mapping[str, int], name: HubName) -> list[str]:
    """Which of the files, given with their sizes, an export copies; a repository without a model raises."""
    has_weights = not files.keys().isdisjoint((WEIGHTS, INDEX))
    if has_weights and CONFIG in files:
        if large := [file for file, size in files.items() if is_carried(file) and size > MAX_FILE]:
            logger.warning("%s: not fetched because of their size: %s", name, ", ".join(large))
        return [file for file, size in files.items() if is_carried(file) and size <= MAX_FILE]
    hint = f"it holds {listed(sorted(files)) or 'nothing'}; name the repository of a causal language model"
    if PACKED_INDEX in files:
        hint = f"it {TO_UNPACK}"
    elif not has_weights and any(file.endswith(".gguf") for file in files):
        download = f"`hf download {name.repository} FILE.gguf --local-dir FOLDER`"
        hint = f"it has GGUF files: fetch one with {download} and give the path of the file"
    elif not has_weights and any(file.endswith(PICKLES) for file in files):
        hint = f"its {TO_SAFETENSORS.replace('IN', repr(name.repository))}"
    missing = CONFIG if has_weights else WEIGHTS
    raise ModelError(f"{name} on the hub has no {missing}, expected are {CONFIG} and safetensors weights: {hint}")


def _weight_files(folder: Path) -> list[str]:
    """The weight files of a fetched folder; a corrupt index is reported when the folder is read."""
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    try:
        return sorted(
            {file for file in read_json(folder / INDEX, MAX_INDEX)["weight_map"].values() if is_plain_name(file)}
        )
    except (ValueError, KeyError, AttributeError, TypeError):
        return []


def _explain(error: Exception, name: HubName) -> str:
    from huggingface_hub import constants, errors

    repository, cache = name.repository, constants.HF_HUB_CACHE
    given = f"no path {name} exists on this machine, and the Hugging Face hub"
    match error:
        # To the library, a gated repository is a kind of unknown repository.
        case errors.GatedRepoError():
            return (
                f"the owner of {repository} grants access on request: ask at https://huggingface.co/{repository}, then "
                "run `hf auth login` on this machine and start again"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"{given} has no model repository {repository}, or it is private; check the spelling, give a folder or "
                ".gguf file on this machine, or run `hf auth login` for a private one"
            )
        case errors.RevisionNotFoundError():
            return (
                f"{repository} on the hub has no revision {name.revision or 'main'}; give a branch, a tag or a commit "
                f"of it, or {repository} alone for its main branch"
            )
        case errors.HTTPError() | errors.OfflineModeIsEnabled() | errors.EntryNotFoundError():
            revision = "" if name.revision is None else f" --revision {name.revision}"
            return (
                f"{given} did not give it ({_short(error)}), and the cache {cache} holds no complete copy; try again "
                f"later, or where there is a network run `hf download {repository}{revision} --local-dir FOLDER` and "
                "give the folder"
            )
    return (
        f"{name} could not be written to the cache {cache} ({_short(error)}); make room, or set HF_HUB_CACHE to a "
        "folder on another disk, and start again: finished files are not fetched twice"
    )


def _short(error: Any) -> str:
    """The kind of an error and the first line of its text."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first.strip().rstrip('.')}".removesuffix(": ")
