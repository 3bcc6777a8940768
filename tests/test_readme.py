"""What README and pages show: their Python runs, the shell takes their commands, and their figures have records.

Of the benchmarks, that each can say what it does: its options and imports fit.
"""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from sparseopt.shell.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Without the pages that a build of the documentation makes.
WRITTEN = (page for page in (ROOT / "docs").rglob("*.md") if "_generated" not in page.parts)
PAGES = [ROOT / "README.md", *WRITTEN, *(ROOT / "notebooks").glob("*.py")]
TEXTS = {page.name: page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES}
# Measured once, without a record; the page says how.
UNRECORDED = {"79.47", "75.77"}


@pytest.mark.thorough
def test_each_block_of_the_readme_runs_alone_and_prints_what_it_says(capsys):
    blocks, zeros = re.findall(r"```python\n(.*?)```", README, re.DOTALL), []
    for block in blocks:
        namespace = {"__name__": "readme"}
        exec(compile(block, "README.md", "exec"), namespace)
        if "report" in namespace:
            zeros.append([layer.zeros for layer in namespace["report"].layers])
    assert zeros == [[768, 192]]
    said = re.findall(r"^print\(.*\)(?:  |\n)# (.+)$", "".join(blocks), re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said


COMMANDS = typer.main.get_command(app).commands
SHELL = re.compile(rf"^(?:    |\$ )?sparseopt ((?:{'|'.join(COMMANDS)}) .*)$", re.MULTILINE)


def test_every_line_of_a_shell_block_is_a_command_that_the_shell_takes():
    lines = {line for text in TEXTS.values() for line in SHELL.findall(text)}
    assert len(lines) > 50
    for line in lines:
        # What follows > is a file of the shell.
        name, *arguments = shlex.split(line.partition(" > ")[0], comments=True)
        assert COMMANDS[name].make_context(name, arguments).params


def test_options_that_pages_name_exist():
    known = {name: {"--help"} for name in COMMANDS}
    for name, command in COMMANDS.items():
        for option in command.make_context(name, [], resilient_parsing=True).command.params:
            known[name].update(option.opts, option.secondary_opts)
    named = [
        (page, name, flag)
        for page, text in TEXTS.items()
        for name, rest in re.findall(r"sparseopt ([a-z][\w-]*)([^\n`|#&;]*)", text)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)
    ]
    assert [one for one in named if one[2] not in known.get(one[1], ())] == []


def test_the_page_on_installing_names_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    assert [extra for extra in extras if f"| `{extra}` |" not in TEXTS["install.md"]] == []


def test_links_of_the_readme_lead_to_files():
    links = set(re.findall(r"\]\(([^):#]+)[^):]*\)", README))
    assert "docs/install.md" in links
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize("page", ["README.md", "choose.md", "coming-from-pruners.md"])
def test_perplexities_typed_into_a_page_are_in_a_record(page):
    records = [
        json.loads(line)
        for name in ("prune", "quality", "precision", "shrink", "bits")
        for line in (ROOT / "docs" / "benchmarks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    recorded = {f"{record['value']:.2f}" for record in records if record.get("unit") == "perplexity"}
    typed = re.findall(r"(?<![\d.\w-])\d{2,3}\.\d\d(?![\d.])", re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL))
    assert typed
    assert {figure for figure in typed if figure not in recorded | UNRECORDED} == set()


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
