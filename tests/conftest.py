"""Shared by all tests: random arrays from one seeded generator, and the command as a person types it.

Nearly all of the suite's time is spent compiling, and modules, workers and started processes compile the same programs:
all of them share those of one run in a folder that goes with it.
"""

import os
import re
import shutil
import sys
import tempfile

import numpy as np
import pytest

PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
# JAX reads these when it is imported. Whoever started this run made the folder.
_MADE = None if PROGRAMS in os.environ else tempfile.mkdtemp(prefix="sparseopt-programs-")
if _MADE:
    os.environ |= {PROGRAMS: _MADE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import jax  # noqa: E402
from jax.experimental.compilation_cache.compilation_cache import reset_cache  # noqa: E402

from sparseopt import cli  # noqa: E402


def pytest_unconfigure():
    """The programs of this run go with it."""
    if _MADE:
        shutil.rmtree(_MADE, ignore_errors=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251125)


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_module():
    """A compiled program holds maps of memory, of which a process has 65,530: the suite's programs need more."""
    yield
    jax.clear_caches()


@pytest.fixture
def compiled_afresh():
    """Call a function with every program compiled anew, which neither memory nor the folder of programs hands back."""
    seen = []

    def call(function, *arguments):
        # JAX decides once whether it uses the folder.
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()
        jax.clear_caches()
        seen.clear()
        found = jax.device_get(function(*arguments))
        assert "/jax/core/compile/backend_compile_duration" in seen
        assert "/jax/compilation_cache/cache_hits" not in seen
        return found

    def note(event, *_, **__):
        seen.append(event)

    jax.monitoring.register_event_listener(note)
    jax.monitoring.register_event_duration_secs_listener(note)
    yield call
    jax.monitoring.unregister_event_listener(note)
    jax.monitoring.unregister_event_duration_listener(note)
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: exit status and what it printed, without its line breaks."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparseopt", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        shown = capsys.readouterr()
        return status, re.sub(r"\s+", " ", shown.out), re.sub(r"\s+", " ", shown.err)

    return run
