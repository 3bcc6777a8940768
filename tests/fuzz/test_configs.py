"""Configs that are no YAML, too large, or name code that nobody allowed."""

import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparseopt.experiments.config import ConfigError, load_config
from tests.fuzz.damage import a_value_or, damaged, damaged_values, fuzzed, refused, written

BASE = "name: a\ntask: denoise\n"
LETTERS = list(zip("abcdefgh", "bcdefghi", strict=True))
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n"
LAUGHS += "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in LETTERS)
MERGES = "a: &a {x: 1}\n"
MERGES += "".join(f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in LETTERS)
GRID = BASE + "sweep: {{grid: {{{}}}}}"
INVALID = [
    ("", "must hold a mapping"),
    ("name: !!python/object/apply:os.system [ls]", "give plain values"),
    ("name: !!binary aGk=", "give plain values"),
    (LAUGHS, "with aliases written out"),
    (MERGES, "with aliases written out"),
    ("a: &a [*a]\n", "an alias of a block inside that block"),
    ("a: " + "[" * 10_000, "blocks inside each other"),
    ("a: " + "x" * 2**20, "which no config needs"),
    ("a: [" + "1, " * 20_000 + "1]", "more than 10000 values"),
    ("seed: " + "9" * 6000, "does not fit its type"),
    (BASE + "seed: !!int x", "does not fit its type"),
    (BASE + "seed: " + "9" * 100, "at most 64 fit"),
    ('name: "\\UFFFFFFFF"', "not valid YAML"),
    ('name: "\\ud800"', "half a character"),
    ("name: \udcff", "is not text in UTF-8"),
    ("1: x\n", "the key 1 is not text"),
    ("? !!binary aGk=\n: 1\n", "the key aGk= is not text"),
    ("? [a, b]\n: c\n", "not valid YAML"),
    ("name: a\n---\nname: b\n", "not valid YAML"),
    ("name: a\ntask: [denoise]\n", "must be the name of a task"),
    ("name: ../../etc\ntask: denoise\n", "name: string should match pattern"),
    (GRID.format(", ".join(f"a{i}: [{'1, ' * 100}]" for i in range(5))), "runs, at most 5,000 are possible"),
    (GRID.format("a." * 300 + "b: [1]"), "301 parts"),
    (GRID.format(f"title: [{'x' * 999}]"), "vary fewer"),
    (BASE + "sweep: {grid: true}", "dictionary, given True"),
]
RUNS_CODE = "importing it runs whatever code its module holds"
CODE = [
    ("name: a\ntask: CANARY.Own\n", f"line 2: task: .*{RUNS_CODE}.*--allow-code"),
    (BASE + "penalty: {name: CANARY.Own, weight: 1}\n", f"line 3: penalty.name: .*{RUNS_CODE}"),
    (BASE + "sweep: {list: [{penalty: {name: CANARY.Own}}]}", RUNS_CODE),
    (BASE + "penalty: {name: l1}\nsweep: {grid: {penalty.name: [CANARY.Own]}}", RUNS_CODE),
    ("name: a\ntask: prune\nmethod: CANARY.Own\n", RUNS_CODE),
    ("name: a\ntask: prune\nmethod: {name: CANARY.Own}\n", RUNS_CODE),
    ("name: a\ntask: trend\nsignal: y.csv\nmethod: {name: CANARY.Own}\n", "cannot be used"),
    ("name: a\ntask: prune\nmethod: sparseopt.pruning.prune_model", "no class of"),
    ("name: a\ntask: sparseopt.system.files.Path", "no class of sparseopt"),
    ("name: a\ntask: os.system", RUNS_CODE),
    ("name: a\ntask: ..os.system", "unknown task"),
    ("name: a\ntask: os.sys tem", "unknown task"),
]


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The name of a module that can be imported, and is not."""
    (tmp_path / "canary_of_tests.py").write_text("class Own:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "canary_of_tests"
    assert "canary_of_tests" not in sys.modules, "code was imported that nobody allowed"


@pytest.mark.parametrize(("text", "part"), INVALID, ids=lambda value: repr(value)[:40])
def test_an_invalid_config(tmp_path, text, part):
    content = text.encode("utf-8", "surrogateescape")
    refused(ConfigError, part, load_config, written(tmp_path, **{"a.yaml": content}) / "a.yaml")


@pytest.mark.parametrize("allowed", [(), ["canary"]], ids=["nothing allowed", "another package allowed"])
@pytest.mark.parametrize(("text", "part"), CODE, ids=lambda value: repr(value)[:70])
def test_a_config_that_names_code(tmp_path, canary, text, part, allowed):
    file = written(tmp_path, **{"a.yaml": text.replace("CANARY", canary).encode()}) / "a.yaml"
    refused(ConfigError, f"(?s){part}", lambda: load_config(file, allow_code=allowed))


SEEDS = (
    {"name": "a", "task": "denoise", "picture": {"name": "camera", "size": 32}, "penalty": {"name": "l1", "weight": 1}},
    {"name": "a", "task": "prune", "method": "wanda", "sweep": {"grid": {"sparsity": [0.5]}, "list": [{"seed": 1}]}},
    {"name": "a", "task": "trend", "signal": "y.csv", "graph": "e.csv", "paper": {"source": "x", "differs": ["y"]}},
    {"name": "a", "task": "canary_of_tests.Own", "method": {"name": "canary_of_tests.Own", "weight": 1}},
    {"name": "a", "task": "denoise", "penalty": {"name": "sparseopt.core.penalties.entries.MCP", "gamma": 2}},
)
LINES = ["&a [*a]", "a: &a [1, 1]", "b: [*a, *a]", "<<: {x: 1}", "? [1]", "x: !!timestamp y", "x: 2020-13-45"]
LINES += ["x: @", "[" * 40, "- " * 40, '"\\UFFFFFFFF"', "x: 1:99:99", "x: 0b", "x: .inf", "---", "%YAML 9.9", "\t"]
LINES += ["=: =", "\x00", "x: 1_000_", "\ufeff", "\u2028", "sweep: {grid: {a.b.c.d: [1]}}", "x: !!binary ="]
LINES += ["!!python/name:os.system x"]


@fuzzed
@given(values=damaged_values(*SEEDS), lines=st.lists(st.sampled_from(LINES), max_size=2), data=st.data())
def test_a_damaged_config(tmp_path, canary, values, lines, data):
    text = yaml.safe_dump(values, sort_keys=False) if values else ""
    content = "\n".join([text, *lines] if data.draw(st.booleans()) else [*lines, text])
    raw = content.encode("utf-8", "surrogatepass")
    raw = data.draw(damaged(raw) if data.draw(st.booleans()) else st.just(raw))
    with a_value_or(ConfigError):
        load_config(written(tmp_path, **{"a.yaml": raw}) / "a.yaml")
    assert canary not in sys.modules
