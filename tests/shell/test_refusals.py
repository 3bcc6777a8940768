"""Mistakes on the command line: answered by a sentence and status 2, and nothing is written."""

import json
import shlex

import numpy as np
import pytest

from sparseopt.experiments.read.images import write_image
from tests.experiments.inputs import TOY, write_inputs

TIMES = np.cumsum(np.random.default_rng(0).uniform(0.2, 2, 30))
# A command, and with its further words what is said.
REFUSED = {
    "prune source --output out --calibration file:text.txt": [
        ("--sparsity '0.5;0.6'", "--sparsity takes numbers separated by commas, as in 0.5,0.7, given '0.5;0.6'"),
        ("--sparsity 0.5,0.50", "--sparsity names a number twice: '0.5,0.50'"),
        ("--sparsity 0.5,0.5000001", "every model needs its own output"),
        ("--allocation curves --bounds 0.6,0.8", "the bounds 0.6 and 0.8 cannot meet the total"),
        ("--allocation curves --bounds 0.6", "bounds must be two fractions of zeros"),
        ("--allocation owl", "--allocation owl has ended: `curves` distributes the sparsity by measured losses"),
        ("--bounds low", "bounds must be two fractions of zeros, 0 <= low <= high < 1, as in 0.3,0.8, given 'low'"),
        ("--train-epochs -2", "train_epochs must be at least 0, given -2"),
        ("--method obs", "unknown method 'obs'; known are best, maiht, admm"),
        ("--method wunda", "; did you mean 'wanda'?"),
        ("--method wanda --preset paper", "method 'wanda' has no presets, given preset 'paper'; leave the preset out"),
        ("--weighting residul", "unknown weighting 'residul'; known are uniform, residual; did you mean 'residual'?"),
        ("--output-weights x", "unknown output_weights 'x'; known are uniform, gradient"),
        ("--dtype int8", "unknown dtype 'int8'; known are float32, float16, bfloat16"),
        ("--bos always", "unknown bos 'always'; known are auto, yes, no"),
        ("--propagate 1.5", "propagate must lie in [0, 1], given 1.5"),
        ("--sparsity 1.0", "sparsity must lie in [0, 1), given 1.0"),
        ("--ridge nan", "ridge must be finite, given nan"),
        ("--seqlen 1", "seqlen must be at least 2, given 1"),
        ("--seed 3", "seed is for window_choice 'random', and it is 'spread'; leave the seed out"),
        ("--penalty ridge", "unknown penalty 'ridge'; known are l1, l0, mcp, scad, group_l2"),
        ("--penalty mcp --method wanda", "only method 'maiht' accepts a penalty"),
        ("--bits int4:-8", "bits 'int4:-8' needs groups of at least 1 input, as in int4:64"),
        ("--pattern 4:2", "pattern '4:2' must keep between 1 and 2 of every 2 weights"),
        ("--pattern", "option '--pattern' requires an argument. See sparseopt"),
        ("", "a window of 512 tokens is longer than the 256 positions that the model supports"),
        ("--calibration file:/nowhere --seqlen 32", "cannot read the text file /nowhere"),
        ("--windows 9000 --seqlen 32", "fewer windows or a shorter seqlen"),
    ],
    "shrink source --output out --calibration file:text.txt --windows 6 --seqlen 32 --train-epochs 0": [
        ("", "nothing would go: give channels, heads, layers or experts below 1"),
        ("--channels '0.5;0.6'", "--channels takes numbers separated by commas, as in 0.5,0.7, given '0.5;0.6'"),
        ("--layers 0.5,0.50", "--layers names a number twice: '0.5,0.50'"),
        ("--heads 1.5", "heads must lie in [0, 1], given 1.5"),
        ("--channels 0", "channels 0 leave nothing: give a fraction above 0"),
        ("--layers 0.5", "layers 0.5 would keep 1.5 of 3 blocks; give 0.3333 for 1 or 0.6667 for 2"),
        ("--layers 0.67,0.5", "layers 0.5 would keep 1.5 of 3 blocks"),
        ("--channels 0.5", "would keep 32 of 64 MLP channels, multiples of 64; give 1 for 64"),
        ("--experts 0.5", "experts 0.5 is for mixtures of experts, and this model has none"),
        ("--heads 0.5 --method sparsegpt", "unknown method 'sparsegpt'"),
        ("--layers 0.67 --block-score=cosine", "--block-score has ended: blocks are always removed by the loss"),
        ("--latency 0.8", "--latency has ended: `parameters` is the budget of a smaller model"),
        ("--heads 0.5 --calibration file:/nowhere", "cannot read the text file /nowhere"),
    ],
    "prune without-bos --output out --calibration file:text.txt --seqlen 64": [("--bos yes", "has no BOS token")],
    "eval without-bos --text file:text.txt --seqlen 64": [("--bos yes", "has no BOS token")],
    "eval": [
        ("absent", "absent"),
        ("source --text file:text.txt --seqlen 0", "need at least 1 window of at least 2 tokens, given 8 windows of 0"),
        (
            "source --text jsonl:rows.jsonl --windows 4 --seqlen 64",
            "has no column 'text' or 'messages' or 'conversations'; its columns are id, body",
        ),
    ],
    "pack": [("source --output out", "`sparseopt pack` has ended: give `prune` an output that ends in .gguf")],
    "unpack": [("packed --output out", "`sparseopt unpack` has ended: a packed folder is unpacked with version 0.3")],
    "demo": [("--output source", "exists already")],
    "run toy.yaml --allow-package tests --output out": [
        ("cuont=2", "cuont: no such key; did you mean 'count'?"),
        ("--shard 3/2", "--shard must be i/n with 1 <= i <= n, as in 2/4, given '3/2'"),
        (
            "--devices all",
            f"the task '{TOY}' works on one device, given devices='all': share its runs with --shard i/n",
        ),
        ("--devices 0", "--devices must be a whole number from 1, or all, given '0'"),
        ("--processes 4", "--coordinator, --processes and --process-id belong to --distributed: add it"),
    ],
    "report": [("absent", "there is no folder")],
    "denoise noisy.png": [
        ("--weight 20 --output other.foo", "unknown file extension: .foo"),
        ("--output noisy.png", "exists already; name another, or give --force"),
    ],
    "trend --weight 1.0 --output x.csv": [
        ("--graph edges.csv --signal line.csv --penalty ridge", "unknown penalty 'ridge'; known are l1, l0, mcp, scad"),
        ("--signal line.csv --order 1 --times t.csv --ends graph", 'times need ends="free"'),
        ("--signal line.csv --times t.csv --graph edges.csv", "times and ends belong to a series"),
        ("--signal line.csv --merge", "merge belongs to the edges"),
        ("--signal line.csv --weight gvc", "weight: is a number or one of gcv, sure, aic, bic, cv, given 'gvc'"),
        ("--signal line.csv --loss poison", "unknown loss 'poison'"),
        ("--signal line.csv --loss quantile", "needs a level between 0 and 1, as in quantile:0.9"),
        ("--signal line.csv --loss logistic --weight gcv", "gcv does not choose among fits of labels"),
        ("--signal line.csv --weight cv --penalty l0", "no rule chooses the weight of the penalty l0"),
        ("--signal line.csv --weight cv --devices all", "a weight is chosen on one device"),
        ("--signal line.csv --order 1 --loss poisson --method fast_admm", "solves the square loss only"),
        ("--signal timed.csv --order 1 --ends graph", "times of the column 'time' are uneven: leave out ends=graph"),
        ("--signal timed.csv --order 1 --times t.csv", "has its times in the column 'time': leave out times"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands of the table read."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("without-bos", "source"):
        write_inputs(folder, intermediate_size=64, num_key_value_heads=2)
        (folder / "source").rename(folder / name)
    (folder / "without-bos" / "tokenizer_config.json").write_text('{"bos_token": null}')
    (folder / "rows.jsonl").write_text(json.dumps({"id": 1, "body": "the quick brown fox"}))
    (folder / "toy.yaml").write_text(f"name: toy\ntask: {TOY}\n")
    write_image(folder / "noisy.png", np.full((8, 8), 7, np.uint8))
    np.savetxt(folder / "t.csv", TIMES)
    np.savetxt(folder / "line.csv", 3 + 2 * TIMES)
    np.savetxt(folder / "timed.csv", np.stack([TIMES, -TIMES], 1), delimiter=",", header="time,up", comments="")
    np.savetxt(folder / "edges.csv", np.stack([np.arange(29), np.arange(1, 30)], 1), fmt="%d", delimiter=",")
    return folder


@pytest.mark.parametrize(
    ("call", "words"),
    [(f"{start} {more}", words) for start, rows in REFUSED.items() for more, words in rows],
)
def test_a_mistake_is_answered_by_a_sentence_and_status_2_before_any_work(folder, command, monkeypatch, call, words):
    def files():
        return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}

    monkeypatch.chdir(folder)
    before = files()
    status, _, err = command(*shlex.split(call))
    assert (status, words in err) == (2, True), err
    assert "Traceback" not in err
    assert files() == before
