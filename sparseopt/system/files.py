"""Floor 0: files that a crash leaves whole, and folders that one process writes at a time."""

import contextlib
import errno
import fcntl
import os
import platform
import shutil
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path


class InUse(RuntimeError):
    """A lock that another process holds; the text says which."""


class DiskError(OSError):
    """A file that the disk did not take; the text says which, how large it is, what is free, and what to do."""


# What to do where the system says why it did not take a file.
REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in the quota of this user",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
    errno.EROFS: "have the disk mounted for writing",
}


def refused(file: Path, nbytes: int, error: OSError, kept: str = "") -> DiskError:
    """The error to raise for a file that could not be written.

    Args:
        file: its name.
        nbytes: that were to be written.
        error: the system's.
        kept: what is safe, for the message.
    """
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


def write_whole(file: Path, text: str) -> None:
    """Write so that a crash leaves the old file or the new one.

    Raises:
        DiskError: if the disk does not take it; the old file stays.
    """
    temporary, content = temporary_of(file), text.encode()
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
    """Put a line behind the others of a file, whole or not at all; a file that is not there is made.

    Raises:
        DiskError: if the disk does not take it; what was there stays.
    """
    content = (text + "\n").encode()
    try:
        # No buffer, which could be written behind the error or by another owner of the file.
        with file.open("ab", buffering=0) as stream:
            before = stream.seek(0, os.SEEK_END)
            try:
                write_all(stream, content)
            except OSError:
                stream.truncate(before)
                raise
    except OSError as error:
        raise refused(file, len(content), error) from error


def write_all(stream: RawIOBase, content: bytes | memoryview) -> None:
    """Write to a stream without a buffer, which may take a part at a time.

    Raises:
        OSError: as the system reports it.
    """
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) or 0 :]


def refuse_links(folder: Path) -> None:
    """Refuse links in a folder that is to be written: one from elsewhere could have any file overwritten through them.

    Raises:
        ValueError: naming them.
    """
    links = sorted(entry.name for entry in folder.iterdir() if entry.is_symlink())
    if links:
        raise ValueError(f"{folder} has links to other places ({', '.join(links[:8])}), no run makes any; remove them")


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file, which names its owner; the system lets go of it when the process ends, however it ends.

    Raises:
        InUse: if another process holds it.
        OSError: if it cannot be opened or locked, is a link, or has a second name: what is linked is left as it is.
    """
    with open(file, "a+", encoding="utf-8", opener=_open_unlinked) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise OSError(error.errno, f"{file.name} cannot be locked ({error.strerror})", str(file)) from error
            lock.seek(0)
            raise InUse(lock.read().strip() or "another process") from None
        if os.fstat(lock.fileno()).st_nlink > 1:
            raise OSError(errno.EMLINK, f"{file.name} has a second name in the file system", str(file))
        if not _is_same_file(file, lock.fileno()):
            raise InUse("a process that has ended this moment")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        yield
        lock.truncate(0)


def _open_unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _is_same_file(file: Path, handle: int) -> bool:
    """Whether the name still means the opened file: its last owner may have removed it between opening and locking."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
