"""A wrong call of any command ends with status 2 and one error that names what was given; nothing is written."""

import shlex

import numpy as np
import pytest

from sparseopt.experiments.read.images import write_image
from tests.experiments.inputs import write_inputs

# A command, and for its further words what the error names: an option or field, and what was given.
REFUSED = {
    "prune source --output out --calibration file:text.txt": [
        ("--sparsity '0.5;0.6'", "--sparsity", "'0.5;0.6'"),
        ("--sparsity 0.5,0.50", "--sparsity", "'0.5,0.50'"),
        ("--sparsity 0.5,0.5000001", "own output", "out/0.5"),
        ("--method wunda", "method", "'wunda'"),
        ("--windows 9000 --seqlen 32", "file:text.txt", "9004 windows"),
        ("--seqlen 512", "512 tokens", "256 positions"),
        ("--pattern", "'--pattern'", "argument"),
        ("--outptu x", "no such option", "--output"),
        ("--devices 0", "--devices", "'0'"),
        ("--processes 4", "--processes", "--distributed"),
        ("--log mlfow", "--log", "'mlflow'"),
    ],
    "shrink source --output out --calibration file:text.txt --windows 6 --seqlen 32 --train-epochs 0": [
        ("--layers 0.67,0.5", "layers 0.5", "1.5 of 3 blocks")
    ],
    "compare source --output out": [("--methods wanda,dense", "--methods", "dense")],
    "eval": [
        ("absent", "absent"),
        ("source --text file:text.txt --seqlen 0", "at least 2 tokens", "windows of 0"),
        ("source --text file:text.txt --seqlen 64 --sparsity 0.5", "--sparsity", "--pattern"),
    ],
    "zero-shot source": [("", "--tasks")],
    "demo": [("--output source", "source", "exists already")],
    "doctor": [("now", "argument", "now")],
    "run toy.yaml --allow-package tests --output out": [
        ("cuont=2", "cuont", "'count'"),
        ("--shard 3/2", "--shard", "'3/2'"),
        ("--devices all", "one device", "devices='all'"),
        ("--devices 0", "--devices", "'0'"),
        ("--processes 4", "--processes", "--distributed"),
    ],
    "report": [("absent", "folder", "absent")],
    "denoise noisy.png": [
        ("--weight 20 --output other.foo", "extension", ".foo"),
        ("--output noisy.png", "noisy.png", "--force"),
    ],
    "trend --weight 1.0 --output x.csv": [
        ("--graph edges.csv --signal line.csv --penalty ridge", "penalty", "'ridge'"),
        ("--signal line.csv --order 1 --times t.csv --ends graph", "times", 'ends="free"'),
        ("--signal line.csv --times t.csv --graph edges.csv", "times", "series"),
        ("--signal line.csv --merge", "merge", "edges"),
        ("--signal line.csv --weight gvc", "weight", "'gvc'"),
        ("--signal line.csv --loss poison", "loss", "'poison'"),
        ("--signal line.csv --loss quantile", "quantile", "level"),
        ("--signal line.csv --loss logistic --weight gcv", "gcv", "labels"),
        ("--signal line.csv --weight cv --penalty l0", "weight", "l0"),
        ("--signal line.csv --weight cv --devices all", "weight", "one device"),
        ("--signal line.csv --order 1 --loss poisson --method fused_lasso", "square loss"),
        ("--signal timed.csv --order 1 --ends graph", "'time'", "ends=graph"),
        ("--signal timed.csv --order 1 --times t.csv", "'time'", "times"),
        ("--signal line.csv --season 4 --penalty mcp", "season", "penalty l1"),
        ("--signal line.csv --covariates wind", "given wind"),
        ("--signal line.csv --bounds 1,0", "bounds", "low <= high"),
        ("--signal line.csv --bounds 1", "bounds", "low,high"),
        ("--signal line.csv --monotone sideways", "monotone", "'sideways'", "known are up"),
        ("--signal line.csv --monotone up --season 3", "monotone", "no season"),
        ("--signal line.csv --graph edges.csv --jumps", "jumps", "needs no weight:"),
        ("--signal noisy.png --ends free", "need no weight and no ends: leave that out, or smooth it by"),
    ],
    "trend --output x.csv": [
        ("--signal line.csv --jumps --penalty l1 --order 1", "jumps needs no penalty and no order: leave that out"),
        ("--signal line.csv --jumps --season 4", "jumps needs no season"),
        ("--signal line.csv --jumps --thin gaussian", "thin", "needs noise"),
        ("--signal line.csv --jumps --thin poisson:2", "the law poisson has no noise"),
        ("--signal line.csv --jumps --thin gaussian:a", "thin", "DEVIATION"),
        ("--signal line.csv --thin poisson --order 1", "thin is of jumps"),
        ("--signal noisy.png --thin poisson", "thin is of jumps in a series"),
        ("--signal line.csv --graph edges.csv --jumps --thin poisson", "thin", "in a series"),
        ("--signal line.csv --season 4 --loss poisson", "weight", "give a number"),
        ("--signal line.csv --season 4 --graph edges.csv", "season belongs to a series"),
        ("--signal line.csv --bounds 0,1 --order 1 --loss huber", "bounds", "square loss"),
        ("--signal line.csv --output t.csv", "t.csv exists already"),
    ],
}
CALLS = [(f"{start} {more}", words) for start, rows in REFUSED.items() for more, *words in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands of the table read."""
    folder, times = tmp_path_factory.mktemp("commands"), np.cumsum(np.random.default_rng(0).uniform(0.2, 2, 30))
    write_inputs(folder)
    (folder / "toy.yaml").write_text("name: toy\ntask: tests.experiments.toy.Toy\n")
    write_image(folder / "noisy.png", np.full((8, 8), 7, np.uint8))
    np.savetxt(folder / "t.csv", times)
    np.savetxt(folder / "line.csv", 3 + 2 * times)
    np.savetxt(folder / "timed.csv", np.stack([times, -times], 1), delimiter=",", header="time,up", comments="")
    np.savetxt(folder / "edges.csv", np.stack([np.arange(29), np.arange(1, 30)], 1), fmt="%d", delimiter=",")
    return folder


@pytest.mark.parametrize(("call", "words"), CALLS)
def test_a_wrong_call_ends_with_one_error_and_nothing_is_written(folder, command, monkeypatch, call, words):
    def files():
        return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}

    monkeypatch.chdir(folder)
    before = files()
    status, _, err = command(*shlex.split(call))
    assert (status, err.count("error:"), "Traceback" in err) == (2, 1, False), err
    assert [word for word in words if word not in err] == [], err
    assert files() == before


def test_without_a_command_the_help_is_shown(command):
    status, out, err = command()
    assert (status, "Usage: " in out + err, "error:" in err) == (2, True, False)
