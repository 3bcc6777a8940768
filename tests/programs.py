"""How the suite compiles: nearly all of its time is XLA's, so programs are kept between runs and compiled quickly.

Kept: in the user's cache folder, apart for every version and processor, the least recently used first to go.
Quickly: without LLVM's optimisation, and by the emitters that make less code, a quarter of the time and the same
HLO passes. `SPARSEOPT_TEST_COMPILE=full` compiles as a user's program is compiled; `make test-all` runs everything so.
"""

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax

FULL = os.environ.get("SPARSEOPT_TEST_COMPILE", "quick") == "full"
# Tried one after the other: XLA ends a process that names a flag it does not know.
QUICK = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")
SIZE_LIMIT = 2 << 30  # bytes of all kept programs


def root() -> Path:
    """The folder of all kept programs."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "sparseopt" / "test-programs"


def folder() -> Path:
    """The folder of the programs that this JAX can run on this processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else [platform.processor()]
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    key = hashlib.sha256(repr((platform.machine(), features)).encode()).hexdigest()[:8]
    return root() / f"jax{version('jax')}-jaxlib{version('jaxlib')}-{key}"


def quick_flags(kept: Path) -> str:
    """Those of `QUICK` that this jaxlib knows; asked once, and remembered beside the programs."""
    known = kept / "quick-flags"
    if not known.is_file():
        taken = [flag for flag in QUICK if _starts(flag)]
        kept.mkdir(parents=True, exist_ok=True)
        known.write_text(" ".join(taken))
    return known.read_text()


def _starts(flag: str) -> bool:
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    code = "import jax; jax.devices()"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


def trim(limit: int = SIZE_LIMIT) -> None:
    """Remove the least recently used programs beyond the limit."""
    files = [(entry, entry.stat()) for entry in root().rglob("*") if entry.is_file()]
    files.sort(key=lambda pair: max(pair[1].st_atime, pair[1].st_mtime), reverse=True)
    room = limit
    for entry, stat in files:
        room -= stat.st_size
        if room < 0:
            entry.unlink(missing_ok=True)


def set_up() -> None:
    """Tell JAX and every process that the tests start; before the first program, since XLA reads its flags once."""
    kept = folder()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(kept))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if not FULL and "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = quick_flags(kept)
    # JAX reads its variables when it is imported, which a plugin of pytest may have done already.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
