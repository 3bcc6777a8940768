"""The notebooks: each executed file matches its source, and each runs on small inputs and prints what it promises."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

from tests.models.tiny import random_tensors, tiny_config, write_gguf

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("*_*.py"))
NUMBERS = [source.stem.partition("_")[0] for source in SOURCES]

# What an executed notebook must have printed, besides that its own assertions hold.
PROMISES = {
    "01": [
        r"lasso: \d+ non-zeros, \d+ steps, gap \de-0[6-9]",
        r"tomography: CONVERGED after \d+ steps, gap \de-0[4-9]",
    ],
    "02": [r"GCV: weight .*, rmse 0\.06\d\ncross-validation: weight .*, rmse 0\.06\d"],
    "03": [r"maiht +0\.\d+ +0\.\d+ +0\.5000", r"default +perplexity +\d+\.\d\d on 3,072 tokens"],
    "04": [r"LogSum +STATIONARY, \d+ steps"],
    "05": [r"trend filter +0\.3[6-9]\d ± 0\.0\d\d +0\.09\d\d", r"trend classifier +accuracy 0\.9[5-7]\d"],
    "07": [r"learnt weights gain (0\.[5-9]|1\.)\d* dB over the best single weight, on (9|1\d) of 12 crops"],
    "08": [
        r"slices alone 31\.\d+ dB\nanisotropic  32\.\d+ dB\nisotropic    32\.\d+ dB",
        r"noise: true 0\.58, estimated 0\.5\d; weight 0\.\d+\nerror 0\.17\d, .*",
        r"cross-validation weight 1\.\d+, \d+ pieces of equal rate",
    ],
    "09": [r"50% zeros, q4_0 +0\.\d+ +0\.\d+ +0\.\d+", r"fewer blocks +perplexity +\d+\.\d\d on 3,072 tokens"],
    "10": [
        r"vision transformer +58,138 parameters, accuracy 9[5-9]\.\d %\nconvolutional network +56,522 parameters",
        r"vision transformer +effort good +as pruned +9\d\.\d",
        r"convolutional network +effort most +trained further +9\d\.\d +9\d\.\d +9\d\.\d",
    ],
    "11": [
        r"by table: blocks\.0\.conv1 80 %, blocks\.0\.conv2 40 %,.* blocks\.2\.conv1 80 %\n",
        r"trained further +effort good +9\d\.\d +9\d\.\d +9\d\.\d",
        r"bert\.encoder\.layer\.1\.output\.dense +64 x 256 +60\.0 %",
    ],
    "12": [r"fast +\d+\.\d+ ± \d+\.\d+ over 3 draws"],
    "13": [
        r"BIC +level +1996 +11 coefficients",
        r"one standard error +level +2639 +11 coefficients",
        r"largest gap of the path \d\.\de-(0[7-9]|1\d)",
        r"path of 100 levels +\d+\.\d+ s +1\d\d rounds",
    ],
    "14": [
        r"here +2\.[6-9]\d .*\nSTL +5\.\d\d",
        r"'place': '2009-01', 'kind': 'jump', 'size': -2\d",
        r"jump at 2008-12.* p \d",
    ],
    "15": [r"crude rates +29\d +4[78]\d\n", r"AIC +14\d +18\d\n"],
    "theory": [r"after 250 steps: largest difference \de-1\d", r"order 1: best ρ .*, automatic ρ \d+ steps"],
}


@pytest.fixture(scope="module")
def build():
    """`notebooks/build.py` as a module."""
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shows_a_picture(cell):
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


@pytest.mark.parametrize("source", SOURCES, ids=NUMBERS)
def test_the_pair_shows_what_its_source_gives_and_stays_small(build, source):
    """A pair with other cells is stale: changed code must run again, changed text is copied."""
    assert build.stale(source) is None, f"run `python notebooks/build.py run {source.stem}`"
    pair = source.with_suffix(".ipynb")
    shown, made = nbformat.read(pair, as_version=4), build.notebook(source)
    texts = ([(cell.source, cell.metadata) for cell in notebook.cells] for notebook in (shown, made))
    assert next(texts) == next(texts), "python notebooks/build.py text"
    drawn = [cell for cell in shown.cells if shows_a_picture(cell)]
    assert drawn
    for cell in drawn:
        assert len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) > 20, cell.source
    outputs = [output for cell in shown.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert pair.stat().st_size < 2**20


@pytest.mark.notebooks
@pytest.mark.parametrize(
    # The environment of `make test-oracle` has torch.
    "number",
    [pytest.param(number, marks=pytest.mark.oracle if number == "11" else ()) for number in NUMBERS],
)
def test_it_runs_and_finds_what_it_promises(number, build, tmp_path):
    if lacks := build.lacking(number):
        pytest.skip(lacks)
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    if number in ("03", "09", "12"):
        # A tiny model instead of SmolLM2; most of the time is compilation.
        config = tiny_config(max_position_embeddings=512)
        tensors = random_tensors(config, np.random.default_rng(0))
        environment["SPARSEOPT_MODEL"] = str(write_gguf(tmp_path / "tiny.gguf", config, tensors))
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    command = [sys.executable, FOLDER / "build.py", "run", "--output", tmp_path, number]
    shell = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shell.returncode == 0, shell.stderr
    (file,) = tmp_path.glob("*.ipynb")
    notebook = nbformat.read(file, as_version=4)
    assert [
        cell.source for cell in notebook.cells if "plt.subplots(" in cell.source and not shows_a_picture(cell)
    ] == []
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "error" not in {output.output_type for output in outputs}
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    for promise in PROMISES.get(number, []):
        assert re.search(promise, text), f"the notebook did not print {promise!r}:\n{text}"
