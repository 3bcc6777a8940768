"""The metadata of a GGUF file to write, from a GGUF source or from a Hugging Face model's files."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from sparseopt.models.files.gguf.architectures import architecture_of
from sparseopt.models.files.gguf.header import Value, text
from sparseopt.models.files.gguf.source import GGUFSource
from sparseopt.models.files.gguf.vocabulary import tokenizer_values
from sparseopt.models.files.memory import IN_MEMORY
from sparseopt.models.files.source import Source

# These describe the file that was read, not the one to write: its parts, types of tensors and places of data.
_OF_THE_FILE = ("split.", "quantize.imatrix.")
_OF_THE_TENSORS = ("general.file_type", "general.quantization_version", "general.alignment")
# Wrong for a smaller model.
_OF_THE_SIZE = ("general.size_label", "general.parameter_count")


def metadata_of(source: Source, config: Mapping[str, Any]) -> dict[str, Value]:
    """The metadata of a file for the model with this configuration, by key.

    Metadata of a GGUF source are kept with their types, and differing fields of the architecture replace them. Other
    sources provide the name, the architecture and the tokenizer, if the model has one. The writer adds
    `general.file_type`, `general.quantization_version` and `general.alignment`.

    Args:
        source: the model to write, or the dense one from which a smaller model is made.
        config: the Hugging Face configuration of the model to write.

    Raises:
        ModelError: if GGUF cannot describe the configuration or the tokenizer.
    """
    name, architecture = architecture_of(config)
    fields = {f"{name}.{key}": value for key, value in architecture.write_config(config).items()}
    if isinstance(source, GGUFSource):
        before = {f"{name}.{key}": value for key, value in architecture.write_config(source.config).items()}
        kept = {
            key: value
            for key, value in source.values.items()
            if not key.startswith(_OF_THE_FILE) and key not in _OF_THE_TENSORS
        }
        return kept if fields == before else _resized(kept, before, fields)
    return {
        "general.architecture": text(name),
        "general.name": text(_short_name(source)),
        **fields,
        **tokenizer_values(source, config, name),
    }


def _resized(kept: dict[str, Value], before: dict[str, Value], fields: dict[str, Value]) -> dict[str, Value]:
    """The metadata of a GGUF file with the fields of a smaller model."""
    prefix = next(iter(fields)).partition(".")[0] + "."
    # A list has an entry for each of the original blocks.
    stale = [key for key, (value, *_) in kept.items() if key.startswith(prefix) and isinstance(value, list)]
    gone = {*stale, *_OF_THE_SIZE, *(before.keys() - fields.keys())}
    kept = {key: value for key, value in kept.items() if key not in gone}
    # What followed from the old fields need not follow from the new ones, so every field is written.
    return kept | {key: value for key, value in fields.items() if key not in kept or before.get(key) != value}


def _short_name(source: Source) -> str:
    """The last component of a folder's path or of a name on the hub, without its revision."""
    path = PurePath(source.name.removesuffix(IN_MEMORY).rstrip("/"))
    return path.name.partition("@")[0] if source.revision else path.name or source.path.resolve().name
