"""Dry runs: the plan of the run itself, what it would make, and what it would need."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import pytest
from huggingface_hub import constants

from sparseopt.core.base.types import pytree
from sparseopt.layers.methods import find_method, method_cost
from sparseopt.models import ModelError, load_decoder, open_model
from sparseopt.models.files.safetensors import StoredTensor
from sparseopt.pruning import METHODS, Magnitude, Recipe, ShrinkRecipe, dry_run, prune_model, shrink_model
from sparseopt.pruning.dry_run import LayerKind
from sparseopt.pruning.memory import block_sizes
from sparseopt.system import machine
from tests.models.tiny import random_tensors, tiny_config, write_folder, write_gguf
from tests.pruning.whole_runs import tensors_of, write_model

TINY = "llama"
pytestmark = pytest.mark.usefixtures("several_batches")
# Of one block: q and o, k and v, gate and up and down; norms.
LINEARS, NORMS = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64, 2 * 32


@pytest.fixture
def recipe(tokens):
    return lambda **changes: Recipe(**{"method": "maiht", "calibration": tokens, "heldout_windows": 2} | changes)


def test_the_facts_of_a_tiny_model(tmp_path, source, recipe):
    found = dry_run(source, tmp_path / "out", recipe())
    assert (found.source, found.revision, found.output) == (str(source), None, str(tmp_path / "out"))
    shapes = {k.removesuffix(".weight").split(".", 3)[3]: v.shape for k, v in tensors_of().items() if "proj" in k}
    kinds = {LayerKind(name, shape, shape, 0.5, None, (0, 1, 2), 3) for name, shape in shapes.items()}
    assert set(found.layers) == kinds
    assert (found.weights, found.zeros) == (3 * LINEARS, 13_824)
    assert found.parameters == found.kept_parameters == 3 * (LINEARS + NORMS) + 49 * 32 + 32
    assert found.footprint.output_bytes == 4 * found.parameters
    # Token ids are counted, whatever the recipe says of texts.
    assert (found.calibration.windows, found.calibration.seqlen, found.recipe["windows"]) == (5, 24, 5)
    assert json.loads(json.dumps(found.as_dict()))["zeros"] == found.zeros
    some = recipe(ignore=[r"re:model.layers.[02].*o_proj"], targets={"0.mlp.up_proj": 0.25})
    found = dry_run(source, tmp_path / "out", some)
    rows = [(kind.name, kind.blocks, kind.zeros) for kind in found.layers]
    assert [row[1:] for row in rows if row[0] == "self_attn.o_proj"] == [((0, 2), None), ((1,), 0.5)]
    assert [row[1:] for row in rows if row[0] == "mlp.up_proj"] == [((0,), 0.25), ((1, 2), 0.5)]
    # Zeros are those of what is pruned.
    assert found.zeros == (found.weights - 2 * 32 * 32) / 2 - 32 * 64 / 4
    assert not (tmp_path / "out").exists()


def test_an_untied_head_and_a_narrow_dtype_count(tmp_path, recipe, rng):
    config = tiny_config(tie_word_embeddings=False)
    path = write_folder(tmp_path / "m", config, random_tensors(config, rng, "bfloat16"))
    found = dry_run(path, tmp_path / "out", recipe(pattern="2:4", sparsity=None, dtype="float32"))
    assert (found.zeros, found.footprint.output_bytes) == (13_824, 4 * found.parameters)
    assert found.parameters == 29_440 + 49 * 32
    assert dry_run(path, tmp_path / "out", recipe()).footprint.output_bytes == 2 * found.parameters


def test_what_is_told_of_a_name_on_the_hub_is_what_a_prune_does(tmp_path, tokens, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    path = write_model(tmp_path / f"cache/models--lab--tiny/snapshots/{commit}", "square")
    (path.parent.parent / "refs").mkdir()
    (path.parent.parent / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    chosen = Recipe(calibration=tokens, method="wanda", sparsity=0.37, heldout_windows=2)
    found, report = dry_run("lab/tiny", "out", chosen), prune_model("lab/tiny", "out", chosen)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for told in (found, report, SimpleNamespace(**summary)):
        assert (told.source, told.revision) == ("lab/tiny", commit)
    assert sum(layer.zeros for layer in report.layers) == found.zeros
    assert (report.calibration, report.recipe) == (found.calibration, found.recipe)
    assert report.footprint.output_bytes == found.footprint.output_bytes == report.dense_bytes


def test_bits_are_counted_and_a_model_in_memory_needs_no_files(tmp_path, source, recipe):
    found = dry_run(load_decoder(source), tmp_path / "out.gguf", recipe(bits="q4_0"))
    assert {kind.bits for kind in found.layers} == {"q4_0"}
    # 32 weights of a linear in 18 bytes, of the embedding in 34; norms in float32.
    assert found.footprint.output_bytes == 3 * LINEARS * 18 / 32 + 49 * 34 + 4 * (3 * NORMS + 32)


def test_experts_are_one_row_with_their_number_left_out(tmp_path, models, recipe):
    path = models("experts")
    found = dry_run(path, tmp_path / "out", recipe())
    counts = {kind.name: kind.count for kind in found.layers}
    assert counts["self_attn.q_proj"] == 2
    # As in the checkpoint, so that targets can name them.
    assert [count for name, count in counts.items() if ".experts.*." in name] == [2 * 4] * 3
    assert found.weights == 2 * (4 * 32 * 32 + 4 * 3 * 32 * 32)
    sizes, *_ = block_sizes(open_model(path), recipe())
    assert sizes.gram_bytes == 4 * (2 + 4 * 2) * 32**2
    assert {share for *_, share in sizes.linears} == {1.0, 0.5}
    # Each token of all experts: one Gram for gate and up together, and every expert runs once.
    whole, *_ = block_sizes(open_model(path), recipe(expert_tokens="all"))
    assert whole.gram_bytes == 4 * (2 * 32**2 + 32**2 + 4 * 32**2)


def test_a_smaller_model_is_told_before_it_is_made(tmp_path, source, tokens):
    common = {"calibration": tokens, "multiple": 8, "train_epochs": 0, "heldout_windows": 2}
    chosen = ShrinkRecipe(channels=0.5, method="wanda", **common)
    found = dry_run(source, tmp_path / "out", chosen)
    assert {kind.becomes for kind in found.layers if "down" in kind.name} == {(32, 32)}
    assert found.zeros == 0
    assert found.kept_parameters == shrink_model(source, tmp_path / "out", chosen).shape.parameters
    assert dry_run(source, tmp_path / "chosen", ShrinkRecipe(parameters=0.8, **common)).kept_parameters is None


def test_no_tensor_is_read_and_no_text_is_drawn(tmp_path, source, monkeypatch):
    monkeypatch.setattr(StoredTensor, "read", pytest.fail)
    plain = dry_run(source, tmp_path / "out", Recipe(method="best", seqlen=24, allocation="curves"))
    assert plain.calibration.digest == ""
    # Effort most reads four times as many windows, and never more than 128.
    shown = [
        dry_run(source, tmp_path / "out", Recipe(effort=effort, seqlen=seqlen)).calibration
        for effort in ("good", "most")
        for seqlen in (64, 8, 2)
    ]
    assert [each.windows for each in shown] == [16, 32, 128, 64, 128, 128]
    assert "16 tokens for each of the 64 inputs of the widest layer, in 64 to 128 windows" in shown[3].why
    with pytest.raises(ModelError, match="text that the model draws, which needs all of it in memory"):
        dry_run(source, tmp_path / "out", Recipe(method="wanda", seqlen=24), memory=2**10)
    assert [file.name for file in tmp_path.iterdir()] == []


def test_the_time_of_a_run_is_that_of_two_blocks_and_of_one_more_for_each_other(tmp_path, source, monkeypatch):
    """The runs are whole ones, on two blocks and on one, twice each; nothing is left behind."""
    times, blocks = iter((10.0, 100.0, 0.0, 50.0, 20.0, 27.0, 30.0, 34.0)), []
    module = sys.modules["sparseopt.pruning.dry_run"]  # its package has the function under this name
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))

    def pruning(source, output, chosen):
        blocks.append([record.layer for record in prune_model(source, output, chosen).layers])

    monkeypatch.setattr(module, "prune_model", pruning)
    some = {"ignore": ["model.layers.2.mlp.up_proj", "o_proj"], "targets": {"q_proj": 0.25}}
    chosen = Recipe(method="wanda", windows=5, seqlen=24, heldout_windows=2, **some)
    found = dry_run(source, tmp_path / "out", chosen, measure=True)
    # A recipe for some of the blocks is measured as if every block had such linears.
    assert [len(each) for each in blocks] == [12, 6, 12, 6]
    assert found.seconds == 90 + (7 - 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "preset"), [*((name, None) for name in METHODS), ("maiht", "paper")])
def test_every_method_has_a_cost(method, preset):
    cost = method_cost(find_method(method, preset))
    assert all(value >= 0 for value in jax.tree.leaves(dataclasses.asdict(cost)))
    assert cost.workspace.wide > 0


def test_a_method_of_ones_own_has_an_estimate_and_an_unknown_tokenizer_is_told(tmp_path, source, recipe):
    @pytree
    class Mine:
        def __call__(self, layer, pattern):
            return Magnitude()(layer, pattern)

    assert dry_run(source, tmp_path / "out", recipe(method=Mine())).footprint.memory_bytes > 0
    odd = write_gguf(tmp_path / "odd.gguf", tiny_config(), tensors_of(), pre="odd")
    with pytest.raises(ModelError, match=r"splits words by 'odd' \(tokenizer.ggml.pre\)"):
        dry_run(odd, tmp_path / "out", Recipe(seqlen=32))


def test_the_command_shows_a_table_or_json(tmp_path, source, text, command, monkeypatch):
    made = ("--output", tmp_path / "out", "--dry-run", "--calibration", text, "--windows", 3, "--seqlen", 24)
    prune = ("prune", source, *made, "--method", "wanda")
    status, out, _ = command(*prune, "--json", "--sparsity", "0.25,0.5")
    lines = json.loads("[" + out.replace(' {"source"', ', {"source"') + "]")
    assert (status, [line["zeros"] for line in lines]) == (0, [6_912, 13_824])
    status, out, _ = command(*prune, "--sparsity", 0.25, "--ignore", "up_proj", "--memory", "64GiB")
    assert status == 0
    for said in (
        "29,440 parameters, 27,648 in linear layers of the blocks",
        "│ mlp.down_proj │ 0-2 │ 32x64 │ 3 │ 0.2500 │",
        "│ mlp.up_proj │ 0-2 │ 64x32 │ 3 │ │",
        "5,376 zeros, 19.44% of the linear layers, 18.26% of all parameters",
        "calibration on 3 windows of 24 tokens, 72 in all, and 4 held out; digest ",
        "MiB of 64.00 GiB asked for, estimated, in phase ",
        "libraries 300.0 MiB + compiled programs 210.0 MiB",
        "disk 115.0 KiB for the model",
        f"nothing was written to {tmp_path / 'out'}",
    ):
        assert said in out
    some = ("--pattern", "2:4", "--sparsity", 0.3, "--allocation", "curves")
    status, out, _ = command("prune", source, *made[:3], "--seqlen", 24, *some)
    assert status == 0
    for said in ("default --calibration self: ", "8,294 zeros, 30.00%", "curves: measured losses distribute"):
        assert said in out
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1)
    status, out, _ = command("shrink", source, *made, "--parameters", 0.8)
    assert status == 0
    assert "measured losses choose what stays: 80.00% of the parameters" in out
    assert "for activations, until the run ends" in out
    for call, words in (
        (("prune", source, "--output", tmp_path / "out", "--json"), "--json belongs to --dry-run"),
        (("shrink", source, *made, "--layers", 0.67, "--measure"), "the time is measured for `prune`"),
    ):
        status, _, err = command(*call)
        assert (status, words in err) == (2, True), err
    assert not (tmp_path / "out").exists()
