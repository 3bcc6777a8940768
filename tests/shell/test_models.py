"""The commands that make and score models: what a person sees, the folders, resumption after Ctrl-C."""

import json
import sys

import numpy as np
import pytest

from sparseopt.models import open_model, open_source, sizes_of
from sparseopt.pruning import Recipe, audit_sparsity
from sparseopt.pruning.recipe.shrink_recipe import parameters_of
from sparseopt.shell import demo
from sparseopt.shell.prune_progress import PruneProgress
from tests.experiments.inputs import CALIBRATED, TEXT, write_inputs
from tests.models.tiny import VOCAB
from tests.pruning.whole_runs import TOKENIZER
from tests.system.pages import whole_page

WEIGHTS = 21 * 32 * 32  # of 21 linears, each 4 bytes
SCORED = ("--windows", 2, "--seqlen", 48)


@pytest.fixture
def prune(tmp_path, inputs, done):
    """`sparseopt prune` into `tmp_path/name`: what it printed."""

    def run(name, *options, source=inputs[0], using=done):
        return using("prune", source, "--output", tmp_path / name, "--calibration", inputs[1], *CALIBRATED, *options)

    return run


@pytest.fixture
def shrink(tmp_path, inputs, done):
    """`sparseopt shrink` into `tmp_path/out`, without training: what it printed."""

    def run(*options, using=done):
        call = ["shrink", inputs[0], "--output", tmp_path / "out", "--calibration", inputs[1], "--train-epochs", 0]
        return using(*call, *CALIBRATED, *options)

    return run


@pytest.fixture
def score(inputs, done):
    """`sparseopt eval` of a folder: the figures of its line of JSON, without the folder."""

    def run(folder, *options):
        found = json.loads(done("eval", folder, "--text", inputs[1], *SCORED, "--json", *options))
        del found["model"]
        return found

    return run


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C once a layer of this block is finished."""

    def at(block):
        def stopped(self, record, done, total):
            if getattr(record, "block", None) == block:
                raise KeyboardInterrupt

        monkeypatch.setattr(PruneProgress, "__call__", stopped)

    return at


def model_files(folder):
    """All files but those that tell of the run that made them."""
    accounts = ("run.json", "summary.json", "records.jsonl", "report.html")
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in accounts}


def test_prune_then_eval(tmp_path, inputs, prune, done, score, command):
    given = ("--sparsity", 0.5, "--method", "maiht", "--preset", "paper")
    out, folder, text = prune("out", *given), tmp_path / "out", inputs[1]
    for line in (
        "reading the model", "layer 21/21, block 2", "down_proj │ 32x32 │ 0.5000", "peak memory", f"wrote {folder}",
        "calibration on 4 windows of 32 tokens, 128 in all, and 2 held out; digest ",
        # On the half of the text that was not calibrated on.
        f"perplexity on the second half of {text}: ",
    ):  # fmt: skip
        assert line in out, line
    # What was typed is no default.
    for option in ("--effort", "default --sparsity", "default --calibration", "default --windows"):
        assert option not in out
    for name in ("summary.json", "records.jsonl", "model.safetensors.index.json", "config.json", "tokenizer.json"):
        assert (folder / name).is_file()
    said, found = done("eval", folder, "--text", text, *SCORED), score(folder)
    assert "on 2 windows of 48 tokens" in said
    assert f"sparsity 0.500000: {WEIGHTS // 2:,} zeros of {WEIGHTS:,} weights in 21 linear layers" in said
    assert f"; digest {found['digest']} " in said
    assert found["zeros"] == WEIGHTS // 2
    # The same text as rows, each long enough for a window, of which every other one is read.
    rows = [{"id": i, "body": TEXT[-len(TEXT) // 2 + 300 * i :][:90]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rows = ["--text", f"jsonl:{tmp_path / 'rows.jsonl'}", "--column", "body", "--documents", "separate"]
    assert f"on 2 windows of 48 tokens of documents 2, 4, 6, ... of jsonl:{tmp_path}" in done(
        "eval", folder, *rows, *SCORED
    )
    page = whole_page(folder / "report.html")
    figures = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    means, linears = page.tables
    assert means[-1][2:5] == ["0.5000", f"{figures['mean_relative_error']:.5f}", f"{figures['mean_heldout_error']:.5f}"]
    assert len(linears) == 1 + len(records) == 22
    for row, record in zip(linears[1:], records, strict=True):
        assert record["layer"].endswith(f".{row[1]}.{row[0]}")
        assert row[2:4] == [f"{record[name]:.5g}" for name in ("relative_error", "heldout_error")]
    assert page.command.startswith(f"sparseopt prune {inputs[0]} --output {folder} --calibration {text} --windows 4 ")
    assert f"{figures['scores'][0]['after']:.2f} after" in page.words
    assert (page.tags.count("svg"), page.tags.count("rect"), len(page.captions)) == (1, 3, 1)
    # A requeued job: the same command shows the same figures, and others are refused. A page that was lost is written.
    (folder / "report.html").rename(tmp_path / "first.html")
    out = prune("out", *given)
    assert whole_page(folder / "report.html").tables == page.tables
    (tmp_path / "first.html").replace(folder / "report.html")
    assert "layer 21/21" not in out
    assert "down_proj │ 32x32 │ 0.5000" in out
    assert f"finished before, in {folder}" in out
    status, _, err = prune("out", *given, "--ridge", 0.5, using=command)
    assert status == 2
    assert "is not empty (it holds a model); choose another or empty it" in err
    assert "recipe.ridge: None there, 0.5 here" in err


def test_calibration_and_evaluation_begin_with_the_bos_of_the_tokenizer(tmp_path, inputs, prune, done, score):
    source = write_inputs(tmp_path)[0].rename(tmp_path / "<script>alert(1)<b>")
    frame = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|start|>": {"id": "<|start|>", "ids": [VOCAB.index("<|start|>")], "tokens": ["<|start|>"]}
        },
    }
    (source / "tokenizer.json").write_text(json.dumps(json.loads(TOKENIZER) | {"post_processor": frame}))
    out, folder, text = prune("out", "--method", "wanda", source=source), tmp_path / "out", inputs[1]
    assert f"4 windows of 32 tokens of the first half of {text}, each starting with the model's BOS (token 1)" in out
    assert "; the rest is left to `sparseopt eval`" in out
    # The name of a model is text.
    page = whole_page(folder / "report.html")
    assert "<script>alert(1)<b>, pruned" in page.words
    assert page.command.startswith(f"sparseopt prune '{source}' ")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["bos"], summary["recipe"]["bos"]) == (1, "auto")
    out = done("eval", folder, "--text", text, *SCORED)
    assert f"on 2 windows of 48 tokens of the second half of {text}, each starting with BOS (token 1)" in out
    behind, without = (score(folder, "--bos", bos) for bos in ("yes", "no"))
    assert (behind["bos"], without["bos"]) == (1, None)
    assert behind["perplexity"] != without["perplexity"]


def test_several_sparsities_with_all_that_surrounds_a_method(tmp_path, prune):
    out = prune(
        "out", "--sparsity", "0.4,0.6", "--method", "sparsegpt", "--allocation", "curves", "--bounds", "0.3,0.8",
        "--propagate", 0.2, "--train-epochs", 1,
    )  # fmt: skip
    # The second model has the same survey.
    assert "sparsegpt 40%: survey, pass 7/7" in out
    assert "sparsegpt 60%: survey" not in out
    assert out.count("layer 21/21") == 2
    assert out.count("reconstruction") == out.count("survey of the dense model") == 2
    for share in ("0.4", "0.6"):
        assert f"wrote {tmp_path / 'out' / share}" in out
        assert whole_page(tmp_path / "out" / share / "report.html").command.count("0.4,0.6") == 1
        audits = audit_sparsity(tmp_path / "out" / share)
        assert sum(a.zeros for a in audits) == round(float(share) * WEIGHTS)


@pytest.mark.thorough
def test_a_pruned_model_is_pruned_again(tmp_path, prune):
    prune("half", "--method", "magnitude")
    prune("more", "--sparsity", 0.75, "--method", "magnitude", source=tmp_path / "half")
    assert {audit.sparsity for audit in audit_sparsity(tmp_path / "more")} == {0.75}
    more, half = open_source(tmp_path / "more"), open_source(tmp_path / "half")
    for audit in audit_sparsity(tmp_path / "more"):
        name = f"{audit.layer}.weight"
        assert not np.any((more.read(name) != 0) & (half.read(name) == 0)), name


def test_shrink_then_eval(tmp_path, inputs, shrink, done):
    everything = ("--channels", 0.75, "--heads", 0.5, "--layers", 0.67, "--multiple", 8, "--distil-epochs", 1)
    out = shrink(*everything)
    small = open_model(tmp_path / "out")
    sizes = sizes_of(small)
    assert (sizes.channels, sizes.kv_heads, len(sizes.blocks)) == (24, 2, 2)
    removed = json.loads((tmp_path / "out" / "summary.json").read_text())["shape"]["removed"][0]
    new, old = parameters_of(small), parameters_of(open_model(inputs[0]))
    kept = f"keeps 24 of 32 channels, 2 of 4 key-value groups, 2 of 3 blocks, without blocks {removed}"
    for line in (
        "shrink: reading the model",
        f"shrink: block {removed} goes (1 of 1), loss ",
        f"shrink: {kept} ",
        f"{kept}; {new:,} of {old:,} parameters ({new / old:.1%}), {4 * new:,} of {4 * old:,} bytes",
        "shrink: layer 4/4, block ",
        "shrink: distillation, step 4/4",
        "o_proj │ 32x32 │ 0.5000",
        "down_proj │ 32x32 │ 0.7500",
        "removing these blocks alone: loss ",
        ", held-out ",
        "peak memory",
        f"wrote {tmp_path / 'out'}",
    ):
        assert line in out, line
    assert "sparsity 0.000000" in done("eval", tmp_path / "out", "--text", inputs[1], *SCORED)
    out = shrink(*everything)
    assert "layer 4/4" not in out
    assert f"finished before, in {tmp_path / 'out'}" in out


def test_without_fewer_channels_or_heads_the_blocks_are_counted_and_there_is_no_table(tmp_path, shrink):
    out = shrink("--layers", 0.67)
    assert "shrink: block 3/3, " in out
    assert "keeps 2 of 3 blocks, without blocks " in out
    assert "│" not in out
    assert f"wrote {tmp_path / 'out'}" in out
    page = whole_page(tmp_path / "out" / "report.html")
    assert page.tables == []
    assert "keeps 2 of 3 blocks, without blocks " in page.words


@pytest.mark.thorough
def test_several_shares_get_folders_of_what_varies(tmp_path, shrink):
    shares = ("--channels", "0.75,0.5", "--layers", "1,0.67", "--heads", 0.5)
    out = shrink(*shares, "--multiple", 8, "--method", "wanda")
    assert "shrink channels-0.75-layers-1: layer 6/6" in out
    assert out.count("(1 of 1), loss ") == 2
    # Losses without each block are measured once.
    assert out.count("removal 1 of 1, block 3/3") == 1
    found = {folder.name: sizes_of(open_model(folder)) for folder in (tmp_path / "out").iterdir()}
    assert {name: (sizes.channels, sizes.kv_heads, len(sizes.blocks)) for name, sizes in found.items()} == {
        "channels-0.75-layers-1": (24, 2, 3),
        "channels-0.75-layers-0.67": (24, 2, 2),
        "channels-0.5-layers-1": (16, 2, 3),
        "channels-0.5-layers-0.67": (16, 2, 2),
    }


def test_ctrl_c_keeps_finished_shards_and_says_how_to_go_on(tmp_path, prune, shrink, command, interrupt, monkeypatch):
    interrupt(2)
    status, _, err = prune("pruned", using=command)
    assert status == 130
    assert "3 finished shards" in err
    assert "Run the same command again to resume after them" in err
    shards = [f"model-{part}.safetensors" for part in ("block-0000", "block-0001", "outer")]
    assert sorted(f.name for f in (tmp_path / "pruned").glob("*.safetensors")) == shards
    assert len((tmp_path / "pruned" / "records.jsonl").read_text().splitlines()) == 15
    status, _, err = command("eval", tmp_path / "pruned")
    assert (status, "holds an unfinished run: start the same command again" in err) == (2, True)
    interrupt(1)
    status, _, err = shrink("--channels", "0.75,0.5", "--multiple", 8, "--method", "wanda", using=command)
    assert status == 130
    # Of the first model the tensors outside the blocks and the first block.
    assert "stopped: 2 finished shards" in err
    assert "Run the same command again to resume after them" in err
    assert not list(tmp_path.rglob("report.html"))
    monkeypatch.undo()
    assert f"report: {tmp_path / 'pruned' / 'report.html'}" in prune("pruned")
    page = whole_page(tmp_path / "pruned" / "report.html")
    assert "resumed: 2 blocks were finished by an earlier run" in page.words
    assert len(page.tables[1]) == 1 + 21


def test_a_pruning_run_is_logged_layer_by_layer_and_with_its_page(tmp_path, prune, trackers):
    prune("out", "--sparsity", 0.5, "--method", "wanda", "--log", "mlflow")
    start, parameters, *layers, end, page, last = trackers["mlflow"]
    assert start == ("start_run", {"run_name": "wanda 50%"})
    assert (parameters[1][0]["method"], parameters[1][0]["sparsity"]) == ("wanda", 0.5)
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(layers) == len(records) == 21
    assert [given[0]["layer/relative_error"] for _, given in layers] == [each["relative_error"] for each in records]
    assert end[1][0]["sparsity"] == 0.5
    assert {page, last} == {("log_artifact", (str(tmp_path / "out" / "report.html"),)), ("end_run", ("FINISHED",))}
    prune("both", "--sparsity", "0.4,0.6", "--method", "wanda", "--log", "wandb")
    (_, given), *_, last = trackers["wandb"]
    assert given["config"]["sparsity"] == [0.4, 0.6]
    figures = {name: value for what, named in trackers["wandb"] if what == "log" for name, value in named[0].items()}
    assert (figures["0.4/sparsity"], figures["0.6/sparsity"]) == pytest.approx((0.4, 0.6), abs=1e-3)
    assert last == ("finish", {"exit_code": 0})


def test_a_tracker_that_is_not_there_is_an_error_and_one_that_fails_ends_no_run(
    tmp_path, prune, command, monkeypatch, trackers
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, words in (("wandb", "pip install wandb"), ("mlfow", "did you mean 'mlflow'?")):
        status, _, err = prune("out", "--log", name, using=command)
        assert (status, words in err) == (2, True), err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(trackers["mlflow"], "log_metrics", lambda *_: 1 / 0, raising=False)
    prune("out", "--method", "wanda", "--log", "mlflow")
    assert [what for what, _ in trackers["mlflow"]] == ["start_run", "log_params"]


def test_demo_shows_a_comparison_and_writes_picture_samples_and_models(tmp_path, inputs, command, monkeypatch):
    smaller = {"camera": np.s_[128:256, 128:256], "cell": np.s_[310:438, 358:486]}
    monkeypatch.setattr(demo, "PHOTOGRAPHS", smaller)
    monkeypatch.setattr(demo, "EVALUATION", (2, 48))
    monkeypatch.setattr(demo, "Recipe", lambda **fields: Recipe(windows=4, seqlen=32, heldout_windows=2, **fields))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-output").mkdir()
    status, out, err = command("demo", "--source", inputs[0], "--calibration", inputs[1])
    assert status == 0, err
    for label in ("dense", "fast", "Wanda"):
        assert f"│ {label} │" in out
    assert "noise sigma 20, PSNR 22.1" in out
    output = tmp_path / "demo-output-2"
    for name in smaller:
        assert (output / f"{name}.png").is_file()
    summary = json.loads((output / "summary.json").read_text())
    rows = summary["photographs"]
    assert all(row["psnr"] > 28 and row["relative_duality_gap"] <= 1e-4 for row in rows)
    found = {(row["photograph"], row["order"]): row["psnr"] for row in rows}
    assert found["camera", 0] > found["camera", 1]
    assert found["cell", 1] > found["cell", 0]
    assert (output / "layer-errors.png").read_bytes().startswith(b"\x89PNG")
    samples = {row["model"]: row["sample"] for row in summary["models"]}
    assert samples.keys() == {"dense", "fast", "Wanda"}
    assert samples["fast"].startswith("The ocean")
    assert f"fast: {samples['fast'][:20]}" in out
    page = whole_page(output / "report.html")
    assert [len(table) for table in page.tables] == [5, 4]
    assert [float(row[3]) for row in page.tables[0][1:]] == [round(row["psnr"], 2) for row in rows]
    assert len(page.loaded) == len(page.captions) == 3
    for method in ("fast", "wanda"):
        assert open_model(output / method).num_blocks == 3
