"""Floor 0: files that a crash leaves whole, and folders that one process writes at a time."""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path


class InUse(RuntimeError):
    """A lock that another process holds; the text says which."""


def temporary_of(file: Path) -> Path:
    """The name under which `write_whole` writes; a crash may leave it behind."""
    return file.with_name(f".{file.name}.tmp")


def write_whole(file: Path, text: str) -> None:
    """Write so that a crash leaves the old file or the new one."""
    temporary = temporary_of(file)
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file, which names its owner; the system lets go of it when the process ends, however it ends.

    Raises:
        InUse: if another process holds it.
        OSError: if it cannot be opened.
    """
    with file.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise InUse(lock.read().strip() or "another process") from None
        if not _is_same_file(file, lock.fileno()):
            raise InUse("a process that has ended this moment")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        yield
        lock.truncate(0)


def _is_same_file(file: Path, handle: int) -> bool:
    """Whether the name still means the opened file: its last owner may have removed it between opening and locking."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
