"""The wheel in an empty environment, what the sdist holds, and the lowest versions of the dependencies."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = [sys.executable, "-m", "uv"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
pytestmark = pytest.mark.package


def run(folder, *command, status=0):
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def installed(folder, *packages):
    """The Python of a new environment with these packages."""
    python = folder / "venv" / "bin" / "python"
    run(folder, *UV, "venv", "--quiet", "--python", sys.executable, folder / "venv")
    run(folder, *UV, "pip", "install", "--quiet", "--python", python, *packages)
    return python


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(folder, sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


def test_the_wheel_installs_into_nothing_and_runs_the_quickstart(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    python = installed(tmp_path, wheel)
    where = run(tmp_path, python, "-c", "import sparseopt; print(sparseopt.__file__)")
    assert str(tmp_path / "venv") in where
    assert (Path(where.strip()).parent / "py.typed").is_file()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    # The one that needs no extra.
    (quickstart,) = [block for block in blocks if "so.solve(" in block]
    assert "CONVERGED [0 1 2]" in run(tmp_path, python, "-c", quickstart)
    assert f"-{run(tmp_path, python, '-m', 'sparseopt', '--version').strip()}-" in wheel.name
    # What needs an extra says which, and the configs are inside.
    needs = run(tmp_path, python, "-m", "sparseopt", "prune", "model", "--output", "out", status=2)
    assert "pip install 'sparseopt[prune]'" in needs
    assert "sparseopt are denoise-astronomy," in run(tmp_path, python, "-m", "sparseopt", "run", "nothing", status=2)


def test_the_sdist_holds_what_tests_need(distributions):
    (file,) = distributions.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "configs/maiht-perplexity.yaml"} <= names
    assert {"CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "docs/index.md", "tests/conftest.py"} <= names
    assert "notebooks/01_proximal_operators_and_penalties.py" in names


def test_core_and_trend_filter_pass_with_the_lowest_versions_of_their_dependencies(tmp_path):
    python = installed(tmp_path, "--resolution", "lowest-direct", f"{ROOT}[sklearn,interior]")
    tools = ["pytest", "pytest-xdist", "hypothesis", "networkx", "clarabel"]
    run(tmp_path, *UV, "pip", "install", "--quiet", "--python", python, *tools)
    tests = ["tests/core/test_solve.py", "tests/trend/test_trend_filter.py"]
    run(ROOT, python, "-m", "pytest", "-n", "2", "-m", "not thorough", *tests)
