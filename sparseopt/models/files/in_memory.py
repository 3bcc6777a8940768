"""A model in memory as a source: the tensors of a transformers model, or any tensors by checkpoint name.

A tensor is copied when it is read, in pieces, also from a GPU. torch is imported only if the caller has a torch model.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from sparseopt.models.base.errors import ModelError, guarded, listed
from sparseopt.models.files.folder import carried_files
from sparseopt.models.files.gguf.reader import GGUFSource
from sparseopt.models.files.safetensors import DTYPES, SLICE, UnreadTensor
from sparseopt.models.files.source import Source

# Ends the name of what was pruned: its weights may differ from the folder that it was loaded from.
IN_MEMORY = " (in memory)"
_INSTEAD = "give a folder instead, which model.save_pretrained(FOLDER) writes"
# A folder with one of these holds files of a model.
_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")
_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}


class TransformersModel(Protocol):
    """The parts of a transformers `PreTrainedModel` that are used here."""

    config: Any
    name_or_path: str

    def state_dict(self) -> Mapping[str, Any]:
        """The torch tensors by name, not copied."""


class MemorySource:
    """A `Source` of tensors in memory; tokenizer and other files come from elsewhere, or there are none."""

    revision: str | None = None

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        tensors: Mapping[str, UnreadTensor],
        files: Source | Path | None,
        own: Mapping[str, bytes] | None = None,
    ) -> None:
        """Store the arguments.

        Args:
            name: name of the model.
            config: the Hugging Face configuration.
            tensors: tensors by Hugging Face name.
            files: the folder or source of the tokenizer and other files; None for none.
            own: contents by file name, which replace those files.
        """
        self.name, self.config, self.tensors = name.removesuffix(IN_MEMORY) + IN_MEMORY, config, dict(tensors)
        self._files, self._own = files, own or {}
        found = Path(self.name) if files is None else files
        self.path, self.follow_links = (found, False) if isinstance(found, Path) else (found.path, found.follow_links)

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name].read()

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        return iter(self.tensors[name].pieces())

    def sidecars(self) -> dict[str, bytes]:
        if isinstance(self._files, Path):
            found = {file.name: file.read_bytes() for file in carried_files(self._files)}
        else:
            found = self._files.sidecars() if self._files else {}
        return {**found, **self._own}

    def stored_tokenizer(self) -> tuple[Tokenizer, dict[str, Any]] | None:
        if self._files is None:
            raise ModelError(
                f"{self.name} comes without a tokenizer, so it reads and draws no text: give token ids as calibration, "
                "or save the tokenizer (tokenizer.save_pretrained(FOLDER)) and set model.name_or_path to that folder"
            )
        return None if isinstance(self._files, Path) else self._files.stored_tokenizer()


def is_torch_module(model: Any) -> bool:
    """Whether an object is a torch module; never if torch is not imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def transformers_source(model: Any) -> MemorySource:
    """A transformers model as a source, with the names, configuration and tensors that `save_pretrained` would write.

    The tokenizer and other files come from the folder, or the copy in the hub's cache, that it was loaded from.

    Raises:
        ModelError: if it is another torch module or a quantised model, if tensors are on the meta device or in a dtype
            that no checkpoint here has, or if transformers cannot give their checkpoint names.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{kind} is a torch module and no transformers model: give a PreTrainedModel (that of a PEFT model is "
            "model.merge_and_unload()), or prune it with sparseopt.pruning.prune_module"
        )
    if getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None):
        raise ModelError(f"the {kind} is quantised: load the model that it was made from, or {_INSTEAD}")
    state = model.state_dict()
    wrong = [f"{name} ({why})" for name, tensor in state.items() if (why := _unreadable(tensor))]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors of the {kind} cannot be read: {listed(wrong, 3)}; load the whole model in float32, "
            f"float16 or bfloat16, without offloading, or {_INSTEAD}"
        )
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [kind], "dtype": str(model.dtype).removeprefix("torch.")}
    generation, own = getattr(model, "generation_config", None), {}
    if generation is not None:
        own["generation_config.json"] = generation.to_json_string().encode()
    what = f"transformers does not say under which names a checkpoint has the tensors of the {kind}"
    tensors = guarded(lambda: _stored_tensors(model, state), what, f"; {_INSTEAD}")
    return MemorySource(model.name_or_path or kind, config, tensors, _files_of(model), own)


def _unreadable(tensor: Any) -> str | None:
    """Why an entry of a state cannot be read; None if it can."""
    # Subclasses of tensors are quantised, or distributed over processes.
    if type(tensor).__name__ != "Tensor":
        return type(tensor).__name__
    if tensor.device.type == "meta":
        return "on the meta device"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return None if dtype in _DTYPES else dtype


def _files_of(model: TransformersModel) -> Source | Path | None:
    """The folder or GGUF file that a model names as its origin, or the hub's copy in the cache."""
    name = model.name_or_path
    place = Path(name or "a model without a name")
    if place.suffix.lower() == ".gguf" and place.is_file():
        return GGUFSource(place)
    if not place.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(name, "config.json", revision=getattr(model.config, "_commit_hash", None))
        except ValueError:  # no name on the hub
            return None
        # For files that the hub is known to lack it returns an object.
        place = Path(found).parent if isinstance(found, str) else place
    return place if any((place / file).is_file() for file in _FILES) else None


def _stored_tensors(model: Any, state: Mapping[str, Any]) -> dict[str, UnreadTensor]:
    """The tensors by checkpoint name, some made from tensors that the module stacks, such as experts."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    def stored_as(tensors: dict[str, Any]) -> dict[str, Any]:
        return revert_weight_conversion(model, tensors)

    # Without values this needs no memory. A tensor that is returned unchanged is only renamed.
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    named = {id(tensor): name for name, tensor in empty.items()}
    stored = stored_as(dict(empty))
    renamed = {key: named[id(tensor)] for key, tensor in stored.items() if id(tensor) in named}
    split = {key: name for name in empty.keys() - renamed.values() for key in stored_as({name: empty[name]})}
    if renamed.keys() | split.keys() != stored.keys():
        raise ModelError("it joins several into one")

    # The experts of a stack are read one after the other.
    @lru_cache(maxsize=1)
    def parts(name: str) -> dict[str, np.ndarray]:
        return {key: as_numpy(tensor) for key, tensor in stored_as({name: state[name].cpu()}).items()}

    def reader(key: str) -> Callable[[], Iterator[np.ndarray]]:
        if key in renamed:
            return partial(_pieces, state[renamed[key]])
        return lambda: iter([parts(split[key])[key]])

    return {key: UnreadTensor(tuple(tensor.shape), _dtype(tensor), reader(key)) for key, tensor in stored.items()}


def _dtype(tensor: Any) -> np.dtype:
    return _DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _pieces(tensor: Any) -> Iterator[np.ndarray]:
    """A torch tensor cut along its first axis, in pieces of about `SLICE` bytes."""
    rows = len(tensor) if tensor.ndim else 0
    parts = tensor.split(max(1, SLICE * rows // max(1, tensor.nbytes))) if rows else [tensor]
    return map(as_numpy, parts)


def as_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor of any dtype, bit for bit; read-only, since it may be the model's own memory."""
    import torch

    host = tensor.detach().cpu().contiguous()
    value = host.reshape(-1).view(torch.uint8).numpy().view(_dtype(host)).reshape(host.shape)
    value.flags.writeable = False
    return value
