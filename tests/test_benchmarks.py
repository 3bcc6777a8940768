"""The benchmarks: each can say what it does, so its options and imports fit."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
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
    scripts = sorted(map(str, FOLDER.glob("bench_*.py")))
    assert len(scripts) > 8
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, *scripts], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
