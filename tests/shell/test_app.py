"""The commands and their output."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import typer

from sparseopt.models import open_model
from sparseopt.pruning import audit_sparsity
from sparseopt.shell import app as cli
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.test_pipeline import TOKENIZER

TEXT = "the quick brown fox jumps over the lazy dog, and then the dog tells the fox all about it.\n" * 60


@pytest.fixture
def source(tmp_path, rng):
    folder = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


def test_prune_then_eval(tmp_path, source, command):
    text = f"file:{tmp_path / 'text.txt'}"
    prune = [
        "prune", source, "--output", tmp_path / "out", "--sparsity", 0.5, "--method", "maiht", "--preset", "paper",
        "--calibration", text, "--windows", 6, "--seqlen", 32, "--heldout-windows", 2,
    ]  # fmt: skip
    status, out, _ = command(*prune)
    assert status == 0
    assert f"wrote {tmp_path / 'out'}" in out
    assert "reading the model" in out
    # What was typed is no default.
    assert "--effort" not in out
    assert "default --sparsity" not in out
    assert "default --calibration" not in out
    # On the half of the text that was not calibrated on.
    assert f"perplexity on the second half of {text}: " in " ".join(out.split())
    assert "default --windows" not in out
    assert "calibration on 6 windows of 32 tokens, 192 in all, and 2 held out; digest " in out
    assert "layer 21/21, block 2" in out
    assert "down_proj │ 32x64 │ 0.5000" in out
    assert "peak memory" in out
    for name in ("summary.json", "records.jsonl", "model.safetensors.index.json", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).is_file()
    status, out, _ = command("eval", tmp_path / "out", "--text", text, "--windows", 4, "--seqlen", 64)
    assert status == 0
    assert "on 4 windows of 64 tokens" in out
    assert "sparsity 0.500000: 13,824 zeros of 27,648 weights in 21 linears" in (said := out)
    status, out, _ = command("eval", tmp_path / "out", "--text", text, "--windows", 4, "--seqlen", 64, "--json")
    assert json.loads(out)["zeros"] == 13824
    assert f"; digest {json.loads(out)['digest']} " in said
    # The same text as rows, each long enough for a window, of which every other one is read.
    rows = [{"id": i, "body": TEXT[-len(TEXT) // 2 + 300 * i :][:90]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    asked = ["eval", tmp_path / "out", "--text", f"jsonl:{tmp_path / 'rows.jsonl'}", "--windows", 4, "--seqlen", 64]
    _, out, _ = command(*asked, "--column", "body", "--documents", "separate")
    assert f"on 4 windows of 64 tokens of documents 2, 4, 6, ... of jsonl:{tmp_path}" in out
    status, _, err = command(*asked)
    assert (status, "has no column 'text' or 'messages' or 'conversations'; its columns are id, body" in err) == (
        2,
        True,
    )
    # A requeued job: the same command shows the same figures, and others are refused.
    status, out, _ = command(*prune)
    assert status == 0
    assert "layer 21/21" not in out
    assert "down_proj │ 32x64 │ 0.5000" in out
    assert f"finished before, in {tmp_path / 'out'}" in out
    status, _, err = command(*prune, "--ridge", 0.5)
    assert status == 2
    assert "is not empty (it holds a model); choose another or empty it" in err
    assert "recipe.ridge: None there, 0.5 here" in err


def test_calibration_and_evaluation_begin_with_the_bos_of_the_tokenizer(tmp_path, source, command):
    frame = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]}},
    }
    (source / "tokenizer.json").write_text(json.dumps(json.loads(TOKENIZER) | {"post_processor": frame}))
    text = f"file:{tmp_path / 'text.txt'}"
    few = ["--calibration", text, "--method", "wanda", "--windows", 6, "--seqlen", 32, "--heldout-windows", 2]
    status, out, _ = command("prune", source, "--output", tmp_path / "out", *few)
    assert status == 0
    assert f"6 windows of 32 tokens of the first half of {text}, each starting with the model's BOS (token 1)" in out
    assert "; the rest is left to `sparseopt eval`" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["bos"], summary["recipe"]["bos"]) == (1, "auto")
    score = ["eval", tmp_path / "out", "--text", text, "--windows", 4, "--seqlen", 64]
    _, out, _ = command(*score)
    assert f"on 4 windows of 64 tokens of the second half of {text}, each starting with BOS (token 1)" in out
    behind, without = (json.loads(command(*score, "--json", "--bos", bos)[1]) for bos in ("yes", "no"))
    assert (behind["bos"], without["bos"]) == (1, None)
    assert behind["perplexity"] != without["perplexity"]


def test_a_bos_that_the_tokenizer_lacks_is_refused_before_any_work(tmp_path, source, command):
    (source / "tokenizer_config.json").write_text('{"bos_token": null}')
    for call in (["prune", source, "--output", tmp_path / "out", "--calibration"], ["eval", source, "--text"]):
        status, _, err = command(*call, f"file:{tmp_path / 'text.txt'}", "--bos", "yes", "--seqlen", 64)
        assert status == 2
        assert "has no BOS token" in err
    assert not (tmp_path / "out").exists()


def test_several_sparsities_with_all_that_surrounds_a_method(tmp_path, source, command):
    status, out, _ = command(
        "prune", source, "--output", tmp_path / "out", "--sparsity", "0.4,0.6", "--method", "sparsegpt",
        "--allocation", "curves", "--bounds", "0.3,0.8", "--propagate", 0.2, "--train-epochs", 1,
        "--calibration", f"file:{tmp_path / 'text.txt'}", "--windows", 6, "--seqlen", 32, "--heldout-windows", 2,
    )  # fmt: skip
    assert status == 0
    assert "sparsegpt 40%, 60%: survey, pass 7/7" in out
    assert "layer 42/42" in out
    assert out.count("reconstruction") == out.count("survey of the dense model") == 2
    for share, zeros in (("0.4", 11_059), ("0.6", 16_589)):
        assert f"wrote {tmp_path / 'out' / share}" in out
        assert sum(a.zeros for a in audit_sparsity(tmp_path / "out" / share)) == zeros == round(float(share) * 27_648)


MISTAKES = {
    "list": (["--sparsity", "0.5;0.6"], "--sparsity takes numbers separated by commas, as in 0.5,0.7, given '0.5;0.6'"),
    "twice": (["--sparsity", "0.5,0.50"], "--sparsity names a number twice: '0.5,0.50'"),
    "bounds": (["--allocation", "owl", "--bounds", "0.6,0.8"], "the bounds cannot meet the total"),
    "one bound": (["--allocation", "owl", "--bounds", "0.6"], "bounds must be two shares of zeros"),
    "epochs": (["--train-epochs", "-2"], "train_epochs must be at least 0, given -2"),
    "sparsity": (["--sparsity", "1.5"], "sparsity must lie in [0, 1), given 1.5"),
    "method": (["--method", "obs"], "unknown method 'obs'; known are best, maiht, admm"),
    "window": ([], "a window of 512 tokens is longer than the 256 positions that the model supports"),
    "text": (["--calibration", "file:/nowhere", "--seqlen", "32"], "cannot read the text file /nowhere"),
    "short text": (["--windows", "9000", "--seqlen", "32"], "fewer windows or a shorter seqlen"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered_by_one_sentence_and_status_2(tmp_path, source, command, changes, message):
    text = ["--calibration", f"file:{tmp_path / 'text.txt'}"] if "--calibration" not in changes else []
    status, _, err = command("prune", source, "--output", tmp_path / "out", *text, *changes)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_json_line_stands_alone_also_where_colours_are_forced(tmp_path, source):
    call = [sys.executable, "-m", "sparseopt", "eval", str(source), "--text", f"file:{tmp_path / 'text.txt'}"]
    options = ["--windows", "2", "--seqlen", "32", "--json"]
    environment = {**os.environ, "FORCE_COLOR": "1"}
    done = subprocess.run([*call, *options], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout)["perplexity"] > 1


@pytest.mark.processes
def test_a_platform_that_is_not_there_ends_in_a_sentence_before_any_work(tmp_path, source):
    call = [sys.executable, "-m", "sparseopt", "prune", str(source), "--output", str(tmp_path / "out")]
    options = ["--calibration", f"file:{tmp_path / 'text.txt'}", "--windows", "4", "--seqlen", "32"]
    environment = {**os.environ, "JAX_PLATFORMS": "abacus"}
    done = subprocess.run([*call, *options], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "error: Unable to initialize backend 'abacus'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_home_in_an_option_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["sparseopt", "denoise", "absent.png", "--output=~/x.png"])
    with pytest.raises(SystemExit):
        cli.main()
    assert sys.argv[-1] == f"--output={tmp_path}/x.png"
    assert "absent.png" in capsys.readouterr().err


def test_a_source_that_is_no_model_is_named(tmp_path, command):
    status, _, err = command("eval", tmp_path / "absent")
    assert status == 2
    assert "absent" in err


def test_ctrl_c_keeps_finished_shards_and_says_how_to_go_on(tmp_path, source, command, monkeypatch):
    from sparseopt.shell.prune_progress import PruneProgress

    def interrupt(self, record, done, total):
        if getattr(record, "block", None) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(PruneProgress, "__call__", interrupt)
    status, _, err = command(
        "prune", source, "--output", tmp_path / "out", "--calibration", f"file:{tmp_path / 'text.txt'}",
        "--windows", 4, "--seqlen", 32,
    )  # fmt: skip
    assert status == 130
    assert "3 finished shards" in err
    assert "Run the same command again to resume after them" in err
    assert sorted(f.name for f in (tmp_path / "out").glob("*.safetensors")) == [
        "model-block-0000.safetensors",
        "model-block-0001.safetensors",
        "model-outer.safetensors",
    ]
    assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 15


def test_demo_shows_a_comparison_and_writes_picture_samples_and_models(tmp_path, source, command, monkeypatch):
    from sparseopt.shell import demo

    monkeypatch.setattr(demo, "EVALUATION", (2, 64))
    monkeypatch.setattr(
        demo, "Recipe", lambda **fields: __import__("sparseopt").pruning.Recipe(windows=4, seqlen=32, **fields)
    )
    monkeypatch.chdir(tmp_path)
    calibration = f"file:{tmp_path / 'text.txt'}"
    status, out, err = command("demo", "--source", source, "--calibration", calibration)
    assert status == 0, err
    for label in ("dense", "fast", "Wanda"):
        assert f"│ {label} │" in out
    assert "noise sigma 20, PSNR 22.1" in out
    for order in (0, 1):
        assert (tmp_path / "demo-output" / f"photograph-order-{order}.png").is_file()
    rows = json.loads((tmp_path / "demo-output" / "summary.json").read_text())["photograph"]
    assert all(row["psnr"] > 28 and row["relative_duality_gap"] <= 1e-4 for row in rows)
    assert (tmp_path / "demo-output" / "layer-errors.png").read_bytes().startswith(b"\x89PNG")
    assert "fast:\nThe ocean" in (tmp_path / "demo-output" / "samples.txt").read_text()
    for method in ("fast", "wanda"):
        assert open_model(tmp_path / "demo-output" / method).num_blocks == 3
    assert demo.free_folder(tmp_path / "demo-output").name == "demo-output-2"
    status, _, err = command("demo", "--output", tmp_path / "demo-output")
    assert status == 2
    assert "exists already" in err


@pytest.mark.processes
def test_version_and_help_need_no_heavy_import():
    code = (
        "import sys; sys.argv = ['sparseopt', '--help']; from sparseopt.shell.app import main\ntry: main()\nfinally: "
        + ("assert not {'flax', 'transformers', 'matplotlib'} & set(sys.modules)")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prune" in done.stdout


@pytest.mark.parametrize("name", [each.name or each.callback.__name__ for each in cli.app.registered_commands])
def test_help_ends_with_two_examples_that_the_command_takes(command, name):
    group = typer.main.get_command(cli.app)
    name = name.replace("_", "-")
    lines = group.commands[name].epilog.split("\n\n")[1:]
    assert len(lines) == 2
    for line in lines:
        program, own, *arguments = shlex.split(line)
        assert (program, own) == ("sparseopt", name)
        with group.make_context("sparseopt", [own]) as context:
            assert group.commands[own].make_context(own, arguments, parent=context).params
    status, out, _ = command(name, "-h")
    assert status == 0
    assert lines[1].split()[-1] in out.split("Examples:")[1]


@pytest.mark.processes
def test_a_shell_completes_options_of_a_recipe():
    environment = {
        **os.environ,
        "_SPARSEOPT_COMPLETE": "complete_bash",
        "COMP_WORDS": "sparseopt prune --spars",
        "COMP_CWORD": "2",
    }
    code = "import sys; sys.argv = ['sparseopt']; from sparseopt.shell.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "--sparsity" in done.stdout.split(), done.stderr


@pytest.fixture
def grey(tmp_path):
    from sparseopt.experiments.read.images import write_image

    clean = np.where(np.arange(32) < 16, 60, 190) * np.ones((24, 1))
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, 15, clean.shape), 0, 255).astype(np.uint8)
    write_image(tmp_path / "noisy.png", noisy)
    return clean


def test_denoise_writes_image_picture_and_summary(tmp_path, grey, command):
    from sparseopt.experiments.read.images import read_image

    out_file = tmp_path / "calm.png"
    status, out, err = command("denoise", tmp_path / "noisy.png", "--weight", 20, "--output", out_file)
    assert status == 0, err
    assert "CONVERGED: relative duality gap" in out
    assert np.abs(read_image(out_file) - grey).mean() < 4 < np.abs(read_image(tmp_path / "noisy.png") - grey).mean()
    assert (tmp_path / "calm-before-after.png").is_file()
    summary = json.loads((tmp_path / "calm-summary.json").read_text())
    assert summary["status"] == "CONVERGED"
    assert summary["relative_duality_gap"] <= 1e-4
    status, _, err = command("denoise", tmp_path / "noisy.png", "--weight", 20, "--output", tmp_path / "other.foo")
    assert (status, "unknown file extension: .foo" in err) == (2, True)
    status, _, err = command("denoise", tmp_path / "noisy.png", "--output", out_file)
    assert status == 2
    assert "exists already; name another, or give --force" in err
    free = ["--weight", 20, "--order", 1, "--ends", "free", "--output", out_file, "--force"]
    status, _, err = command("denoise", tmp_path / "noisy.png", *free)
    assert status == 0, err
    assert json.loads((tmp_path / "calm-summary.json").read_text())["ends"] == "free"


def test_trend_fits_a_signal_from_files(tmp_path, command):
    import sparseopt as so

    edges = np.stack([np.arange(29), np.arange(1, 30)], axis=1)
    y = np.repeat([1.0, 5.0, 2.0], 10) + 0.3 * np.random.default_rng(1).standard_normal(30)
    np.savetxt(tmp_path / "edges.csv", edges, fmt="%d", delimiter=",", header="from,to", comments="")
    np.savetxt(tmp_path / "y.csv", y)
    arguments = ["trend", "--graph", tmp_path / "edges.csv", "--signal", tmp_path / "y.csv", "--weight", 1.0]
    status, out, err = command(*arguments, "--output", tmp_path / "fit.csv")
    assert status == 0, err
    assert "30 nodes and 29 edges" in out
    expected = so.trend_filter(y, so.Graph.from_edges(edges, 30), so.L1(1.0), tol=1e-8).value
    head, *lines = (tmp_path / "fit.csv").read_text().splitlines()
    assert head == "node,value,piece"
    nodes, values, pieces = np.array([line.split(",") for line in lines], float).T
    np.testing.assert_array_equal(nodes, np.arange(30))
    np.testing.assert_allclose(values, expected, atol=0.02)
    np.testing.assert_array_equal(pieces, np.cumsum(np.diff(values, prepend=values[0]) != 0))
    summary = json.loads((tmp_path / "fit-summary.json").read_text())
    assert (summary["pieces"], summary["ends"]) == (pieces[-1] + 1, "graph")
    status, out, _ = command(*arguments, "--output", tmp_path / "mcp.npz", "--penalty", "mcp")
    assert status == 0
    assert "no certificate" in out
    status, _, err = command(*arguments, "--output", tmp_path / "x.csv", "--penalty", "ridge")
    assert status == 2
    assert "unknown penalty 'ridge'; known are l1, l0, mcp, scad, group_l2" in err


def test_trend_fits_a_series_with_free_ends(tmp_path, command):
    times = np.cumsum(np.random.default_rng(0).uniform(0.2, 2, 30))
    np.savetxt(tmp_path / "t.csv", times)
    np.savetxt(tmp_path / "y.csv", 3 + 2 * times)
    series = ["trend", "--signal", tmp_path / "y.csv", "--weight", 5.0, "--order", 1, "--times", tmp_path / "t.csv"]
    status, _, err = command(*series, "--output", tmp_path / "fit.csv")
    assert status == 0, err
    fit = np.loadtxt(tmp_path / "fit.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(fit, np.stack([np.arange(30), 3 + 2 * times], axis=1), rtol=1e-12)
    assert json.loads((tmp_path / "fit-summary.json").read_text())["ends"] == "free"
    status, _, err = command(*series, "--ends", "graph", "--output", tmp_path / "x.csv")
    assert status == 2
    assert 'times need ends="free"' in err
    status, _, err = command(*series, "--graph", tmp_path / "e.csv", "--output", tmp_path / "x.csv")
    assert status == 2
    assert "--times and --ends belong to a series" in err
    status, _, err = command(*series, "--merge", "--output", tmp_path / "x.csv")
    assert status == 2
    assert "--merge belongs to the edges" in err


def test_a_column_of_times_is_no_channel(tmp_path, command):
    times = np.cumsum(np.random.default_rng(0).uniform(0.2, 2, 30))
    table = np.stack([times, 3 + 2 * times, -times], axis=1)
    series = ["trend", "--signal", tmp_path / "y.csv", "--weight", 5.0, "--order", 1]
    for heading, kept in (("Time,up,down", [1, 2]), ("time,up", [1])):
        np.savetxt(tmp_path / "y.csv", table[:, [0, *kept]], delimiter=",", header=heading, comments="")
        status, out, err = command(*series, "--output", tmp_path / "fit.csv", "--force")
        assert status == 0, err
        fit = np.loadtxt(tmp_path / "fit.csv", delimiter=",", skiprows=1)
        np.testing.assert_allclose(fit[:, 1:], table[:, [0, *kept]], rtol=1e-12)
        assert (tmp_path / "fit.csv").read_text().startswith(f"node,{heading}\n")
        assert {1: "1 channel: up", 2: "2 channels: up, down"}[len(kept)] in out
        assert json.loads((tmp_path / "fit-summary.json").read_text())["channels"] == heading.split(",")[1:]
    np.savetxt(tmp_path / "t.csv", times)
    for options, text in (
        (["--ends", "graph"], "times of the column 'time' are uneven: leave out --ends graph"),
        (["--times", tmp_path / "t.csv"], "has its times in the column 'time': leave out --times"),
    ):
        status, _, err = command(*series, *options, "--output", tmp_path / "x.csv")
        assert status == 2
        assert text in err
    # What does not increase, and a column of a graph, is a channel; it is named.
    np.savetxt(tmp_path / "y.csv", table[::-1], delimiter=",", header="time,up,down", comments="")
    status, out, err = command(*series, "--output", tmp_path / "falling.csv")
    assert (status, "3 channels: time, up, down" in out) == (0, True), err


def test_a_fit_has_the_ids_and_the_heading_of_its_signal(tmp_path, command):
    (tmp_path / "roads.csv").write_text("from,to\nChur,Bern\nBern,Genf\nGenf,Lugano\n")
    (tmp_path / "rain.csv").write_text("id,rain\nLugano,9\nBern,1.1\nChur,0.9\nGenf,9.2\n")
    arguments = ["trend", "--graph", tmp_path / "roads.csv", "--signal", tmp_path / "rain.csv", "--weight", 0.5]
    status, _, err = command(*arguments, "--output", tmp_path / "fit.csv")
    assert status == 0, err
    rows = [line.split(",") for line in (tmp_path / "fit.csv").read_text().splitlines()]
    assert rows[0] == ["id", "rain", "piece"]
    assert [(row[0], row[2]) for row in rows[1:]] == [("Lugano", "0"), ("Bern", "1"), ("Chur", "1"), ("Genf", "0")]
    np.testing.assert_allclose([float(row[1]) for row in rows[1:]], [8.85, 1.25, 1.25, 8.85], atol=1e-3)
    # The fit is a signal again; at order 1 it has no pieces.
    arguments[4] = tmp_path / "fit.csv"
    status, _, err = command(*arguments, "--order", 1, "--output", tmp_path / "again.csv")
    assert status == 0, err
    assert (tmp_path / "again.csv").read_text().startswith("id,rain\nLugano,")


def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, command):
    monkeypatch.setattr(cli, "app", lambda: __import__("importlib").import_module("tifffile.absent_part"))
    status, _, err = command("denoise")
    assert status == 2
    assert "pip install 'sparseopt[images]'" in err
