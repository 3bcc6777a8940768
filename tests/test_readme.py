"""The README's Python runs and prints what it says; the page on installing is complete."""

import re
import tomllib
from pathlib import Path

import pytest

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


def test_the_page_on_installing_names_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert [extra for extra in project["project"]["optional-dependencies"] if f"| `{extra}` |" not in page] == []


def test_it_is_short():
    assert len(README.splitlines()) <= 90
