"""Mutation check: defects sown in places that a seeded draw chose, and which of them the fast tests find.

    python benchmarks/mutations.py draw [--seed 44] [--count 30]   places, in proportion to the statements of the rooms
    python benchmarks/mutations.py run [--only NUMBER ...]         JSON lines: which test finds each of mutations.yaml

A defect is one text replaced by another, sown in a copy of the tree. The tests of its room run first, then the others.
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


def run(only: list[int]) -> None:
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
            room = defect["file"].split("/")[1]
            start, failed = time.time(), None
            for chosen in ([f"tests/{room}"], ["tests", f"--ignore=tests/{room}"]):
                if chosen[0] != "tests" and not (tree / chosen[0]).is_dir():
                    continue
                shown = subprocess.run([*PYTEST, *chosen], cwd=tree, capture_output=True, text=True, check=False)
                bad = [line for line in shown.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                failed = bad[0].split()[1] if bad else None
                if failed:
                    break
            record = {"number": number, "file": defect["file"], "kind": defect["kind"], "found_by": failed}
            print(json.dumps(record | {"seconds": round(time.time() - start)}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("--seed", type=int, default=44)
    drawing.add_argument("--count", type=int, default=30)
    running = commands.add_parser("run")
    running.add_argument("--only", type=int, nargs="*", default=[])
    options = parser.parse_args()
    if options.command == "draw":
        draw(options.seed, options.count)
    else:
        run(options.only)
