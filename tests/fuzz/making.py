"""Helpers that make the bad inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

# Puts an input into a folder and gives the call that meets it.
Make = Callable[[Path], Callable[[], Any]]


def write(files: dict[str, bytes], folder: Path) -> Path:
    """The folder, with these files."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
