"""The commands `sparseopt run` and `sparseopt report`, and their output."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from sparseopt.experiments.report import Row, Section
from sparseopt.shell.show_experiments import fitting_tables

TOY = "tests.experiments.toy.Toy"
ALLOW = ("--allow-package", "tests")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "toy.yaml"
    values = {"name": "toy", "title": "A toy", "task": TOY, "sweep": {"grid": {"scale": [1.0, 2.0, 3.0]}}}
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_dry_run_shows_every_run_and_writes_nothing(tmp_path, config, command):
    status, out, _ = command("run", config, *ALLOW, "count=2", "--output", tmp_path / "runs", "--dry-run")
    assert status == 0
    assert out.count("new") == 3
    assert f"3 runs, in {tmp_path / 'runs' / 'toy'}, 0 finished" in out
    assert "cores" not in out
    assert not (tmp_path / "runs").exists()


def test_shards_together_do_the_sweep_and_the_report_gathers_it(tmp_path, config, command):
    output = tmp_path / "runs"
    for shard in ("1/2", "2/2"):
        status, out, _ = command("run", config, *ALLOW, "--output", output, "--shard", shard)
        assert status == 0
        assert f"(shard {shard})" in out
    assert out.count("done") == 1
    status, out, _ = command("run", config, *ALLOW, "--output", output)
    assert status == 0
    assert "3 runs, finished before" in out
    assert out.count("kept") == 3
    status, out, _ = command("report", output, *ALLOW, "--output", tmp_path / "report")
    assert status == 0
    assert "A toy" in out
    assert "3 ± 2.2" in out
    assert (tmp_path / "report" / "report.html").is_file()


def test_mistakes_end_before_any_work_with_status_2(tmp_path, config, command):
    status, _, err = command("run", config, *ALLOW, "cuont=2", "--output", tmp_path / "runs")
    assert status == 2
    assert "cuont: no such key; did you mean 'count'?" in err
    assert not (tmp_path / "runs").exists()
    assert command("run", config, *ALLOW, "--shard", "3/2")[0] == 2
    assert command("report", tmp_path / "none")[0] == 2


def test_a_failed_run_ends_with_status_1_after_the_others(tmp_path, config, command):
    status, out, err = command("run", config, *ALLOW, "fail_at=1", "--output", tmp_path / "runs")
    assert status == 1
    assert out.count("FAILED") == 3
    assert "3 of 3 runs failed" in err
    status, out, _ = command("run", config, *ALLOW, "--output", tmp_path / "other")
    assert status == 0


def test_other_settings_in_the_folder_stop_everything_before_work(tmp_path, config, command):
    command("run", config, *ALLOW, "--output", tmp_path / "runs")
    status, _, err = command("run", config, *ALLOW, "count=9", "--output", tmp_path / "runs")
    assert status == 2
    assert err.count("holds the results of other settings") == 3
    assert command("run", config, *ALLOW, "count=9", "--output", tmp_path / "runs", "--again")[0] == 0


def shown(section, width):
    """A section's tables as a terminal of this width shows them."""
    text = io.StringIO()
    for table in fitting_tables(section.table(), width):
        Console(file=text, width=width).print(table)
    return text.getvalue()


@pytest.mark.parametrize("error", [None, "model: RuntimeError: model.layers.0.self_attn.q_proj became non-finite"])
def test_tables_are_whole_at_every_width(error):
    figures = {
        "perplexity": 49.8, "mean_relative_error": 0.0095, "mean_heldout_error": 0.0155, "solver_seconds": 94.2,
        "peak_memory_GiB": 1.1,
    }  # fmt: skip
    rows = [
        Row({"method": method, "pattern": pattern, "sparsity": 0.5}, figures, {}, 1, Path("x"))
        for method in ("best", "maiht:paper") for pattern in ("unstructured", "2:4")
    ]  # fmt: skip
    rows.append(Row({"method": "wanda", "pattern": "2:4", "sparsity": 0.5}, {"error": error}, {}, 1, Path("x")))
    section = Section("compared", "Compared", (*figures, "error"), rows, [], [])
    ends = {"┏": "┓", "┃": "┃", "┡": "┩", "│": "│", "└": "┘"}
    for width in range(30, 180):
        text = shown(section, width)
        lines = [line for line in text.splitlines() if line[0] in ends]
        assert len(lines) > len(rows)
        assert all(line[-1] == ends[line[0]] for line in lines), text
        assert max(map(len, lines)) <= width
        assert "…" not in text
        # Labels and the widest single figure fit: no word of a heading is broken.
        if width >= 60:
            assert all(f" {word} " in text for name in figures for word in name.split("_")), text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_wide_table_is_shown_in_parts_and_no_figure_is_cut(width):
    columns = tuple(f"figure_{number}" for number in range(9))
    rows = [
        Row({"method": method, "order": order}, dict.fromkeys(columns, (1.2345e-05, 4.3e-07)), {}, 3, Path("x"))
        for method in ("doge", "fast_admm") for order in (0, 1)
    ]  # fmt: skip
    section = Section("wide", "Wide", columns, rows, [], [])
    text, tables = shown(section, width), fitting_tables(section.table(), width)
    assert "…" not in text
    assert text.count("1.234e-05 ± 4.3e-07") == len(columns) * len(rows)
    assert text.count("fast_admm") == 2 * len(tables)
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.processes
def test_a_report_started_elsewhere_finds_classes_in_the_current_folder(tmp_path, config, command):
    (tmp_path / "mine.py").write_text("from tests.experiments.toy import Toy\n\n\nclass Mine(Toy):\n    pass\n")
    text = config.read_text().replace(TOY, "mine.Mine")
    config.write_text(text)
    root = str(Path(__file__).parents[2])
    for arguments in (["run", config.name, "--output", "runs", "--allow-code"], ["report", "runs", "--allow-code"]):
        code = f"import sys; sys.path[:0] = [{root!r}]; from sparseopt.shell.app import main; main()"
        call = [sys.executable, "-P", "-c", code, *arguments]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "A toy" in done.stdout
