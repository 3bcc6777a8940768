"""`make fuzz`: every target for a limited time in its own process, with hypothesis and, if installed, with atheris.

    python -m tests.fuzz.run --seconds 60 [--target NAME] [--engine hypothesis|atheris]

Prints a JSON line for each target and engine: executions, how many of them ended in a documented error, seconds, and
crashes, each with the exception and a file in `build/fuzz` with the `repr` of the input. A crash is any other
exception, a run of more than `SLOW` seconds of CPU time, an increase in memory of more than `MEMORY` bytes, or the end
of the process. Exits with status 1 if there was a crash.
"""

import argparse
import contextlib
import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
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
        self.start = time.monotonic()

    def __call__(self, given: Any) -> None:
        """Run on one input; what it raises is kept, but for an interrupt."""
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
            self._keep(error, given)
            raise
        finally:
            signal.alarm(0)

    def _keep(self, error: BaseException, given: Any) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "sparseopt" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        key = f"{type(error).__name__} at {place}"
        if key in self.crashes:
            return
        INPUTS.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(repr(given).encode()).hexdigest()[:12]
        file = INPUTS / f"{self.target.name.replace(' ', '-')}-{digest}.txt"
        file.write_text(repr(given))
        self.crashes[key] = {"error": f"{key}: {str(error)[:300]}", "input": str(file)}

    def counts(self) -> dict[str, Any]:
        seconds, crashes = round(time.monotonic() - self.start, 1), list(self.crashes.values())
        return {"executions": self.executions, "refused": self.refused, "seconds": seconds, "crashes": crashes}


@contextlib.contextmanager
def kept_by(recorder: Recorder) -> Any:
    """What is raised inside is among the crashes already; what remains is to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        assert recorder.crashes


def fuzz_by_hypothesis(recorder: Recorder, seconds: float, seed: int) -> None:
    """Batches of examples until the time is over; a crash is shrunk, and the next batch goes on with another seed."""
    import hypothesis

    from tests.fuzz.choices import inputs_of

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
        @hypothesis.given(inputs_of(recorder.target))
        def batch(given: Any) -> None:
            if time.monotonic() < end:
                recorder(given)

        with kept_by(recorder):
            batch()


def fuzz_by_atheris(recorder: Recorder, seconds: float, seed: int, tell: Callable[[], Any]) -> None:
    """Coverage-guided; never returns, since libFuzzer ends the process. The record is written as it goes."""
    import atheris

    from tests.fuzz.choices import AtherisChoices

    def one(data: bytes) -> None:
        given = recorder.target.make(AtherisChoices(data))
        with kept_by(recorder):
            recorder(given)
        if recorder.executions % 50 == 0 or time.monotonic() - recorder.start > seconds - 1:
            tell()

    # Its own record of what went wrong, and of slow inputs, which ours has too.
    with tempfile.TemporaryDirectory() as own:
        arguments = [sys.argv[0], f"-artifact_prefix={own}/", f"-max_total_time={int(seconds)}", f"-seed={seed}"]
        more = ["-max_len=4096", "-rss_limit_mb=0", "-timeout=60", "-verbosity=0", "-len_control=0"]
        atheris.Setup([*arguments, *more], one)
        atheris.Fuzz()


def run_one(name: str, engine: str, seconds: float, seed: int, result: Path) -> None:
    """Fuzz one target in this process and leave its counts in a file."""
    instrumented: Any = contextlib.nullcontext()
    if engine == "atheris":
        import atheris

        instrumented = atheris.instrument_imports(include=["sparseopt"], enable_loader_override=False)
    with instrumented:
        target = next(target for target in all_targets() if target.name == name)

    def interrupt(*_: Any) -> None:
        raise Slow(f"more than {HANG} s")

    signal.signal(signal.SIGALRM, interrupt)
    warm_up(target)
    if target.bounded:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    recorder = Recorder(target)

    def tell() -> None:
        result.write_text(json.dumps(recorder.counts()))

    if engine == "atheris":
        fuzz_by_atheris(recorder, seconds, seed, tell)
    else:
        fuzz_by_hypothesis(recorder, seconds, seed)
    tell()


def warm_up(target: Any) -> None:
    """Some inputs before memory is limited and time counts: imports, seeds, first compilations."""
    from tests.fuzz.choices import SeededChoices

    if target.first is not None:
        target(target.first())
    for seed in range(30):
        with contextlib.suppress(Exception):  # found again, and told, where it counts
            target(target.make(SeededChoices(random.Random(seed))))


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
        command = [sys.executable, "-m", "tests.fuzz.run", "--target", name, "--engine", engine]
        command += ["--result", str(result), "--seconds", str(seconds), "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 600, errors="replace")
        record = {"executions": 0, "refused": 0, "seconds": seconds, "crashes": []}
        if result.is_file():
            record = json.loads(result.read_text())
        # libFuzzer's own ends: 77 a crash, 70 a hang, 71 no memory. A signal is negative.
        if done.returncode:
            ended = f"the process ended with status {done.returncode}"
            record["crashes"].append({"error": ended, "input": done.stderr[-2000:]})
        return {"target": name, "engine": engine, **record}


if __name__ == "__main__":
    sys.exit(main())
