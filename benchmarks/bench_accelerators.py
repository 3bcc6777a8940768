"""Compile the programs of the package for accelerators that need not be there: memory, operations, collectives.

    python benchmarks/bench_accelerators.py [--record FILE] [--target v5e h100] [--only TEXT ...] [--minutes N] [--list]

One JSON line per program and target. Nothing is run: the figures are those of the compilers. All programs of `programs`
would take hours; `--only` names those whose "kind, name, shape" contains a text, and a program whose line is in the
record is not compiled again.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

# The list of programs is part of the tests; JAX starts when `targets` has said how.
sys.path.append(str(Path(__file__).parent.parent))
from tests.accelerators.targets import HOST, TARGETS, Place, compiler, facts, missing  # noqa: I001
from tests.accelerators.programs import Program, programs

from common import Recorder, options, say


def main() -> None:
    """Compile the selected programs."""
    parser = options(__doc__)
    parser.add_argument("--record", type=Path, help="lines are added to this file; what it has is not compiled again")
    parser.add_argument("--target", nargs="*", choices=[*TARGETS, HOST], default=list(TARGETS))
    parser.add_argument("--only", nargs="*", default=[""], help='texts of "kind, name, shape", in this order')
    parser.add_argument("--minutes", type=float, help="no program is begun later than that")
    parser.add_argument("--list", action="store_true", help="print what would be compiled")
    arguments = parser.parse_args()
    start, recorder = time.monotonic(), Recorder(arguments.record)
    for target in arguments.target:
        if reason := missing(target):
            say(f"SKIPPED {reason}")
            continue
        for program in selected(arguments.only):
            kind, name, shape, devices = program.key
            fields = {"target": target, "kind": kind, "program": name, "shape": shape, "devices": devices}
            if recorder.found(**fields):
                continue
            if arguments.list:
                print(target, *program.key, sep=" | ")
                continue
            if arguments.minutes is not None and time.monotonic() - start > 60 * arguments.minutes:
                sys.exit(f"stopped after {arguments.minutes:g} minutes, before {name} {shape}")
            say(f"{target}: {kind}, {name}, {shape}")
            try:
                found = facts(lambda: program.lower(Place.on(target, devices)))  # noqa: B023
            except (RuntimeError, ValueError) as error:
                found = {"failed": str(error)[:300]}
            recorder.emit("program", **fields, **found, compiler=compiler(target))


def selected(texts: list[str]) -> Iterator[Program]:
    """The programs that contain a text, by text and then as they are listed."""
    every = programs()
    chosen = {key: program for text in texts for key, program in every.items() if text in ", ".join(key[:3])}
    if not chosen:
        sys.exit(f"no program contains {' or '.join(map(repr, texts))}; --list shows all")
    yield from chosen.values()


if __name__ == "__main__":
    main()
