"""Floor 0: the machine: versions and devices for every figure, memory had, used and asked for."""

import ctypes
import os
import platform
import re
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CONTROL_GROUPS = Path("/sys/fs/cgroup")
PACKAGES = ("sparseopt", "jax", "jaxlib", "numpy", "scipy", "optax", "flax", "transformers", "torch")


def versions() -> dict[str, str]:
    """Python and the installed ones of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Versions and machine, for every record that carries a figure."""
    import jax

    return {
        "versions": versions(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "devices": [str(d) for d in jax.devices()],
        },
    }


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    # On Linux getrusage counts the parent's pages until exec into a child's peak; the kernel's own mark does not.
    status = Path("/proc/self/status")
    if status.is_file():
        marks = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if marks:
            return int(marks[0][1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int:
    """Memory that this process may still take without swapping.

    It is what the system calls available, or what the control group leaves where that is less. Where neither is known,
    it is the memory that the machine has; 2**63 - 1 if not even that.
    """
    bounds = [_meminfo_available(), _control_group_left()]
    known = [bound for bound in bounds if bound is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return sys.maxsize


def _meminfo_available() -> int | None:
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _control_group_left() -> int | None:
    """What the limit of a container leaves, its page cache counted as free; None without a limit."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        files = [CONTROL_GROUPS / name for name in (limit, used)]
        try:
            most, taken = (file.read_text().strip() for file in files)
            statistics = (files[0].parent / "memory.stat").read_text()
        except OSError:
            continue
        # Version 1 says "no limit" by a number near 2**63.
        if not most.isdigit() or int(most) >= 2**60:
            return None
        reclaimable = re.search(rf"^{cache} (\d+)$", statistics, re.MULTILINE)
        return max(0, int(most) - int(taken) + (int(reclaimable[1]) if reclaimable else 0))
    return None


# glibc's number of the option, and arrays from this size on go back to the system when they are freed.
_M_MMAP_THRESHOLD, _LARGE = -3, 2**20


def return_freed_memory() -> bool:
    """From now on, have the C library give large arrays back to the system as soon as they are freed.

    By itself glibc raises the size up to which it keeps them to 32 MiB, and a run's resident set grows by what lies in
    the gaps. Returns whether the library has that option.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE))
    except (AttributeError, OSError, TypeError):
        return False


_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(given: str | int) -> int:
    """A number of bytes, plain or with its unit as people write it: `8GiB`, `1.5 GB`, `800M`.

    Raises:
        ValueError: for anything else, a text without a unit above all.
    """
    text = f"{given}B" if type(given) is int else str(given)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]i?)b?|b)\s*", text, re.IGNORECASE)
    nbytes = round(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found else 0
    if nbytes < 1:
        raise ValueError(f"an amount of memory is written like 8GiB, 1.5GB or 800M, given {given!r}")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """Bytes as people say them."""
    for unit, shift in (("KiB", 10), ("MiB", 20)):
        if nbytes < 1 << (shift + 10):
            return f"{nbytes / (1 << shift):.1f} {unit}"
    return f"{nbytes / 2**30:.2f} GiB"
