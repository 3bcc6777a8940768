"""The command `shrink`: the folder, what a person sees, several shares in one pass, refusals."""

import json

import pytest

from sparseopt.models import open_model, sizes_of
from sparseopt.pruning.recipe.shrink_recipe import parameters_of
from sparseopt.shell.prune_progress import PruneProgress
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.test_pipeline import TOKENIZER

TEXT = "the quick brown fox jumps over the lazy dog, and then the dog tells the fox all about it.\n" * 60


@pytest.fixture
def call(tmp_path, rng, command):
    """The command on a tiny model, of which nothing is trained."""
    folder = write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "text.txt").write_text(TEXT)
    fixed = ["--calibration", f"file:{tmp_path / 'text.txt'}", "--windows", 6, "--seqlen", 32, "--train-epochs", 0]

    def run(*arguments):
        given = [word for word in fixed if "--calibration" not in arguments or word in fixed[2:]]
        return command("shrink", folder, "--output", tmp_path / "out", *given, *arguments)

    return run


def test_shrink_then_eval(tmp_path, call, command):
    everything = ["--channels", 0.75, "--heads", 0.5, "--layers", 0.67, "--multiple", 16, "--distil-epochs", 1]
    status, out, err = call(*everything)
    assert status == 0, err
    small = open_model(tmp_path / "out")
    sizes = sizes_of(small)
    assert (sizes.channels, sizes.kv_heads, len(sizes.blocks)) == (48, 1, 2)
    removed = json.loads((tmp_path / "out" / "summary.json").read_text())["shape"]["removed"][0]
    new, old = (parameters_of(open_model(tmp_path / name)) for name in ("out", "source"))
    kept = f"keeps 48 of 64 channels, 1 of 2 key-value groups, 2 of 3 blocks, without blocks {removed}"
    for line in (
        "shrink: reading the model",
        f"shrink: block {removed} goes (1 of 1), loss ",
        f"shrink: {kept} ",
        f"{kept}; {new:,} of {old:,} parameters ({new / old:.1%}), {4 * new:,} of {4 * old:,} bytes",
        "shrink: layer 4/4, block ",
        "shrink: distillation, step 6/6",
        "o_proj │ 32x32 │ 0.5000",
        "down_proj │ 32x64 │ 0.7500",
        "removing these blocks alone: loss ",
        ", held-out ",
        "peak memory",
        f"wrote {tmp_path / 'out'}",
    ):
        assert line in out, line
    text = ["--text", f"file:{tmp_path / 'text.txt'}", "--windows", 2, "--seqlen", 32]
    status, out, _ = command("eval", tmp_path / "out", *text)
    assert status == 0
    assert "sparsity 0.000000" in out
    status, out, _ = call(*everything)
    assert status == 0
    assert "layer 4/4" not in out
    assert f"finished before, in {tmp_path / 'out'}" in out


def test_without_fewer_channels_or_heads_the_blocks_are_counted_and_there_is_no_table(tmp_path, call):
    status, out, err = call("--layers", 0.67)
    assert status == 0, err
    assert "shrink: block 3/3, " in out
    assert "keeps 2 of 3 blocks, without blocks " in out
    assert "│" not in out
    assert f"wrote {tmp_path / 'out'}" in out


@pytest.mark.thorough
def test_several_shares_share_a_pass_and_get_folders_of_what_varies(tmp_path, call):
    few = ["--multiple", 16, "--method", "wanda"]
    status, out, err = call("--channels", "0.75,0.5", "--layers", "1,0.67", "--heads", 0.5, *few)
    assert status == 0, err
    assert "shrink: layer 20/20" in out
    assert out.count("(1 of 1), loss ") == 1
    found = {folder.name: sizes_of(open_model(folder)) for folder in (tmp_path / "out").iterdir()}
    assert {name: (sizes.channels, sizes.kv_heads, len(sizes.blocks)) for name, sizes in found.items()} == {
        "channels-0.75-layers-1": (48, 1, 3),
        "channels-0.75-layers-0.67": (48, 1, 2),
        "channels-0.5-layers-1": (32, 1, 3),
        "channels-0.5-layers-0.67": (32, 1, 2),
    }


MISTAKES = {
    "nothing": ([], "nothing would go: give channels, heads, layers or experts below 1"),
    "list": (["--channels", "0.5;0.6"], "--channels takes numbers separated by commas, as in 0.5,0.7, given '0.5;0.6'"),
    "twice": (["--layers", "0.5,0.50"], "--layers names a number twice: '0.5,0.50'"),
    "above": (["--heads", "1.5"], "heads must lie in [0, 1], given 1.5"),
    "none": (["--channels", "0"], "channels 0 leave nothing: give a share above 0"),
    "between": (["--layers", "0.5"], "layers 0.5 would keep 1.5 of 3 blocks; give 0.3333 for 1 or 0.6667 for 2"),
    "multiple": (["--channels", "0.5"], "would keep 32 of 64 MLP channels, multiples of 64; give 1 for 64"),
    "experts": (["--experts", "0.5"], "experts 0.5 is for mixtures of experts, and this model has none"),
    "method": (["--heads", "0.5", "--method", "sparsegpt"], "unknown method 'sparsegpt'"),
    "score": (["--layers", "0.67", "--block-score", "size"], "unknown block_score 'size'; known are loss, cosine"),
    "one of two": (["--layers", "0.67,0.5"], "layers 0.5 would keep 1.5 of 3 blocks"),
    "ended": (["--latency", "0.8"], "--latency has ended: `parameters` is the budget of a smaller model"),
    "text": (["--heads", "0.5", "--calibration", "file:/nowhere"], "cannot read the text file /nowhere"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered_by_one_sentence_and_status_2(tmp_path, call, arguments, message):
    status, _, err = call(*arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_finished_shards_and_says_how_to_go_on(tmp_path, call, monkeypatch):
    def interrupt(self, record, done, total):
        if getattr(record, "block", None) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(PruneProgress, "__call__", interrupt)
    status, _, err = call("--channels", "0.75,0.5", "--multiple", 16, "--method", "wanda")
    assert status == 130
    # Of both models the tensors outside the blocks and the first block.
    assert "stopped: 4 finished shards" in err
    assert "Run the same command again to resume after them" in err
