"""Floor 0: what a figure was measured on and with: versions, machine, peak memory."""

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("sparseopt", "jax", "jaxlib", "numpy", "scipy", "optax", "flax", "transformers")


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
