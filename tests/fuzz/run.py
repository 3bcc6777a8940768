"""`make fuzz`: every target for a limited time in its own process, with hypothesis and, if installed, with atheris.

    python -m tests.fuzz.run --seconds 60 [--target NAME] [--engine hypothesis|atheris]

Prints a JSON line for each target and engine: executions, how many of them ended in a documented error, seconds, and
crashes, each with the exception and a file in `build/fuzz` with the `repr` of the input. A crash is any other
exception, a run of more than `SLOW` seconds of CPU time, an increase in memory of more than `MEMORY` bytes, or the end
of the process. Exits with status 1 if there was a crash.
"""

import argparse
import hashlib
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# Seconds of CPU time, which other processes do not lengthen, and of wall time.
SLOW, HANG = 5.0, 60
INPUTS = Path("build/fuzz")
MEMORY = 2**30


class Slow(Exception):
    """An input that took too long."""


class Recorder:
    """Runs a target on inputs, counts, and keeps one crash for each place that raises."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.executions = self.refused = 0
        self.crashes: dict[str, dict[str, str]] = {}

    def __call__(self, given: Any) -> None:
        self.executions += 1
        start = time.process_time()
        signal.alarm(HANG)
        try:
            self.refused += self.target(given)
            if time.process_time() - start > SLOW:
                raise Slow(f"{time.process_time() - start:.1f} s")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "sparseopt" in f.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
            key = f"{type(error).__name__} at {place}"
            if key not in self.crashes:
                self.crashes[key] = {"error": f"{key}: {str(error)[:300]}", "input": self._keep(given)}
            raise
        finally:
            signal.alarm(0)

    def _keep(self, given: Any) -> str:
        INPUTS.mkdir(parents=True, exist_ok=True)
        name = f"{self.target.name.replace(' ', '-')}-{hashlib.sha256(repr(given).encode()).hexdigest()[:12]}.txt"
        (INPUTS / name).write_text(repr(given))
        return str(INPUTS / name)


def fuzz_by_hypothesis(recorder: Recorder, seconds: float, seed: int) -> None:
    """Batches of examples until the time is over; a crash is shrunk, and the next batch goes on with another seed."""
    import hypothesis
    from hypothesis import strategies as st

    from tests.fuzz.choices import HypothesisChoices

    @st.composite
    def inputs(draw: Any) -> Any:
        return recorder.target.make(HypothesisChoices(draw))

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seed += 1

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=100,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
            report_multiple_bugs=False,
        )
        @hypothesis.given(inputs())
        def batch(given: Any) -> None:
            if time.monotonic() < end:
                recorder(given)

        try:
            batch()
        except KeyboardInterrupt:
            raise
        except BaseException:
            assert recorder.crashes  # kept there; what remains is to go on


def fuzz_by_atheris(recorder: Recorder, seconds: float, seed: int, result: Path) -> None:
    """Coverage-guided; never returns, since libFuzzer ends the process. The record is written as it goes."""
    import atheris

    from tests.fuzz.choices import AtherisChoices

    start = time.monotonic()

    def one(data: bytes) -> None:
        given = recorder.target.make(AtherisChoices(data))
        try:
            recorder(given)
        except KeyboardInterrupt:
            raise
        except BaseException:
            pass  # kept by the recorder
        if recorder.executions % 50 == 0 or time.monotonic() - start > seconds - 1:
            result.write_text(json.dumps(record_of(recorder, "atheris", time.monotonic() - start)))

    # Its own record of what went wrong, and of slow inputs, which ours has too.
    kept = f"-artifact_prefix={result.parent}/"
    arguments = [sys.argv[0], kept, f"-max_total_time={int(seconds)}", f"-seed={seed}", "-max_len=4096"]
    atheris.Setup([*arguments, "-rss_limit_mb=0", "-timeout=60", "-verbosity=0", "-len_control=0"], one)
    atheris.Fuzz()


def record_of(recorder: Recorder, engine: str, seconds: float) -> dict[str, Any]:
    return {
        "target": recorder.target.name,
        "engine": engine,
        "executions": recorder.executions,
        "refused": recorder.refused,
        "seconds": round(seconds, 1),
        "crashes": list(recorder.crashes.values()),
    }


def run_one(name: str, engine: str, seconds: float, seed: int, result: Path) -> None:
    """Fuzz one target in this process and leave the record in a file."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["sparseopt"], enable_loader_override=False):
            targets = all_targets()
    else:
        targets = all_targets()
    target = next(target for target in targets if target.name == name)

    def interrupt(*_: Any) -> None:
        raise Slow(f"more than {HANG} s")

    signal.signal(signal.SIGALRM, interrupt)
    recorder = Recorder(target)
    warm_up(target)
    if target.bounded:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    start = time.monotonic()
    if engine == "atheris":
        fuzz_by_atheris(recorder, seconds, seed, result)
    else:
        fuzz_by_hypothesis(recorder, seconds, seed)
    result.write_text(json.dumps(record_of(recorder, engine, time.monotonic() - start)))


def warm_up(target: Any) -> None:
    """Some inputs before memory is limited and time counts: imports, seeds, first compilations."""
    import random

    class Seeded:
        def __init__(self, seed: int) -> None:
            self.random = random.Random(seed)

        def integer(self, low: int, high: int) -> int:
            return self.random.randint(low, high)

        def blob(self, most: int) -> bytes:
            return self.random.randbytes(self.random.randint(0, most))

    if target.first is not None:
        target(target.first())
    for seed in range(30):
        try:
            target(target.make(Seeded(seed)))
        except Exception:
            continue  # found again, and told, where it counts


def all_targets() -> tuple[Any, ...]:
    from tests.fuzz.solver_targets import SOLVERS
    from tests.fuzz.targets import READERS

    return (*READERS, *SOLVERS)


def engines() -> list[str]:
    try:
        import atheris  # noqa: F401
    except ImportError as error:
        print(f"ATHERIS IS NOT INSTALLED ({error}): hypothesis alone fuzzes, without coverage", file=sys.stderr)
        return ["hypothesis"]
    return ["hypothesis", "atheris"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each target, shared by the engines")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--target", help="one alone, by name")
    parser.add_argument("--engine", choices=["hypothesis", "atheris"])
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.result:
        run_one(given.target, given.engine, given.seconds, given.seed, given.result)
        return 0
    from sparseopt.system.machine import environment

    print(json.dumps({"seed": given.seed, **environment()}), flush=True)
    names = [target.name for target in all_targets()]
    if given.target and given.target not in names:
        parser.error(f"no target {given.target!r}; known are {', '.join(names)}")
    used = [given.engine] if given.engine else engines()
    crashed = False
    for name in [given.target] if given.target else names:
        for engine in used:
            record = _in_a_process(name, engine, given.seconds / len(used), given.seed)
            crashed |= bool(record["crashes"])
            print(json.dumps(record), flush=True)
    return int(crashed)


def _in_a_process(name: str, engine: str, seconds: float, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sparseopt-fuzz-run-") as folder:
        result = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.run",
            "--target",
            name,
            "--engine",
            engine,
            "--result",
            str(result),
        ]
        command += ["--seconds", str(seconds), "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 600, errors="replace")
        if result.is_file():
            record = json.loads(result.read_text())
        else:
            record = {
                "target": name,
                "engine": engine,
                "executions": 0,
                "refused": 0,
                "seconds": seconds,
                "crashes": [],
            }
        # libFuzzer's own ends: 77 a crash, 70 a hang, 71 no memory. A signal is negative.
        if done.returncode:
            ended = f"the process ended with status {done.returncode}"
            record["crashes"].append({"error": ended, "input": done.stderr[-2000:]})
        return record


if __name__ == "__main__":
    sys.exit(main())
