"""The README's Python runs and prints what it says; pages name what exists; the page on installing is complete."""

import re
import tomllib
from pathlib import Path

import pytest
import typer

from sparseopt.shell.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.thorough
def test_each_block_of_the_readme_runs_alone(capsys):
    zeros = []
    for block in BLOCKS:
        namespace = {"__name__": "readme"}
        exec(compile(block, "README.md", "exec"), namespace)
        if "report" in namespace:
            zeros.append([layer.zeros for layer in namespace["report"].layers])
    assert zeros == [[768, 192]]
    # What the comments say is printed.
    said = re.findall(r"^print\(.*\)(?:  |\n)# (.+)$", "".join(BLOCKS), re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said


def test_pages_name_commands_with_options_that_exist():
    group, known = typer.main.get_command(app), dict[str, set[str]]()
    for name, command in group.commands.items():
        whole = command.make_context(name, [], resilient_parsing=True).command
        known[name] = {"--help", *(flag for option in whole.params for flag in (*option.opts, *option.secondary_opts))}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.py")]
    wrong, found = [], 0
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, rest in re.findall(r"sparseopt ([a-z][\w-]*)([^\n`|#&;]*)", text):
            flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)
            found += len(flags)
            wrong += [f"{page.name}: {name} {flag}" for flag in flags if flag not in known.get(name, ())]
    assert found > 100
    assert wrong == []


def test_the_page_on_installing_names_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert [extra for extra in project["project"]["optional-dependencies"] if f"| `{extra}` |" not in page] == []


def test_it_is_short():
    assert len(README.splitlines()) <= 90
