"""The commands that make and score models: what a person sees, the folders, resumption after Ctrl-C."""

import json
import sys

import numpy as np
import pytest

from sparseopt.models import open_model
from sparseopt.pruning import Recipe, audit_sparsity
from sparseopt.pruning.recipe.shrink_recipe import parameters_of
from sparseopt.shell import demo
from sparseopt.shell.prune_progress import PruneProgress
from tests.experiments.inputs import CALIBRATED, write_inputs
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
    """`sparseopt eval` of a folder: what it said, and its line of JSON."""

    def run(folder, *options):
        call = ["eval", folder, "--text", inputs[1], *SCORED, *options]
        return done(*call), json.loads(done(*call, "--json"))

    return run


def read(folder, name):
    return json.loads((folder / name).read_text())


def lines_of(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


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
    said, found = score(folder, "--pattern", "unstructured", "--sparsity", 0.5)
    assert f"perplexity {found['perplexity']:.4f} on 2 windows of 48 tokens" in said
    assert f"sparsity 0.500000: {WEIGHTS // 2:,} zeros of {WEIGHTS:,} weights in 21 linear layers" in said
    assert f"; digest {found['digest']} " in said
    assert "pattern unstructured holds in all 21 linear layers, exact in 21" in said
    assert (found["zeros"], found["size"], found["exact"]) == (WEIGHTS // 2, WEIGHTS, 21)
    page, figures, records = whole_page(folder / "report.html"), read(folder, "summary.json"), lines_of(folder)
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
    (folder / "report.html").unlink()
    out = prune("out", *given)
    assert whole_page(folder / "report.html").tables == page.tables
    assert "layer 21/21" not in out
    assert "down_proj │ 32x32 │ 0.5000" in out
    assert f"finished before, in {folder}" in out
    status, _, err = prune("out", *given, "--ridge", 0.5, using=command)
    assert (status, "recipe.ridge: None there, 0.5 here" in err) == (2, True), err


def test_calibration_and_evaluation_begin_with_the_bos_of_the_tokenizer(tmp_path, inputs, prune, score):
    source = write_inputs(tmp_path)[0]
    (source / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    out, folder, text = prune("out", "--method", "wanda", source=source), tmp_path / "out", inputs[1]
    assert f"4 windows of 32 tokens of the first half of {text}, each starting with the model's BOS (token 1)" in out
    summary = read(folder, "summary.json")
    assert (summary["bos"], summary["recipe"]["bos"]) == (1, "auto")
    said, behind = score(folder)
    assert f"on 2 windows of 48 tokens of the second half of {text}, each starting with BOS (token 1)" in said
    _, without = score(folder, "--bos", "no")
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


def test_shrink_then_eval(tmp_path, inputs, shrink, score):
    everything = ("--channels", 0.75, "--heads", 0.5, "--layers", 0.67, "--multiple", 8, "--distil-epochs", 1)
    out = shrink(*everything)
    removed = read(tmp_path / "out", "summary.json")["shape"]["removed"][0]
    new, old = (parameters_of(open_model(folder)) for folder in (tmp_path / "out", inputs[0]))
    kept = f"keeps 24 of 32 channels, 2 of 4 key-value groups, 2 of 3 blocks, without blocks {removed}"
    for line in (
        "shrink: reading the model",
        f"shrink: block {removed} goes (1 of 1), loss ",
        f"{kept}; {new:,} of {old:,} parameters ({new / old:.1%}), {4 * new:,} of {4 * old:,} bytes",
        "shrink: layer 4/4, block ",
        "shrink: distillation, step 4/4",
        "o_proj │ 32x32 │ 0.5000",
        "down_proj │ 32x32 │ 0.7500",
        "removing these blocks alone: loss ",
        f"wrote {tmp_path / 'out'}",
    ):
        assert line in out, line
    assert "sparsity 0.000000" in score(tmp_path / "out")[0]
    out = shrink(*everything)
    assert "layer 4/4" not in out
    assert f"finished before, in {tmp_path / 'out'}" in out


def test_every_combination_of_fractions_has_a_folder_and_without_channels_or_heads_there_is_no_table(tmp_path, shrink):
    out = shrink("--channels", "0.75,0.5", "--layers", "1,0.67", "--heads", 0.5, "--multiple", 8, "--dry-run")
    names = [f"channels-{channels}-layers-{layers}" for channels in ("0.75", "0.5") for layers in ("1", "0.67")]
    assert [out.count(f"nothing was written to {tmp_path / 'out' / name}:") for name in names] == [1] * 4
    assert not (tmp_path / "out").exists()
    out = shrink("--layers", 0.67)
    assert ("shrink: block 3/3, " in out, "│" in out) == (True, False)
    page = whole_page(tmp_path / "out" / "report.html")
    assert (page.tables, "keeps 2 of 3 blocks, without blocks " in page.words) == ([], True)


def test_ctrl_c_keeps_finished_shards_and_says_how_to_go_on(tmp_path, prune, shrink, command, monkeypatch):
    def interrupted(last, run, *options):
        """Ctrl-C once a layer of this block is finished: the status, and what was said."""

        def stopped(self, record, done, total):
            if getattr(record, "block", None) == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(PruneProgress, "__call__", stopped)
            status, _, err = run(*options, using=command)
        assert "Run the same command again to resume after them" in err
        return status, err

    status, err = interrupted(2, prune, "pruned")
    assert (status, "3 finished shards" in err) == (130, True)
    shards = [f"model-{part}.safetensors" for part in ("block-0000", "block-0001", "outer")]
    assert sorted(f.name for f in (tmp_path / "pruned").glob("*.safetensors")) == shards
    assert len(lines_of(tmp_path / "pruned")) == 15
    status, _, err = command("eval", tmp_path / "pruned")
    assert (status, "holds an unfinished run: start the same command again" in err) == (2, True)
    status, err = interrupted(1, shrink, "--channels", "0.75,0.5", "--multiple", 8, "--method", "wanda")
    # Of the first model the tensors outside the blocks and the first block.
    assert (status, "stopped: 2 finished shards" in err) == (130, True)
    assert not list(tmp_path.rglob("report.html"))
    assert f"report: {tmp_path / 'pruned' / 'report.html'}" in prune("pruned")
    page = whole_page(tmp_path / "pruned" / "report.html")
    assert "resumed: 2 blocks were finished by an earlier run" in page.words
    assert len(page.tables[1]) == 1 + 21


def test_a_run_is_logged_by_layers_and_a_tracker_that_fails_ends_none(tmp_path, prune, command, monkeypatch, trackers):
    prune("both", "--sparsity", "0.4,0.6", "--method", "wanda", "--log", "wandb")
    (_, start), *told, last = trackers["wandb"]
    assert (start["name"], start["config"]["method"]) == ("wanda 40%, 60%", "wanda")
    assert start["config"]["sparsity"] == [0.4, 0.6]
    figures = [named[0] for what, named in told if what == "log"]
    logged = [each["layer/relative_error"] for each in figures if "layer/relative_error" in each]
    folders = [tmp_path / "both" / share for share in ("0.4", "0.6")]
    assert logged == [record["relative_error"] for folder in folders for record in lines_of(folder)]
    assert len(logged) == 42
    shares = {name: value for each in figures for name, value in each.items() if name.endswith("/sparsity")}
    assert shares == pytest.approx({"0.4/sparsity": 0.4, "0.6/sparsity": 0.6}, abs=1e-3)
    assert [given for what, given in told if what == "log_artifact"] == [(str(f / "report.html"),) for f in folders]
    assert last == ("finish", {"exit_code": 0})
    monkeypatch.setattr(trackers["mlflow"], "log_metrics", lambda *_, **__: 1 / 0, raising=False)
    prune("out", "--method", "wanda", "--log", "mlflow")
    assert [what for what, _ in trackers["mlflow"]] == ["start_run", "log_params"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, err = prune("none", "--log", "wandb", using=command)
    assert (status, "pip install wandb" in err, (tmp_path / "none").exists()) == (2, True, False), err


def test_demo_shows_a_comparison_and_writes_picture_samples_and_models(tmp_path, inputs, done, monkeypatch):
    smaller = {"camera": np.s_[160:224, 160:224], "cell": np.s_[342:406, 390:454]}
    for name, value in (("PHOTOGRAPHS", smaller), ("EVALUATION", (2, 48)), ("NEW_TOKENS", 4)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "Recipe", lambda **fields: Recipe(windows=4, seqlen=32, heldout_windows=2, **fields))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-output").mkdir()
    out = done("demo", "--source", inputs[0], "--calibration", inputs[1])
    for label in ("dense", "fast", "Wanda"):
        assert f"│ {label} │" in out
    assert "noise sigma 20, PSNR 22.1" in out
    output = tmp_path / "demo-output-2"
    summary = read(output, "summary.json")
    rows = summary["photographs"]
    assert all(row["psnr"] > 28 and row["relative_duality_gap"] <= 1e-4 for row in rows)
    found = {(row["photograph"], row["order"]): row["psnr"] for row in rows}
    assert found["camera", 0] > found["camera", 1]
    assert found["cell", 1] > found["cell", 0]
    for name in (*smaller, "layer-errors"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    samples = {row["model"]: row["sample"] for row in summary["models"]}
    assert [sample.startswith("The ocean") for sample in samples.values()] == [True] * 3
    assert f"fast: {samples['fast'][:20]}" in out
    page = whole_page(output / "report.html")
    assert [len(table) for table in page.tables] == [5, 4]
    assert [float(row[3]) for row in page.tables[0][1:]] == [round(row["psnr"], 2) for row in rows]
    assert len(page.loaded) == len(page.captions) == 3
    for method in ("fast", "wanda"):
        assert sum(a.zeros for a in audit_sparsity(output / method)) == WEIGHTS // 2
