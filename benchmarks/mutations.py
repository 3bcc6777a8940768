"""Mutation check: defects sown in places that a seeded draw chose, and which of them the fast tests find.

    python benchmarks/mutations.py draw [--seed 44] [--count 30]   places, in proportion to the statements of the rooms
    python benchmarks/mutations.py run [--only NUMBER ...] [--record FILE]     which test finds each of mutations.yaml

A defect is one text replaced by another, sown in a copy of the tree. With the record of the fast tests that `pytest
--cov=sparseopt --cov-context=test` makes (package pytest-cov), the tests that ran the changed lines run, and a defect
that none of them finds counts as not found; without, those of its room, then all others. JSON lines.
"""

import argparse
import ast
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".yaml")
# What `make test` runs.
OTHERS = re.search(r"^OTHERS := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
assert OTHERS is not None
FAST = f"not thorough and not processes and not {OTHERS[1]}"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "--dist", "loadfile", "-m", FAST]


def statements(file: Path) -> list[tuple[str, int, str]]:
    """The simple statements inside the functions of a file: function, line and text."""
    text = file.read_text(encoding="utf-8")
    found, seen = [], set[ast.AST]()
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.Return | ast.If) and node not in seen:
                seen.add(node)
                line = text.splitlines()[node.lineno - 1].strip()
                if not line.startswith(("return None", "return self", "raise ")):
                    found.append((function.name, node.lineno, line))
    return found


def draw(seed: int, count: int) -> None:
    """Print the places: each room has a share by its number of statements, at least one."""
    rooms: dict[str, list[tuple[Path, tuple[str, int, str]]]] = {}
    for file in sorted((ROOT / "sparseopt").rglob("*.py")):
        room = file.relative_to(ROOT / "sparseopt").parts[0]
        rooms.setdefault(room, []).extend((file.relative_to(ROOT), place) for place in statements(file))
    rooms = {room: places for room, places in rooms.items() if len(places) > 20}
    total = sum(map(len, rooms.values()))
    shares = {room: max(1, round(count * len(places) / total)) for room, places in rooms.items()}
    largest = max(shares, key=lambda room: shares[room])
    shares[largest] += count - sum(shares.values())
    generator = random.Random(seed)
    for room, places in sorted(rooms.items()):
        for file, (function, line, text) in sorted(generator.sample(places, shares[room])):
            print(f"{file}:{line} {function}: {text}")


def tests_at(record: Path, file: str, first: int, last: int) -> list[str]:
    """The tests that ran some of a file's lines; those of its room first."""
    from coverage import CoverageData

    data = CoverageData(str(record))
    data.read()
    name = next((name for name in data.measured_files() if name.endswith(f"/{file}")), None)
    lines = data.contexts_by_lineno(name) if name else {}
    found = {test.rpartition("|")[0] for line in range(first, last + 1) for test in lines.get(line, []) if test}
    return sorted(found, key=lambda test: (not test.startswith(f"tests/{file.split('/')[1]}"), test))


def run(only: list[int], record: Path | None) -> None:
    """Sow each defect in a copy of the tree, and run the fast tests until one fails."""
    defects = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    for number, defect in enumerate(defects, 1):
        if only and number not in only:
            continue
        with tempfile.TemporaryDirectory() as place:
            tree = Path(place) / "tree"
            tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for name in tracked.splitlines():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
            file = tree / defect["file"]
            text = file.read_text(encoding="utf-8")
            if text.count(defect["old"]) != 1:
                raise ValueError(
                    f"defect {number}: {defect['file']} has {text.count(defect['old'])} of {defect['old']!r}"
                )
            file.write_text(text.replace(defect["old"], defect["new"]), encoding="utf-8")
            room, start, failed = defect["file"].split("/")[1], time.time(), None
            parts = [[f"tests/{room}"], ["tests", f"--ignore=tests/{room}"]][not (tree / "tests" / room).is_dir() :]
            if record is not None:
                first = text[: text.index(defect["old"])].count("\n") + 1
                found = tests_at(record, defect["file"], first, first + defect["old"].count("\n"))
                (tree / "chosen").write_text("\n".join(found), encoding="utf-8")
                parts = [["@chosen"]] if found else []
            for chosen in parts:
                shown = subprocess.run([*PYTEST, *chosen], cwd=tree, capture_output=True, text=True, check=False)
                bad = [line for line in shown.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                failed = bad[0].split()[1] if bad else None
                if failed:
                    break
            line = {"number": number, "file": defect["file"], "kind": defect["kind"], "found_by": failed}
            print(json.dumps(line | {"seconds": round(time.time() - start)}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("--seed", type=int, default=44)
    drawing.add_argument("--count", type=int, default=30)
    running = commands.add_parser("run")
    running.add_argument("--only", type=int, nargs="*", default=[])
    running.add_argument("--record", type=Path)
    options = parser.parse_args()
    if options.command == "draw":
        draw(options.seed, options.count)
    else:
        run(options.only, options.record)
