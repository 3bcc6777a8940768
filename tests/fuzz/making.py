"""How the bad inputs are made."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Puts an input into a folder and gives the call that meets it.
Make = Callable[[Path], Callable[[], Any]]


def write(files: Mapping[str, bytes], folder: Path) -> Path:
    """The folder, with these files."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def reading(read: Callable[[Path], Any], name: str, content: bytes) -> Make:
    """A file of this content, which the call reads."""

    def make(folder: Path) -> Callable[[], Any]:
        file = write({name: content}, folder) / name
        return lambda: read(file)

    return make
