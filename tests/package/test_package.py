"""The wheel and the sdist, each installed into an empty virtual environment, run the README's quickstart."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.package


def quickstart():
    """The Python block of the README that needs no extra."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if "so.solve(" in block]
    return found


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_into_nothing_and_runs_the_quickstart(distributions, tmp_path, kind):
    (file,) = distributions.glob(kind)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTHONPATH", None)

    def run(*arguments):
        done = subprocess.run(
            [python, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "pip", "install", "--quiet", file)
    where = run("-c", "import sparseopt; print(sparseopt.__file__)")
    assert str(tmp_path / "venv") in where
    shown = run("-c", quickstart())
    assert "CONVERGED" in shown
    version = run("-m", "sparseopt", "--version").strip()
    assert f"-{version}" in file.name
    assert (Path(where.strip()).parent / "py.typed").is_file()
    # What needs an extra says which, and the configs are inside.
    for arguments, words in (
        (["prune", "model", "--output", "out"], "pip install 'sparseopt[prune]'"),
        (["run", "nothing"], "the configs that come with sparseopt are denoise-astronomy,"),
    ):
        done = subprocess.run(
            [python, "-m", "sparseopt", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert words in done.stderr


def test_the_sdist_holds_what_tests_need(distributions):
    import tarfile

    (file,) = distributions.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "configs/maiht-perplexity.yaml"} <= names
    assert {"CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"} <= names
    assert {"tests/conftest.py", "notebooks/01_proximal_operators_and_penalties.py", "docs/index.md"} <= names
