"""A path in a config is imported only where the caller allows it, and nothing before that."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

import sparseopt as so
from sparseopt.experiments.config import ConfigError, load_config
from sparseopt.experiments.names import PenaltyConfig, find_class, may_import
from sparseopt.experiments.report import gather
from sparseopt.experiments.runs import execute

ROOT = Path(__file__).parent.parent.parent
MODULE = "from pathlib import Path\n\nfrom tests.experiments.toy import Toy\n\nPath('imported').touch()\n\n\n"
CLASS = "class Mine(Toy):\n    pass\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A config beside a module that leaves a file when it is imported."""
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE + CLASS)
    (tmp_path / "mine.yaml").write_text(f"name: mine\ntask: {name}.Mine\ncount: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_without_the_flag_nothing_is_imported_and_the_flag_is_named(folder, command):
    for arguments in (["run", "mine.yaml"], ["run", "mine.yaml", "--dry-run"]):
        status, _, err = command(*arguments, "--output", folder / "runs")
        assert status == 2
        assert f"line 2: task: 'mine_{folder.name}.Mine' is the path of a task outside sparseopt" in err
        assert "--allow-code" in err
        assert f"--allow-package mine_{folder.name}" in err
    assert not (folder / "imported").exists()
    assert str(folder) not in sys.path


def test_with_the_flag_it_runs_and_reports_need_it_too(folder, command):
    assert command("run", "mine.yaml", "--output", "runs", "--allow-code")[0] == 0
    assert (folder / "imported").exists()
    (folder / "imported").unlink()
    sys.modules.pop(f"mine_{folder.name}")
    status, _, err = command("report", "runs")
    assert status == 2
    assert "outside sparseopt" in err
    assert not (folder / "imported").exists()
    assert command("report", "runs", "--allow-code")[0] == 0


def test_a_package_alone_is_looked_up_among_the_installed_ones(folder, command):
    status, _, err = command("run", "mine.yaml", "--allow-package", f"mine_{folder.name}")
    assert status == 2
    assert f"no module 'mine_{folder.name}'" in err
    status, _, err = command("run", "mine.yaml", "--allow-package", "mine")
    assert status == 2
    assert "outside sparseopt" in err
    sys.path.append(str(folder))
    assert command("run", "mine.yaml", "--output", "runs", "--allow-package", f"mine_{folder.name}")[0] == 0


@pytest.mark.processes
def test_a_module_beside_a_config_takes_no_package_s_place(folder):
    """An optional package that is not installed must not come from the folder of a config."""
    (folder / "matplotlib_absent.py").write_text("raise SystemExit('hijacked')")
    code = "import sys\nfrom sparseopt.shell.app import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "import matplotlib_absent"
    call = [sys.executable, "-P", "-c", code, "run", "mine.yaml"]
    done = subprocess.run(call, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert "No module named 'matplotlib_absent'" in done.stderr


def test_comparing_by_a_method_of_one_s_own_needs_the_flag(folder, command):
    status, _, err = command("compare", "nowhere", "--output", folder / "out", "--methods", f"mine_{folder.name}.Mine")
    assert status == 2
    assert "is the path of a pruning method outside sparseopt" in err
    assert not (folder / "imported").exists()


def test_in_python_the_default_allows_nothing_and_a_list_its_packages(folder):
    sys.path.append(str(folder))
    with pytest.raises(ConfigError, match="outside sparseopt"):
        load_config(Path("mine.yaml"))
    with pytest.raises(ConfigError, match="outside sparseopt"):
        load_config(Path("mine.yaml"), allow_code=["tests"])
    assert not (folder / "imported").exists()
    (run,) = load_config(Path("mine.yaml"), allow_code=[f"mine_{folder.name}"])
    assert execute(run, folder / "runs", lambda *_: None).error is None
    with pytest.raises(ValueError, match="outside sparseopt"):
        gather([folder / "runs"])
    assert gather([folder / "runs"], allow_code=True)[0].name == "mine"


def test_which_paths_a_permission_covers():
    assert may_import("a.b", True)
    assert not may_import("a.b", False)
    assert may_import("a.b.c", ["a"])
    assert may_import("a.b.c", ["x", "a.b"])
    assert may_import("a.b", "a")
    assert not may_import("ab.c", ["a"])
    assert not may_import("a.b", [])


def test_classes_of_ours_always_go_by_their_path_and_nothing_else_of_ours_does():
    assert find_class("sparseopt.L1", {}, "penalty") is so.L1
    assert find_class("sparseopt.core.penalties.entries.L1", {}, "penalty") is so.L1
    for path in ("sparseopt.system.files.Path", "sparseopt.pruning.prune_model", "sparseopt.experiments.runs.execute"):
        with pytest.raises(ValueError, match="is no class of sparseopt"):
            find_class(path, {}, "penalty")
    with pytest.raises(ValueError, match="no module 'no_such'"):
        find_class("no_such.X", {}, "penalty", allow_code=True)


def test_what_was_validated_is_what_is_built(monkeypatch):
    own = PenaltyConfig.model_validate(
        {"name": "tests.experiments.toy.CappedL1", "weight": 2.0}, context={"allow_code": True}
    )
    monkeypatch.delitem(sys.modules, "tests.experiments.toy")
    assert type(own.build()).__name__ == "CappedL1"
    assert "tests.experiments.toy" not in sys.modules
    with pytest.raises(ValidationError, match="outside sparseopt"):
        PenaltyConfig.model_validate({"name": "tests.experiments.toy.CappedL1", "weight": 2.0})


def test_a_name_of_a_run_never_leaves_the_output_folder(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "name: a\ntask: denoise\npaper: {source: x, figures: [{values: {}}]}\n"
        "sweep: {list: [{'paper.source': '../../x'}, {'title': '..'}]}\n"
    )
    for run in load_config(tmp_path / "a.yaml"):
        assert (tmp_path / run.subfolder).resolve().parent == (tmp_path / "a").resolve()


def test_a_run_folder_with_links_is_not_written_through(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\ntask: denoise\n")
    (run,) = load_config(tmp_path / "a.yaml")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("kept")
    (tmp_path / "runs" / "a" / "records.jsonl").symlink_to(secret)
    with pytest.raises(ValueError, match=r"has links to other places \(records.jsonl\)"):
        execute(run, tmp_path / "runs", lambda *_: None, again=True)
    assert secret.read_text() == "kept"
