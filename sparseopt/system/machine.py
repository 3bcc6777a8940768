"""The machine: versions and devices for records, available and used memory, amounts of memory as text."""

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
PACKAGES = ("sparseopt", "jax", "jaxlib", "numpy", "scipy", "optax", "flax", "transformers", "torch")


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return name[1] if name else platform.processor() or "unknown processor"


def environment() -> dict[str, Any]:
    """Versions and machine, for records."""
    import jax

    return {
        "versions": versions(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor(),
            "cores": os.cpu_count(),
            "devices": [str(d) for d in jax.devices()],
        },
    }


def environment_texts(record: Mapping[str, Any]) -> tuple[str, str]:
    """Machine and versions of a record, as text."""
    machine, packages = record["machine"], ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"{machine['system']}, {machine['cores']} cores, {' '.join(machine['devices'])}", packages


# The largest peak of this process that the kernel has since reset.
_forgotten: list[int] = []


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far."""
    return max([_peak_bytes(), *_forgotten])


def peak_from_now() -> Callable[[], int]:
    """A function that returns the largest resident set since this call, or since the start if the system cannot say."""
    before = peak_memory_bytes()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        _forgotten[:] = [before]
    return _peak_bytes


def resident_bytes() -> int:
    """The resident set of this process; 0 if it is not known."""
    return _bytes_in(STATUS, "VmRSS") or 0


def _peak_bytes() -> int:
    # On Linux getrusage counts the parent's pages until exec in a child's peak; the kernel's own mark does not.
    if (mark := _bytes_in(STATUS, "VmHWM")) is not None:
        return mark
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _bytes_in(file: Path, name: str) -> int | None:
    """The amount for a name in one of the kernel's files, which count in kB; None if missing."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def available_memory_bytes() -> int:
    """The memory that this process can still use without swapping.

    The system's available memory, or what the control group leaves if that is less. If neither is known, the memory of
    the machine; 2**63 - 1 if that is not known either.
    """
    bounds = [_bytes_in(MEMINFO, "MemAvailable"), _control_group_left()]
    known = [bound for bound in bounds if bound is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return sys.maxsize


def device_memory_left() -> int | None:
    """What JAX can still use of the first device's memory, in bytes; None if not known, as on a CPU."""
    import jax

    known = jax.devices()[0].memory_stats() or {}
    return known["bytes_limit"] - known.get("bytes_in_use", 0) if "bytes_limit" in known else None


def working_memory_bytes() -> int:
    """The memory that a run can use: available to this process or, if less, left on the first device."""
    left = device_memory_left()
    return available_memory_bytes() if left is None else min(available_memory_bytes(), left)


def _control_group_left() -> int | None:
    """What the limits of a container or scheduler leave, counting page cache as free; None without a limit.

    Groups are nested up to the root that the process sees, and the tightest limit applies.
    """
    bounds = []
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                root = CONTROL_GROUPS / controllers
                own = root / group.lstrip("/")
                bounds += [_group_left(folder) for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return min((bound for bound in bounds if bound is not None), default=None)


def _group_left(folder: Path) -> int | None:
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, taken, statistics = ((folder / name).read_text().strip() for name in (limit, used, "memory.stat"))
        except OSError:
            continue
        # Version 1 writes a number near 2**63 for "no limit".
        if not most.isdigit() or int(most) >= 2**60:
            return None
        reclaimable = re.search(rf"^{cache} (\d+)$", statistics, re.MULTILINE)
        return max(0, int(most) - int(taken) + (int(reclaimable[1]) if reclaimable else 0))
    return None


# glibc's option numbers; with the second values it keeps as much as it ever does by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1}
_BY_ITSELF = {_MMAP_MAX: 2**16, _TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Context in which the C library keeps freed memory for reuse, until `return_freed_memory` or the end.

    The arrays within a compiled program are one piece of memory, freed when it ends. Left to itself, glibc returns
    large pieces at once, and the system clears every page again for the next program: a quarter of the time of pruning
    a small model on a CPU. If it is kept for long, fragmentation makes the resident set grow: return it now and then.
    After the first use, new threads share one heap and so the kept memory: it is best to enter the context before they
    start. Gives False, and does nothing, if the C library has no such options.
    """
    kept = all(_in_library("mallopt", *option) for option in _KEEPING.items())
    try:
        yield kept
    finally:
        if kept:
            for option in _BY_ITSELF.items():
                _in_library("mallopt", *option)
            return_freed_memory()


def return_freed_memory() -> None:
    """Have the C library return all free memory to the system, if it can."""
    _in_library("malloc_trim", 0)


def _in_library(function: str, *arguments: int) -> bool:
    """Whether the C library has this function and the call succeeded."""
    try:
        return bool(getattr(ctypes.CDLL(None), function)(*arguments))
    except (AttributeError, OSError, TypeError):
        return False


_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(given: str | int) -> int:
    """A number of bytes from an int or a text with a unit, such as `8GiB`, `1.5 GB` or `800M`; else a ValueError."""
    text = f"{given}B" if type(given) is int else str(given)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]i?)b?|b)\s*", text, re.IGNORECASE)
    nbytes = round(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found else 0
    if nbytes < 1:
        raise ValueError(f"an amount of memory is written like 8GiB, 1.5GB or 800M, given {given!r}")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """A number of bytes as text, with a suitable unit."""
    for unit, shift in (("KiB", 10), ("MiB", 20)):
        if nbytes < 1 << (shift + 10):
            return f"{nbytes / (1 << shift):.1f} {unit}"
    return f"{nbytes / 2**30:.2f} GiB"
