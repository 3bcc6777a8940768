"""Stub."""

from collections.abc import Mapping
from typing import Any

from sparseopt.models.files.gguf.header import Value


def metadata_of(source: Any, config: Mapping[str, Any]) -> dict[str, Value]:
    """Stub."""
    del config
    return dict(source.values)
