"""Shared by the benchmarks: JSON lines, options, timing, and work in processes of its own.

Only NumPy and the standard library are imported: a public solver may need a Python without sparseopt.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# A call is repeated this often, or until all repeats took this many seconds.
REPEATS, LONG = 5, 20.0


def emit(figure: str, **fields: Any) -> dict[str, Any]:
    """Print one JSON line, and return what it says; numbers that are not finite become null."""
    record: dict[str, Any] = {"figure": figure}
    for name, value in fields.items():
        record[name] = None if isinstance(value, float) and not np.isfinite(value) else value
    print(json.dumps(record), flush=True)
    return record


def environment() -> dict[str, Any]:
    from sparseopt.system import machine

    return machine.environment()


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def options(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=(description or "").partition("\n")[0])


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names: each equals a known one, or is part of some."""

    def read(given: str) -> list[str]:
        parts = [part.strip() for part in given.split(",")]
        if unknown := [part for part in parts if not any(part in name for name in known)]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
        return [name for name in known if any(part == name or (part not in known and part in name) for part in parts)]

    return read


def selection(parser: argparse.ArgumentParser, option: str, known: Collection[str]) -> None:
    """Add an option for some of the known names; default: all."""
    parser.add_argument(option, type=names_of(known), default=list(known), help=f"comma-separated: {', '.join(known)}")


class Timed(NamedTuple):
    """What a call took, and its result.

    More seconds than CPU seconds on one core: something else ran at the same time.
    """

    seconds: float
    cpu_seconds: float
    result: Any


def timed(call: Callable[[], Any]) -> Timed:
    """Make a call, and wait for the arrays of its result."""
    start, worked = time.perf_counter(), time.process_time()
    result = call()
    if jax := sys.modules.get("jax"):
        jax.block_until_ready(result)
    return Timed(time.perf_counter() - start, time.process_time() - worked, result)


def median_of(call: Callable[[], Any], first: Iterable[float] = ()) -> dict[str, Any]:
    """The median of the seconds, including those in `first`."""
    spent = list(first)
    while not spent or (len(spent) < REPEATS and sum(spent) < LONG):
        spent.append(timed(call).seconds)
    return {"seconds": statistics.median(spent), "repeats": len(spent)}


def warmed(call: Callable[[], Any]) -> dict[str, Any]:
    """The first call, which compiles, and the median of the others."""
    return {"first_call_seconds": timed(call).seconds, **median_of(call)}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def fastest(times: Mapping[str, float], ours: bool) -> tuple[str | None, float | None]:
    """The name and seconds of the fastest solver of ours, or of the others."""
    found = {name: seconds for name, seconds in times.items() if name.startswith("sparseopt") == ours}
    name = min(found, key=found.__getitem__, default=None)
    return name, None if name is None else found[name]


def pin(cores: int) -> int:
    """Pin this process and its children to a number of cores; returns how many they have."""
    for name in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        os.environ[f"{name}_NUM_THREADS"] = str(cores)
    if cores == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[-cores:])
        return min(cores, len(allowed))
    say("this system cannot pin processes: threads are limited only in libraries that read OMP_NUM_THREADS")
    return cores


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """The result of a call in a process of its own, spawned, since a forked child of one that runs JAX may hang."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def run_parts(parts: Mapping[str, Callable[..., Any]], names: Iterable[str], *given: Any) -> None:
    """The parts of a benchmark, each in a process of its own on one core, in float64."""
    emit("environment", **environment(), cores=pin(1))
    os.environ["JAX_ENABLE_X64"] = "true"
    for name in names:
        say(name)
        try:
            apart(parts[name], *given)
        except BrokenProcessPool as error:
            emit("SKIPPED", part=name, solver=None, reason=str(error))


class Ended(Exception):
    """Why a process has no answer."""


class Child:
    """A process that answers each line of its input by a line of JSON, after a first line about itself."""

    def __init__(self, command: Sequence[Any], limit: float | None = None) -> None:
        # A file, since a full pipe would stop the process. `close` closes it.
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.about = self._answer(limit)
        except Ended:
            self.close()
            raise

    def ask(self, question: Any, limit: float | None = None) -> dict[str, Any]:
        """The answer.

        Raises:
            Ended: if there is none within the limit in seconds, with the reason.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer(limit)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, limit: float | None) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            raise Ended("time limit") from None
        if line:
            return dict(json.loads(line))
        self._process.wait()
        self._errors.seek(0)
        raise Ended(f"ended with code {self._process.returncode}: {last_line(self._errors.read())[:200]}")


def answers() -> Any:
    """For a `Child`: where its answers go. The output of libraries goes to stderr, so that it cannot mix with them."""
    found = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return found


def last_line(text: str) -> str:
    """The last line of an error output, which says what went wrong."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def run_program(command: Sequence[Any]) -> str:
    """The output of a program.

    Raises:
        Ended: if it fails, with the last line of its errors.
    """
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    except OSError as error:
        raise Ended(str(error)) from None
    if done.returncode:
        raise Ended(last_line(done.stderr))
    return done.stdout


class Recorder:
    """Prints lines with versions and machine, if they name none, and appends them to a file, whose lines it knows."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.lines = file, list[dict[str, Any]]()
        if file is not None and file.is_file():
            self.lines += map(json.loads, filter(str.strip, file.read_text(encoding="utf-8").splitlines()))

    def emit(self, figure: str, **fields: Any) -> None:
        """One line."""
        line = emit(figure, **environment() | fields)
        self.lines.append(line)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    def found(self, **fields: Any) -> dict[str, Any] | None:
        wanted = json.loads(json.dumps(fields))
        fits = (line for line in reversed(self.lines) if all(line.get(key) == wanted[key] for key in wanted))
        return next(fits, None)
