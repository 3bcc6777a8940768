"""Compiled programs on disk, so that a second process need not compile them again.

Only `keep_programs` changes settings of JAX, and only the `sparseopt` command calls it by itself.
"""

import hashlib
import os
import platform
import stat
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax

SWITCH = "SPARSEOPT_KEEP_PROGRAMS"
SIZE_LIMIT = 1 << 30  # bytes of all kept programs


def cache_folder() -> Path:
    """The folder for everything that sparseopt may keep in the user's cache."""
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or home) / "sparseopt"


def programs_folder(kept: Path) -> Path:
    """The folder in `kept` for programs that this JAX can run on this processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else [platform.processor()]
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    key = hashlib.sha256(repr((platform.machine(), features)).encode()).hexdigest()[:8]
    return kept / f"jax{version('jax')}-jaxlib{version('jaxlib')}-{key}"


def kept_files(kept: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files in a folder with their sizes and times; another process may remove some meanwhile."""
    for entry in kept.rglob("*"):
        try:
            found = entry.stat()
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            yield entry, found


def trim(kept: Path, limit: int) -> None:
    """Remove the least recently used files beyond `limit` bytes."""
    files = [(max(found.st_atime, found.st_mtime), found.st_size, entry) for entry, found in kept_files(kept)]
    room = limit
    for _, size, entry in sorted(files, reverse=True):
        room -= size
        if room < 0:
            entry.unlink(missing_ok=True)


def keep_programs() -> Path | None:
    """Have JAX keep compiled programs in the user's cache folder, so that a later process need not compile them again.

    Most of the time of a first call is compilation. Call this once, before the first solve, in a script or notebook
    that runs more than once. The folder, of at most 1 GiB, is separate for each version of JAX and each processor. All
    programs of the process are kept, even ones unrelated to this package. The `sparseopt` command calls this itself;
    importing the package does not.

    Returns:
        The folder, or None if nothing is kept. Nothing is kept if the variable SPARSEOPT_KEEP_PROGRAMS is 0, if
        JAX was told of a folder already (JAX_COMPILATION_CACHE_DIR), or if the folder cannot be written.
    """
    if os.environ.get(SWITCH) == "0" or getattr(jax.config, "jax_compilation_cache_dir", None):
        return None
    try:
        kept = cache_folder() / "programs"
        folder = programs_folder(kept)
        folder.mkdir(parents=True, exist_ok=True)
        # Checking thousands of files takes tenths of a second, so it is done only after new programs.
        checked = kept / "checked"
        if not checked.exists() or checked.stat().st_mtime_ns < folder.stat().st_mtime_ns:
            trim(kept, SIZE_LIMIT)
            checked.touch()
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # a RuntimeError: there is no home
        return None
    if not writable:
        return None
    # A full disk is no reason to warn: the program runs all the same.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return folder
