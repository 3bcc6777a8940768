"""A GGUF file seen as a Hugging Face model: names, layout, configuration, sidecar files."""

import copy
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sparseopt.models.base.errors import ModelError
from sparseopt.models.files.gguf.architectures import ARCHITECTURES
from sparseopt.models.files.gguf.base import Fields
from sparseopt.models.files.gguf.header import GGUFTensor, Value, read_header
from sparseopt.models.files.gguf.shared import ROPE_FACTORS
from sparseopt.models.files.gguf.tokenizer import build_tokenizer, tokenizer_config

_MOST_BLOCKS = 10_000


class GGUFSource:
    """One GGUF file of a known architecture. Quantised tensors are read as float32.

    Attributes:
        values: the metadata with types.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.revision: str | None = None
        self.follow_links = False
        header = read_header(path)
        self.values, self._metadata, tensors = header.values, header.metadata, header.tensors
        name, parts = self._metadata.get("general.architecture"), self._metadata.get("split.count", 1)
        # In a list: a damaged file may give a value that cannot be hashed.
        if name not in list(ARCHITECTURES):
            raise ModelError(
                f"{path} has the unknown architecture {repr(name)[:90]}; known are {', '.join(ARCHITECTURES)}"
            )
        if parts not in (0, 1):
            raise ModelError(
                f"{path} is one of {repr(parts)[:20]} parts (split.count); join them with `llama-gguf-split --merge`"
            )
        self._name, self._architecture = str(name), ARCHITECTURES[str(name)]
        self._named = {self._architecture.hf_name(name): tensor for name, tensor in tensors.items()}
        self.tensors: dict[str, GGUFTensor] = {
            name: tensor for name, tensor in self._named.items() if name != ROPE_FACTORS
        }

    def changed(self, values: dict[str, Value], tensors: Mapping[str, GGUFTensor]) -> "GGUFSource":
        """The same file with these metadata, and with these tensors in place of its own."""
        made = copy.copy(self)
        vars(made).pop("config", None)
        made.values, made._metadata = values, {key: value for key, (value, *_) in values.items()}
        made._named, made.tensors = {**self._named, **tensors}, {**self.tensors, **tensors}
        return made

    def read(self, name: str) -> np.ndarray:
        return self._architecture.undo(name, self.tensors[name].read(), self.config)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        tensor, architecture = self.tensors[name], self._architecture
        # If rows are reordered, all are read at once.
        for piece in [tensor.read()] if architecture.moves_rows(name) else tensor.pieces():
            yield architecture.undo(name, piece, self.config)

    @cached_property
    def config(self) -> dict[str, Any]:
        """A Hugging Face configuration made from the metadata."""
        fields = Fields(self.path, self._name, self._metadata)
        # Before anything is allocated per block.
        if fields.count("block_count") > _MOST_BLOCKS:
            raise fields.error("block_count", f"at most {_MOST_BLOCKS:,} make sense; download it again")
        config = self._architecture.read_config(fields, self._named)
        fields.refuse_unread()
        return {
            "architectures": [self._architecture.class_name],
            "model_type": self._architecture.model_type,
            **config,
            "dtype": self._matrix_dtype(),
            **self._special_ids(),
        }

    def sidecars(self) -> dict[str, bytes]:
        files = {"generation_config.json": self._special_ids()}
        if "tokenizer.ggml.tokens" in self._metadata:
            tokenizer, files["tokenizer_config.json"] = self.stored_tokenizer()
            files["tokenizer.json"] = json.loads(tokenizer.to_str())
        return {name: json.dumps(value, indent=2, ensure_ascii=False).encode() for name, value in files.items()}

    def stored_tokenizer(self) -> tuple[Tokenizer, dict[str, Any]]:
        tokenizer = build_tokenizer(self._metadata, self.path)
        embedding = self.tensors.get(f"{self._architecture.outer['token_embd']}.weight")
        # Fewer tokens than rows is usual: the rest is padding.
        if embedding and tokenizer.get_vocab_size() > embedding.shape[0]:
            raise ModelError(
                f"{self.path} has {tokenizer.get_vocab_size()} tokens and an embedding of {embedding.shape[0]} rows; "
                "convert the model again"
            )
        return tokenizer, tokenizer_config(self._metadata)

    def _matrix_dtype(self) -> str:
        dtypes = {tensor.dtype.name for tensor in self.tensors.values() if len(tensor.shape) == 2}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def _special_ids(self) -> dict[str, int]:
        names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        found = {name: self._metadata.get(f"tokenizer.ggml.{short}_token_id") for name, short in names.items()}
        return {name: value for name, value in found.items() if type(value) is int}
