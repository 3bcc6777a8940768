"""Crash-safe writing of files."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path


class DiskError(OSError):
    """Raised if a file could not be written; the message says which, its size, the free space, and what to do."""


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
        free = "free space unknown"
    return DiskError(
        f"could not write {file}: {error.strerror or error} ({nbytes:,} bytes were to be written, {free}){kept}; "
        f"{REMEDIES.get(error.errno or 0, 'check the disk')} and start the same command again"
    )


def temporary_of(file: Path) -> Path:
    """The name under which `replacing` writes; a crash may leave it behind."""
    return file.with_name(f".{file.name}.tmp")


@contextlib.contextmanager
def replacing(file: Path, nbytes: int, kept: str = "") -> Iterator[Path]:
    """Give a path to write `nbytes` to, which then replaces a file: a crash leaves the old file or the new one.

    Raises:
        DiskError: if writing fails; the old file stays, and `kept` says what else is safe.
    """
    temporary = temporary_of(file)
    try:
        # It might be a link, which would be written through.
        temporary.unlink(missing_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(file)
        _sync(file.parent)
    except OSError as error:
        raise refused(file, nbytes, error, kept) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Force a file's content, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, text: str | bytes) -> None:
    """Replace a file with new content, see `replacing`."""
    content = text.encode() if isinstance(text, str) else text
    with replacing(file, len(content)) as temporary:
        temporary.write_bytes(content)


def append_line(file: Path, text: str) -> None:
    """Append a line to a file, completely or not at all, and force it to disk; a missing file is created."""
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
    """Write all of `content` to an unbuffered stream, whose `write` may accept only a part."""
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) or 0 :]
