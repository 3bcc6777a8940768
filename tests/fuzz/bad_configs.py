"""Bad configs: invalid or oversized YAML, and paths to code that is not allowed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseopt.experiments.config import load_config
from tests.fuzz.making import Make, reading

# YAML ----------------------------------------------------------------------------------


def _yaml(content: str | bytes) -> Make:
    return reading(load_config, "a.yaml", content.encode() if isinstance(content, str) else content)


BASE = "name: a\ntask: denoise\n"
ALIASES = list(zip("abcdefgh", "bcdefghi", strict=True))
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n"
LAUGHS += "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in ALIASES)
MERGES = "a: &a {x: 1}\n"
MERGES += "".join(f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in ALIASES)
YAML = (
    ("an empty file", _yaml(""), "must hold a mapping"),
    ("a list", _yaml("- a\n"), "must hold a mapping"),
    ("bytes that are no UTF-8", _yaml(b"name: \xff"), "is not text in UTF-8"),
    ("a tag that makes a Python object", _yaml("name: !!python/object/apply:os.system [ls]"), "give plain values"),
    ("a tag that makes bytes", _yaml("name: !!binary aGk="), "give plain values"),
    ("a million laughs", _yaml(LAUGHS), "with aliases written out"),
    ("a million laughs by merging", _yaml(MERGES), "with aliases written out"),
    ("an alias of itself", _yaml("a: &a [*a]\n"), "an alias of a block inside that block"),
    ("deep nesting", _yaml("a: " + "[" * 50_000), "blocks inside each other"),
    ("a megabyte", _yaml("a: " + "x" * 2**20), "which no config needs"),
    ("more values than any config", _yaml("a: [" + "1, " * 50_000 + "1]"), "more than 10000 values"),
    ("a number of six thousand digits", _yaml("seed: " + "9" * 6000), "does not fit its type"),
    ("a number beyond 64 bits", _yaml(BASE + "seed: " + "9" * 100), "at most 64 fit"),
    ("a number that is none", _yaml(BASE + "seed: !!int x"), "does not fit its type"),
    ("a character beyond Unicode", _yaml('name: "\\UFFFFFFFF"'), "not valid YAML"),
    ("half a character", _yaml('name: "\\ud800"'), "half a character"),
    ("a key that is a number", _yaml("1: x\n"), "the key 1 is not text"),
    ("a key of bytes", _yaml("? !!binary aGk=\n: 1\n"), "the key aGk= is not text"),
    ("a key that is a list", _yaml("? [a, b]\n: c\n"), "not valid YAML"),
    ("a key twice", _yaml("name: a\nname: b\n"), "is given twice"),
    ("two documents", _yaml("name: a\n---\nname: b\n"), "not valid YAML"),
    ("a task that is a list", _yaml("name: a\ntask: [denoise]\n"), "must be the name of a task"),
    ("a name with a way out", _yaml("name: ../../etc\ntask: denoise\n"), "name: string should match pattern"),
    ("ten billion runs", _yaml(BASE + "sweep: {grid: {" + ", ".join(f"a{i}: [{'1, ' * 100}]" for i in range(5)) + "}}"),
     "runs, at most 5,000 are possible"),
    ("a setting of hundreds of parts", _yaml(BASE + "sweep: {grid: {" + "a." * 300 + "b: [1]}}"), "301 parts"),
    ("a sweep that is a truth value", _yaml("name: a\ntask: denoise\nsweep: {grid: true}"), "dictionary, given True"),
    ("a run's name longer than any folder's", _yaml(BASE + f"sweep: {{grid: {{title: [{'x' * 999}]}}}}"), "vary fewer"),
)  # fmt: skip

CANARY = "class Own:\n    pass\n\n\nopen({!r}, 'w').close()\n"


def _code(text: str, **options: Any) -> Make:
    """A config that names a class in a module whose import leaves a file."""

    def make(folder: Path) -> Callable[[], Any]:
        name = f"canary_{folder.name.replace('-', '_')}"
        (folder / f"{name}.py").write_text(CANARY.format(str(folder / "imported")))
        (folder / "a.yaml").write_text(text.replace("CANARY", name))

        def use() -> None:
            sys.path.insert(0, str(folder))
            try:
                load_config(folder / "a.yaml", **options)
            finally:
                sys.path.remove(str(folder))
                assert not (folder / "imported").exists(), "code was imported that nobody allowed"

        return use

    return make


REFUSED = "importing it runs whatever code its module holds"
DENOISE = "name: a\ntask: denoise\n"
DOTTED = (
    ("a task", _code("name: a\ntask: CANARY.Own\n"), "line 2: task: "),
    ("a task, told why", _code("name: a\ntask: CANARY.Own\n"), REFUSED),
    ("a task, told how", _code("name: a\ntask: CANARY.Own\n"), "--allow-code"),
    ("a penalty", _code(DENOISE + "penalty: {name: CANARY.Own, weight: 1}\n"), "line 3: penalty.name: "),
    ("a penalty of a sweep", _code(DENOISE + "sweep: {list: [{penalty: {name: CANARY.Own}}]}"), REFUSED),
    ("a penalty of a grid",
     _code(DENOISE + "penalty: {name: l1}\nsweep: {grid: {penalty.name: [CANARY.Own]}}"), REFUSED),
    ("a method", _code("name: a\ntask: prune\nmethod: CANARY.Own\n"), REFUSED),
    ("a method with arguments", _code("name: a\ntask: prune\nmethod: {name: CANARY.Own}\n"), REFUSED),
    ("a solver", _code("name: a\ntask: trend\nsignal: y.csv\nmethod: {name: CANARY.Own}\n"), "cannot be used"),
    ("a package that is not the one allowed", _code("name: a\ntask: CANARY.Own\n", allow_code=["canary"]), REFUSED),
    ("a function of ours", _yaml("name: a\ntask: prune\nmethod: sparseopt.pruning.prune_model"), "no class of"),
    ("what a module of ours imports", _yaml("name: a\ntask: sparseopt.system.files.Path"), "no class of sparseopt"),
    ("a module of the system", _yaml("name: a\ntask: os.system"), REFUSED),
    ("a relative path", _yaml("name: a\ntask: ..os.system"), "unknown task"),
    ("a path with a space", _yaml("name: a\ntask: os.sys tem"), "unknown task"),
)  # fmt: skip
