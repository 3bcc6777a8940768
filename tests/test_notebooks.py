"""The notebooks: each executed file matches its source, and each runs and prints the promised results."""

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

# What an executed notebook must have printed; its own assertions must hold too.
PROMISES = {
    "01": [
        r"no grid point beats the prox: L1, L0, MCP, γ = 3, SCAD",
        r"lasso: \d+ non-zeros, \d+ steps, gap \de-0[6-9]",
        r"from lasso +objective .*, 12 of 12 true ones",
        r"chosen: PrimalDual",
        r"tomography: CONVERGED after \d+ steps, gap \de-0[4-9]",
    ],
    "02": [
        r"\d+ pieces, gap \de-(0[4-9]|[1-9]\d)",
        r"GCV: weight .*, rmse 0\.06\d\ncross-validation: weight .*, rmse 0\.06\d",
        r"repaired: weight \d+\.\d, gap \d\.\de-05",
        r"'regions, order 0': 0\.1\d+, 'regions, order 1': 0\.[2-3]\d+",
        r"'smooth, order 0': 0\.1\d+, 'smooth, order 1': 0\.[01]",
    ],
    "03": [
        r"THIS IS NOT SmolLM2-135M",
        r"maiht +0\.\d+ +0\.\d+ +0\.5000",
        r"default: largest held-out error 0\.\d+ in model\.layers\.\d",
        r"default +perplexity +\d+\.\d\d on 3,072 tokens",
        r"'config\.json'.*'model.*safetensors.*'tokenizer",
    ],
    "04": [
        r"no grid point beats the prox of LogSum",
        r"L1 +CONVERGED, \d+ steps",
        r"LogSum +STATIONARY, \d+ steps",
        r"done +penalty=log_sum\.LogSum: runs/log-sum/",
        r"'config\.yaml'.*'records\.jsonl'.*'summary\.json'",
    ],
    "05": [
        r"chosen: \{'alpha': 0\.\d+, 'order': 0\}",
        r"trend filter +0\.3[6-9]\d ± 0\.0\d\d +0\.09\d\d",
        r"trend classifier +accuracy 0\.9[5-7]\d",
    ],
    "06": [
        r"50 levels from .*, largest gap \d\.\de-0[5-9]",
        r"SURE +weight .*, 1\.0\d times the oracle's",
        r"one standard error: weight .*, \d\.\d\d times",
        r"the data choose order 0",
        r"alpha .*, order 0: 1\.\d\d times the oracle's error",
    ],
    "07": [
        r"97 parameters for 1,984 weights per crop",
        r"learnt weights gain (0\.[5-9]|1\.)\d* dB over the best single weight, on (9|1\d) of 12 crops",
        r"row weights +gradient .*, relative error \de-(0[6-9]|1\d)",
        r"64 signals together and one by one: largest difference \de-1\d",
    ],
    "08": [
        r"slices alone 31\.\d+ dB\nanisotropic  32\.\d+ dB\nisotropic    32\.\d+ dB",
        r"spacing \(1, 1, 3\) +31\.\d+ dB",
        r"noise: true 0\.58, estimated 0\.5\d; weight 0\.\d+\nerror 0\.17\d, .*",
        r"error of quadratic smoothing at the best of four weights 0\.(18|19)\d",
        r"699 pieces of street, 808 edges, 392 deaths",
        r"cross-validation weight 1\.\d+, \d+ pieces of equal rate",
        r"order 1: highest rate \d+\.\d deaths on 20 m, \d+ m from a pump",
    ],
    "09": [
        r"THIS IS NOT SmolLM2-135M",
        r"50% zeros, q4_0 +0\.\d+ +0\.\d+ +0\.\d+",
        r"half zeros, four bits +\d+\.\d MB, types F32, Q4_0",
        r"fewer blocks +perplexity +\d+\.\d\d on 3,072 tokens",
    ],
    "10": [
        r"vision transformer +58,138 parameters, accuracy 9[5-9]\.\d %\nconvolutional network +56,522 parameters",
        r"blocks\.1\.down +48 x 192 +80\.0 %",
        r"left out: positions \(a weight of \[16, 48\] that is no linear's\)",
        r"vision transformer +effort good +as pruned +9\d\.\d",
        r"convolutional network +effort most +trained further +9\d\.\d +9\d\.\d +9\d\.\d",
        r"convolutional network +effort most +\d\d\.\d +\d\d\.\d +\d\d\.\d",
    ],
    "11": [
        r"left out: blocks\.0\.depthwise \(a convolution in 32 groups\)",
        r"named: +blocks\.1\.conv2 50 %, blocks\.2\.conv2 50 %, head 50 %",
        r"by table: blocks\.0\.conv1 80 %, blocks\.0\.conv2 40 %,.* blocks\.2\.conv1 80 %\n",
        r"2:4, effort good: accuracy 9\d\.\d %",
        r"trained further +effort good +9\d\.\d +9\d\.\d +9\d\.\d",
        r"bert\.encoder\.layer\.1\.output\.dense +64 x 256 +60\.0 %",
    ],
    "12": [
        r"THIS IS NOT SmolLM2-135M",
        r"report: compared/seed-2/report\.html",
        r"fast +\d+\.\d+ ± \d+\.\d+ over 3 draws",
    ],
    "theory": [
        r"grid 30 × 30 +900 stars +5 groups, at least 5 are needed",
        r"mAIHT +F = .* steps to within 1e-5 of its final value",
        r"after 250 steps: largest difference \de-1\d",
        r"literal, metric of the paper \d+ steps to a gap of 1e-5, \d+ ms\nfused, own metric +\d+ steps",
        r"order 1: best ρ .*, automatic ρ \d+ steps",
    ],
}


def name_of(source):
    """The number of a tutorial; the first word of a page."""
    return source.stem.partition("_")[0]


@pytest.fixture(scope="module")
def build():
    """`notebooks/build.py` as a module."""
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_has_promises_and_its_pair():
    assert [name_of(source) for source in SOURCES] == list(PROMISES)
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == [source.stem for source in SOURCES]


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_the_pair_shows_what_its_source_gives_and_stays_small(build, source):
    """A pair with other cells is stale: changed code must run again, changed text is copied."""
    assert build.stale(source) is None, f"run `python notebooks/build.py run {name_of(source)}`"
    pair = source.with_suffix(".ipynb")
    shown, made = nbformat.read(pair, as_version=4), build.notebook(source)
    texts = ([(cell.source, cell.metadata) for cell in notebook.cells] for notebook in (shown, made))
    assert next(texts) == next(texts), "python notebooks/build.py text"
    drawn = [cell for cell in shown.cells if any("image/png" in out.get("data", {}) for out in cell.get("outputs", []))]
    assert drawn
    for cell in drawn:
        assert len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) > 20, cell.source
    outputs = [output for cell in shown.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert pair.stat().st_size < 2**20


def test_a_pair_with_other_code_or_without_results_is_stale(build, tmp_path, monkeypatch):
    source = tmp_path / "01_small.py"
    source.write_text("# %% [markdown]\n# # A title\n\n# %%\nprint(1)\n")
    assert "is missing" in build.stale(source)
    build.nbformat.write(build.notebook(source), source.with_suffix(".ipynb"))
    assert "not executed" in build.stale(source)
    executed = build.notebook(source)
    executed.cells[-1]["execution_count"] = 1
    build.write(executed, source.with_suffix(".ipynb"))
    assert build.stale(source) is None
    source.write_text("# %% [markdown]\n# # A better title\n\n# %%\nprint(1)\n")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert build.take_over_text() == 0
    assert "A better title" in source.with_suffix(".ipynb").read_text()
    source.write_text("# %% [markdown]\n# # A better title\n\n# %%\nprint(2)\n")
    assert "other code" in build.stale(source)
    assert build.take_over_text() == 1


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_links_between_notebooks_lead_somewhere(source):
    for target in re.findall(r"\]\((\S+\.ipynb)\)", source.read_text(encoding="utf-8")):
        assert (FOLDER / target).with_suffix(".py") in SOURCES


def test_the_penalty_of_ones_own_has_at_most_20_lines(build):
    text = next(cell.source for cell in build.notebook(SOURCES[3]).cells if "\nclass LogSum" in cell.source)
    definition = text[text.index("@so.pytree") :].rstrip()
    assert len(definition.splitlines()) <= 20


def printed(notebook):
    """The standard output of all cells."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_what_is_not_installed_is_skipped_unless_it_is_named(build, tmp_path, monkeypatch, capsys):
    (tmp_path / "01_small.py").write_text("# %%\nprint(1)\n")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "NEEDS", {"01": ("no_such_module", "pip install it")})
    assert build.lacking("02") is None
    assert build.run(tmp_path, []) == 0
    assert build.run(tmp_path, ["01"]) == 1
    assert capsys.readouterr().err == 2 * "SKIPPED: notebook 01 needs no_such_module (pip install it)\n"
    assert not list(tmp_path.glob("*.ipynb"))


@pytest.mark.notebooks
@pytest.mark.parametrize(
    # The environment of `make test-oracle` has torch.
    "number",
    [pytest.param(number, marks=pytest.mark.oracle if number == "11" else ()) for number in PROMISES],
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
    for cell in notebook.cells:
        kinds = {output.output_type for output in cell.get("outputs", [])}
        assert "error" not in kinds
        if "plt.subplots(" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
    text = printed(notebook)
    for promise in PROMISES[number]:
        assert re.search(promise, text), f"the notebook did not print {promise!r}:\n{text}"
