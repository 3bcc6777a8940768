"""Floor 0: files that a crash leaves whole."""

import contextlib
import errno
import os
import shutil
from io import RawIOBase
from pathlib import Path


class DiskError(OSError):
    """A file that could not be written; the text says which, its size, what is free, and what to do."""


REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in the quota of this user",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
    errno.EROFS: "have the disk mounted for writing",
}


def refused(file: Path, nbytes: int, error: OSError, kept: str = "") -> DiskError:
    """The error for a file of `nbytes` that could not be written; `kept` says what is safe."""
    try:
        free = f"{shutil.disk_usage(file.parent).free:,} bytes are free there"
    except OSError:
        free = "how much is free is not known"
    return DiskError(
        f"could not write {file}: {error.strerror or error} ({nbytes:,} bytes were to be written, {free}){kept}; "
        f"{REMEDIES.get(error.errno or 0, 'check the disk')} and start the same command again"
    )


def temporary_of(file: Path) -> Path:
    """The name under which `write_whole` writes; a crash may leave it behind."""
    return file.with_name(f".{file.name}.tmp")


def write_whole(file: Path, text: str | bytes) -> None:
    """Replace a file so that a crash leaves the old one or the new one; a `DiskError` leaves the old one."""
    temporary, content = temporary_of(file), text.encode() if isinstance(text, str) else text
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise refused(file, len(content), error) from error


def append_line(file: Path, text: str) -> None:
    """Append a line to a file, whole or not at all, and force it to the disk; a missing file is created."""
    content = (text + "\n").encode()
    try:
        # Unbuffered: a buffer could still be written after the error.
        with file.open("ab", buffering=0) as stream:
            before = stream.seek(0, os.SEEK_END)
            try:
                write_all(stream, content)
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(before)
                raise
    except OSError as error:
        raise refused(file, len(content), error) from error


def write_all(stream: RawIOBase, content: bytes | memoryview) -> None:
    """Write all of `content` to an unbuffered stream, whose `write` may take a part."""
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) or 0 :]
