"""Inspection from headers: known facts of tiny models, and plausible estimates."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants

from sparseopt.core.base.types import pytree
from sparseopt.layers.methods import find_method, method_cost
from sparseopt.models import open_model
from sparseopt.models.files.safetensors import StoredTensor, write_tensors
from sparseopt.pruning import METHODS, Magnitude, Recipe, inspection, prune_model
from sparseopt.pruning.inspection import Blocks, Inspection, inspect_model
from sparseopt.pruning.memory import block_sizes
from sparseopt.shell.inspect import linear_table, model_lines
from tests.models.tiny import random_tensors, tiny_config, write_gguf
from tests.pruning.whole_runs import MIXTRAL, TOKENIZER, tensors_of, write_model

# Of one block: q and o, k and v, gate and up and down; norms.
LINEARS, NORMS = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64, 2 * 32


@pytest.fixture
def folder(tmp_path, rng):
    """`folder(**changes)`: a model with these changes of the tiny configuration."""

    def make(dtype=np.float32, place="m", **changes):
        config, path = tiny_config(**changes), tmp_path / place
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        write_tensors(path / "model.safetensors", random_tensors(config, rng, dtype))
        return path

    return make


def recipe(**changes):
    return Recipe(**{"method": "maiht", "windows": 4, "seqlen": 32, "heldout_windows": 2} | changes)


def unknown(path):
    """Give a model's folder the name of a family that is not known."""
    (path / "config.json").write_text(json.dumps(tiny_config(model_type="mamba", tie_word_embeddings=False)))
    return path


def test_the_facts_of_a_tiny_model(folder):
    path = folder()
    found = inspect_model(path, recipe())
    assert (found.source, found.path, found.revision) == (str(path), str(path), None)
    assert (found.model_type, found.supported, found.num_blocks, found.tied) == ("llama", True, 3, True)
    assert found.kinds == (Blocks("full attention, rotary base 10,000, one MLP", (0, 1, 2)),)
    assert {linear.name: (linear.outputs, linear.inputs) for linear in found.linears} == {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }
    assert {(kind.count, kind.dtype, kind.zeros / kind.size) for kind in found.linears} == {(3, "float32", 0.5)}
    assert linear_table(found).columns[-1].header == "to prune"
    assert found.prunable_parameters == 3 * LINEARS == 27_648
    assert found.block_parameters == 3 * (LINEARS + NORMS)
    assert (found.embedding_parameters, found.head_parameters, found.unused_parameters) == (49 * 32, 0, 0)
    assert found.parameters == 3 * (LINEARS + NORMS) + 49 * 32 + 32 == 29_440
    assert found.dtypes == {"float32": 4 * 29_440}
    assert found.file_bytes == (path / "model.safetensors").stat().st_size
    assert found.zeros == 13_824
    assert found.dense_bytes == 4 * 29_440
    assert found.packed_bytes == 27_648 // 8 + 4 * 13_824 + 4 * (29_440 - 27_648)


def test_an_untied_head_and_a_narrow_dtype_count(folder):
    path = folder(ml_dtypes.bfloat16, tie_word_embeddings=False)
    found = inspect_model(path, recipe(pattern="2:4", sparsity=None, dtype="float32"))
    assert (found.tied, found.head_parameters, found.parameters) == (False, 49 * 32, 29_440 + 49 * 32)
    assert found.dtypes == {"bfloat16": 2 * found.parameters}
    assert found.zeros == 13_824
    assert found.dense_bytes == 4 * found.parameters
    assert inspect_model(path, recipe()).dense_bytes == 2 * found.parameters


def test_what_is_told_of_a_name_on_the_hub_is_what_a_prune_does(tmp_path, folder, tokens, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    path = folder(place=f"cache/models--lab--tiny/snapshots/{commit}")
    (path.parent.parent / "refs").mkdir()
    (path.parent.parent / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    chosen = Recipe(calibration=tokens, method="wanda", sparsity=0.37)
    found = inspect_model("lab/tiny", chosen)
    assert (found.source, found.path, found.revision) == ("lab/tiny", str(path), commit)
    assert model_lines(found)[0] == f"lab/tiny (in {path}), commit {commit}"
    report = prune_model("lab/tiny", tmp_path / "out", chosen)
    assert sum(layer.zeros for layer in report.layers) == found.zeros
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for told in ((report.source, report.revision), (summary["source"], summary["revision"])):
        assert told == ("lab/tiny", commit)
    assert sum(inspect_model(tmp_path / "out", chosen).dtypes.values()) == found.dense_bytes


def test_experts_are_one_row_with_their_number_left_out(folder):
    path = folder(**MIXTRAL)
    found = inspect_model(path, recipe())
    counts = {linear.name: linear.count for linear in found.linears}
    assert counts["self_attn.q_proj"] == 3
    assert counts["mlp.experts.*.up_proj"] == counts["mlp.experts.*.down_proj"] == 3 * 4
    assert found.kinds[0].description.endswith("4 experts, 2 a token")
    assert found.prunable_parameters == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 4 * 3 * 32 * 64)
    (sizes,) = block_sizes(open_model(path), recipe())
    assert sizes.gram_bytes == 4 * (2 * 32**2 + 4 * (32**2 + 64**2))
    assert {share for *_, share in sizes.linears} == {1.0, 0.5}
    # Each token of all experts: one Gram for gate and up together, and every expert runs once.
    (whole,) = block_sizes(open_model(path), recipe(expert_tokens="all"))
    assert whole.gram_bytes == 4 * (2 * 32**2 + 32**2 + 4 * 64**2)


def test_blocks_that_differ_are_told_apart(folder):
    found = inspect_model(folder(model_type="smollm3", no_rope_layers=[1, 0, 1]), recipe())
    assert [kind.indices for kind in found.kinds] == [(0, 2), (1,)]
    assert "no rotary positions" in found.kinds[1].description


def test_an_unknown_family_is_described_by_its_names(folder):
    found = inspect_model(unknown(folder()), recipe())
    assert (found.model_type, found.supported, found.num_blocks) == ("mamba", False, 3)
    assert [(linear.name, linear.count) for linear in found.linears if "up" in linear.name] == [("mlp.up_proj", 3)]
    assert (found.prunable_parameters, found.parameters, found.embedding_parameters) == (27_648, 29_440, 49 * 32)
    assert found.zeros is found.dense_bytes is found.packed_bytes is found.estimate is None


def test_no_tensor_is_read(source, monkeypatch):
    def refuse(self):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoredTensor, "read", refuse)
    assert inspect_model(source, recipe(method="best", allocation="curves")).estimate


@pytest.mark.parametrize("known", [True, False])
def test_json_and_back(folder, known):
    path = folder(**MIXTRAL)
    found = inspect_model(path if known else unknown(path), recipe())
    assert Inspection.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_estimates_add_up_and_grow_with_the_work(source):
    def estimate(**changes):
        return inspect_model(source, recipe(**{"calibration": "pydoc"} | changes)).estimate

    plain = estimate()
    assert plain.peak_memory_bytes == max(sum(parts.values()) for parts in plain.memory.values())
    assert plain.peak_memory_bytes == sum(plain.memory[plain.peak_phase].values())
    assert set(plain.memory) == {"start", "Grams", "layer solves"}
    drawn = estimate(calibration="self")
    assert set(drawn.memory) == {"drawing text", *plain.memory}
    assert drawn.memory["drawing text"]["model"] == 4 * inspect_model(source, recipe()).parameters
    more, best = estimate(windows=64, seqlen=128), estimate(method="best", allocation="curves")
    # Windows of 2 tokens are 128 by default, which leaves no room for variants that nobody asked for.
    shown = [inspect_model(source, Recipe(method="best", seqlen=seqlen)).recipe for seqlen in (2, 512)]
    assert [(each["windows"], each["variants"]) for each in shown] == [(128, 0), (16, 3)]
    assert more.peak_memory_bytes > plain.peak_memory_bytes
    assert set(best.memory) - set(plain.memory) == {"survey", "training"}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "wanda"},
        {"method": "wanda", "ignore": ["model.layers.2.mlp.up_proj", "o_proj"], "targets": {"q_proj": 0.25}},
        pytest.param({"effort": "good", "method": None}, marks=pytest.mark.thorough),
    ],
)
def test_the_time_of_a_run_is_that_of_two_blocks_and_of_one_more_for_each_other(tmp_path, monkeypatch, changes):
    """The runs are whole ones, on two blocks and on one, twice each; nothing is left behind."""
    path, times, blocks = write_model(tmp_path / "m"), iter((10.0, 100.0, 0.0, 50.0, 20.0, 27.0, 30.0, 34.0)), []
    monkeypatch.setattr(inspection, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(inspection.tempfile, "tempdir", str(tmp_path))

    def pruning(source, output, chosen):
        blocks.append({record.block for record in prune_model(source, output, chosen).layers})

    monkeypatch.setattr(inspection, "prune_model", pruning)
    found = inspect_model(path, recipe(**changes), measure=True)
    assert blocks == [{0, 1}, {0}, {0, 1}, {0}]
    assert found.seconds == 90 + (7 - 4)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("method", "preset"), [*((name, None) for name in METHODS), ("maiht", "paper")])
def test_every_method_has_a_cost(method, preset):
    cost = method_cost(find_method(method, preset))
    assert all(value >= 0 for value in jax.tree.leaves(dataclasses.asdict(cost)))
    assert cost.workspace.wide > 0


def test_a_method_of_ones_own_has_an_estimate(source):
    @pytree
    class Mine:
        def __call__(self, layer, pattern):
            return Magnitude()(layer, pattern)

    assert inspect_model(source, recipe(method=Mine())).estimate.peak_memory_bytes > 0


def test_a_tokenizer_that_is_refused_is_told(tmp_path, command):
    known = write_gguf(tmp_path / "known.gguf", tiny_config(), tensors_of())
    assert inspect_model(known).no_text is None
    odd = write_gguf(tmp_path / "odd.gguf", tiny_config(), tensors_of(), pre="odd")
    status, out, _ = command("inspect", odd)
    assert status == 0
    assert "`sparseopt prune` and `eval` refuse it" in out
    assert "splits words by 'odd' (tokenizer.ggml.pre)" in out
    status, _, err = command("eval", odd, "--seqlen", 32)
    assert status == 2
    assert "splits words by 'odd' (tokenizer.ggml.pre)" in err


def test_the_command_shows_a_table_or_json(tmp_path, command):
    path = write_model(tmp_path / "m", shards=2)
    assert (path / "tokenizer.json").read_text() == TOKENIZER
    status, out, _ = command("inspect", path, "--json")
    assert status == 0
    assert Inspection.from_dict(json.loads(out)) == inspect_model(path, Recipe())
    known = {
        "--sparsity 0.25 --memory 256MiB": [
            "llama, 3 blocks",
            "all blocks alike: full attention",
            "29,440 parameters: 27,840 in blocks, of which prunable 27,648; embedding 1,568, head tied to",
            "│ mlp.down_proj │ 0-2 │ 32x64 │ 3 │ float32 │ 6,144 │ 0.2500 │",
            "6,912 zeros, 25.00% of the linear layers, 23.48% of all",
            "output 115.0 KiB dense",
            "that does not fit in 256.0 MiB",
            "--measure says the time of a run",
        ],
        "--device-memory 8KiB": [
            "its largest layers are solved by up to 64 blocks of their outputs",
            "that does not fit in 8.0 KiB",
        ],
    }
    other = {
        "": [
            "mamba, 3 blocks; this package's decoder does not have this family",
            "no estimate of memory for this family",
        ]
    }
    refused = {
        "--measure": "is measured for families that run in JAX, and 'mamba' is none of them: leave measure out",
        "--gflops=100": "--gflops has ended: `sparseopt inspect --measure` measures the time of a run",
        "--memory=8": "written like 8GiB, 1.5GB or 800M, given '8'",
    }
    for rows in (known, other):
        for options, words in rows.items():
            status, out, err = command("inspect", path, *options.split())
            assert status == 0, err
            for said in words:
                assert said in out
        unknown(path)
    for option, words in refused.items():
        status, _, err = command("inspect", path, option)
        assert (status, words in err) == (2, True), err


def test_token_ids_are_estimated_by_their_own_number(source):
    found = inspect_model(source, Recipe(method="wanda", calibration=np.zeros((28, 20), np.int32))).recipe
    assert (found["windows"], found["seqlen"]) == (24, 20)
