"""Shared by all tests: compilation, random arrays from one seeded generator, the command line."""

import gc
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sparseopt.layers.compiled import Compiled
from sparseopt.shell import app as cli
from sparseopt.system.programs import trim
from tests import programs

programs.set_up()

# A compiled program holds maps of memory, of which a Linux process has 65,530.
MAPS, MAPS_LIMIT = Path("/proc/self/maps"), 30_000


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # once, not in every worker
        trim(programs.KEPT, programs.SIZE_LIMIT)
    # A shell's background job ignores Ctrl-C, and so would the commands that tests start and stop.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    # Tracing makes millions of short-lived objects: a search for cycles after every 700 takes a tenth of all time.
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


def pytest_terminal_summary(terminalreporter):
    """The ten slowest files: seconds of their tests, summed over the workers."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid.split("::")[0]] += report.duration
    if seconds:
        terminalreporter.section("slowest 10 files")
    for file, spent in seconds.most_common(10):
        terminalreporter.write_line(f"{spent:7.1f} s  {file}")


@pytest.fixture(autouse=True)
def _dense_models_are_measured_again():
    if measured := sys.modules.get("sparseopt.pruning.run.measured"):
        measured.forget()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251125)


@pytest.fixture(scope="module", autouse=True)
def _programs_leave_maps_to_others():
    yield
    if not MAPS.is_file() or MAPS.read_bytes().count(b"\n") > MAPS_LIMIT:
        for held in gc.get_objects():
            if isinstance(held, Compiled):
                held._programs.clear()
        jax.clear_caches()
        gc.collect()  # programs are in cycles, which the thresholds above leave alone for very long


@pytest.fixture
def traces_of(monkeypatch):
    """`traces_of(Admm)`: a list that grows by one whenever the solver's step is traced."""

    def watch(solver):
        seen, step = [], solver.step
        monkeypatch.setattr(solver, "step", lambda *arguments: (seen.append(1), step(*arguments))[1])
        return seen

    return watch


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


@pytest.fixture
def done(command):
    """What a command printed that must succeed."""

    def done(*arguments):
        status, out, err = command(*arguments)
        assert status == 0, err
        return out

    return done


@pytest.fixture
def trackers(monkeypatch):
    """What mlflow and wandb are told, each a list of (what, arguments); neither needs to be installed."""

    class Told(list):
        def __getattr__(self, name):
            def call(*given, **named):
                self.append((name, given or named))
                return self

            return call

    told = {"mlflow": Told(), "wandb": Told()}
    for name, tracker in told.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    return told
