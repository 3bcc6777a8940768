"""The benchmarks: each can say what it does, so its options and imports fit. Their pages link all records."""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
DOCS = FOLDER.parent / "docs"
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


def test_the_pages_have_few_tables_and_link_all_records():
    pages = [*DOCS.glob("benchmarks/*.md"), DOCS / "scaling.md", DOCS / "accelerators.md", DOCS / "families.md"]
    texts = {page.name: page.read_text(encoding="utf-8") for page in pages}
    assert [name for name, text in texts.items() if len(re.findall(r"^(```\{records\}|\|:?-)", text, re.M)) > 3] == []
    linked = set(re.findall(r"^```\{machine\} (\w+)$", "\n".join(texts.values()), re.M))
    assert linked == {file.stem for file in DOCS.glob("benchmarks/*.jsonl")}
