"""The benchmarks: each can say what it does, so its options and imports fit. Their pages link all records."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One process for all: most of the time goes into importing JAX.
HELP_OF_ALL = """
import contextlib, io, runpy, sys
for file in sys.argv[1:]:
    sys.argv = [file, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        assert not end.code and "usage" in said.getvalue(), file
    else:
        sys.exit(f"{file} ran")
"""


def test_every_benchmark_has_a_help_text():
    scripts = sorted(map(str, (ROOT / "benchmarks").glob("bench_*.py")))
    assert scripts
    call = [sys.executable, "-c", HELP_OF_ALL, *scripts]
    done = subprocess.run(call, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_pages_link_all_records():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    linked = set(re.findall(r"^```\{machine\} (\w+)$", text, re.MULTILINE))
    assert linked == {file.stem for file in (ROOT / "docs" / "benchmarks").glob("*.jsonl")}
