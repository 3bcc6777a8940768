"""Compilation in the test suite: XLA takes nearly all of its time, so programs are cached and compiled quickly.

Programs are cached in the user's cache folder, separately for each version and processor; the least recently used are
removed first. They are compiled without the optimisation of LLVM and by the emitters that produce less code: a quarter
of the time, with the same HLO passes. A program stays one module for LLVM: several, compiled side by side, cost more in
all, and both cores are busy anyway. `SPARSEOPT_TEST_COMPILE=full` compiles as for a user; `make test-thorough` does so.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax

from sparseopt.system.programs import cache_folder, programs_folder

FULL = os.environ.get("SPARSEOPT_TEST_COMPILE", "quick") == "full"
# Tried one after the other: XLA ends a process that names a flag it does not know.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
SIZE_LIMIT = 2 << 30  # bytes of all kept programs
KEPT = cache_folder() / "test-programs"


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


def set_up() -> None:
    """Tell JAX and every process that the tests start; before the first program, since XLA reads its flags once."""
    kept = programs_folder(KEPT)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(kept))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if not FULL and "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = quick_flags(kept)
    # JAX reads its variables when it is imported, which a plugin of pytest may have done already.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def forget(jitted) -> None:
    """Have a `Jitted` function traced anew."""
    for program in (jitted.usual, *(program for _, program in jitted.on_cpu)):
        program.clear_cache()
