"""Reliability: killed runs, a memory budget, bad inputs and fuzzing. JSON lines.

    python benchmarks/bench_reliability.py [--only inputs,kills,budget,fuzz] [--kills 30] [--memory 1180MiB]

kills    a pruning run that receives thirty SIGKILLs: what was lost, and whether the final result is identical
budget   a checkpoint of three times the memory budget
inputs   bad inputs by kind, and how many ended in a clear error
fuzz     executions, seconds and crashes of every target
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import emit_line, say
from reliability_budget import pruned_within
from reliability_inputs import counted
from reliability_kills import killed_runs

from sparseopt.system.machine import environment, parse_bytes

Lines = Iterator[dict[str, Any]]


def kills(options: argparse.Namespace) -> Lines:
    """One line."""
    with tempfile.TemporaryDirectory() as place:
        yield killed_runs(Path(place), options.kills, options.seed)


def budget(options: argparse.Namespace) -> Lines:
    """One line."""
    with tempfile.TemporaryDirectory() as place:
        yield pruned_within(Path(place), options.memory, options.times, method=options.method)


def inputs(_: argparse.Namespace) -> Lines:
    """One line per kind."""
    return counted()


def fuzz(options: argparse.Namespace) -> Lines:
    """A line for each target and engine, as `make fuzz` prints them."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--seconds", str(options.seconds), "--seed", str(options.seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        for line in process.stdout or ():
            record = json.loads(line)
            if "target" in record:
                yield record


FIGURES: dict[str, Callable[[argparse.Namespace], Lines]] = {
    "inputs": inputs,
    "kills": kills,
    "budget": budget,
    "fuzz": fuzz,
}


def chosen(given: str) -> list[str]:
    """The figures of a comma-separated list."""
    if unknown := [name for name in given.split(",") if name not in FIGURES]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(FIGURES)}")
    return given.split(",")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=chosen, default=list(FIGURES))
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills, and of the fuzzer")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--memory", type=parse_bytes, default=parse_bytes("1180MiB"), help="memory budget")
    parser.add_argument("--times", type=float, default=3.0, help="least size of the model, relative to the budget")
    parser.add_argument("--method", default="wanda", help="for the budget part; mAIHT takes an hour")
    parser.add_argument("--seconds", type=float, default=60.0, help="of fuzzing per target")
    options = parser.parse_args()
    for name in options.only:
        say(name)
        for record in FIGURES[name](options):
            emit_line(name, **record, **environment())


if __name__ == "__main__":
    main()
