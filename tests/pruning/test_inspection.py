"""Inspection from headers: known facts of tiny models, and plausible estimates."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants

from sparseopt.layers.methods import find_method, method_cost
from sparseopt.models import Source, open_model
from sparseopt.models.files.safetensors import StoredTensor, write_tensors
from sparseopt.pruning import METHODS, Recipe, inspection, prune_model
from sparseopt.pruning.inspection import Blocks, Inspection, inspect_model
from sparseopt.pruning.memory import block_sizes
from sparseopt.shell.inspect import linear_table, model_lines
from tests.models.tiny import random_tensors, tiny_config, write_folder, write_gguf
from tests.pruning.test_pipeline import TOKENIZER

MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
# Of one block: q and o, k and v, gate and up and down; norms.
LINEARS, NORMS = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64, 2 * 32


def folder(path: Path, rng: np.random.Generator, dtype: Any = np.float32, **changes: Any) -> Path:
    config = tiny_config(**changes)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    write_tensors(path / "model.safetensors", random_tensors(config, rng, dtype))
    return path


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"method": "maiht", "windows": 4, "seqlen": 32, "heldout_windows": 2} | changes)


def test_the_facts_of_a_tiny_model(tmp_path: Path, rng: np.random.Generator) -> None:
    found = inspect_model(folder(tmp_path / "m", rng), recipe())
    assert (found.source, found.path, found.revision) == (str(tmp_path / "m"), str(tmp_path / "m"), None)
    assert (found.model_type, found.supported, found.num_blocks, found.tied) == ("llama", True, 3, True)
    assert found.kinds == (Blocks("full attention, rotary base 10,000, one MLP", (0, 1, 2)),)
    shapes = {linear.name: (linear.outputs, linear.inputs) for linear in found.linears}
    assert shapes == {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }
    assert all(
        (linear.count, linear.dtype, linear.zeros) == (3, "float32", linear.size / 2) for linear in found.linears
    )
    assert linear_table(found).columns[-1].header == "to prune"
    assert found.prunable_parameters == 3 * LINEARS == 27_648
    assert found.block_parameters == 3 * (LINEARS + NORMS)
    assert (found.embedding_parameters, found.head_parameters, found.unused_parameters) == (49 * 32, 0, 0)
    assert found.parameters == 3 * (LINEARS + NORMS) + 49 * 32 + 32 == 29_440
    assert found.dtypes == {"float32": 4 * 29_440}
    assert found.file_bytes == (tmp_path / "m" / "model.safetensors").stat().st_size
    assert found.zeros == 13_824
    assert found.dense_bytes == 4 * 29_440
    assert found.packed_bytes == 27_648 // 8 + 4 * 13_824 + 4 * (29_440 - 27_648)


def test_an_untied_head_and_a_narrow_dtype_count(tmp_path: Path, rng: np.random.Generator) -> None:
    path = folder(tmp_path, rng, ml_dtypes.bfloat16, tie_word_embeddings=False)
    found = inspect_model(path, recipe(pattern="2:4", sparsity=None, dtype="float32"))
    assert (found.tied, found.head_parameters, found.parameters) == (False, 49 * 32, 29_440 + 49 * 32)
    assert found.dtypes == {"bfloat16": 2 * found.parameters}
    assert found.zeros == 13_824
    assert found.dense_bytes == 4 * found.parameters
    assert inspect_model(path, recipe()).dense_bytes == 2 * found.parameters


def test_what_is_told_of_a_name_on_the_hub_is_what_a_prune_does(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "cache" / "models--lab--tiny"
    path = folder(repository / "snapshots" / commit, rng)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    chosen = recipe(calibration=rng.integers(0, 49, (6, 32)), method="wanda", sparsity=0.37)
    found = inspect_model("lab/tiny", chosen)
    assert (found.source, found.path, found.revision) == ("lab/tiny", str(path), commit)
    assert model_lines(found)[0] == f"lab/tiny (in {path}), commit {commit}"
    report = prune_model("lab/tiny", tmp_path / "out", chosen)
    assert sum(layer.zeros for layer in report.layers) == found.zeros
    assert (report.source, report.revision) == ("lab/tiny", commit)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["source"], summary["revision"]) == ("lab/tiny", commit)
    stored = inspect_model(tmp_path / "out", chosen)
    assert sum(stored.dtypes.values()) == found.dense_bytes


def test_experts_are_one_row_with_their_number_left_out(tmp_path: Path, rng: np.random.Generator) -> None:
    path = folder(tmp_path, rng, **MIXTRAL)
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


def test_blocks_that_differ_are_told_apart(tmp_path: Path, rng: np.random.Generator) -> None:
    path = folder(tmp_path, rng, model_type="smollm3", no_rope_layers=[1, 0, 1])
    found = inspect_model(path, recipe())
    assert [kind.indices for kind in found.kinds] == [(0, 2), (1,)]
    assert "no rotary positions" in found.kinds[1].description


def test_an_unknown_family_is_described_by_its_names(tmp_path: Path, rng: np.random.Generator) -> None:
    path = folder(tmp_path, rng)
    (path / "config.json").write_text(json.dumps(tiny_config(model_type="mamba", tie_word_embeddings=False)))
    found = inspect_model(path, recipe())
    assert (found.model_type, found.supported, found.num_blocks) == ("mamba", False, 3)
    assert [(linear.name, linear.count) for linear in found.linears if "up" in linear.name] == [("mlp.up_proj", 3)]
    assert (found.prunable_parameters, found.parameters, found.embedding_parameters) == (27_648, 29_440, 49 * 32)
    assert found.zeros is found.dense_bytes is found.packed_bytes is found.estimate is None


def test_no_tensor_is_read(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: StoredTensor) -> np.ndarray:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoredTensor, "read", refuse)
    assert inspect_model(folder(tmp_path, rng), recipe(method="best", allocation="curves")).estimate


@pytest.mark.parametrize("known", [True, False])
def test_json_and_back(tmp_path: Path, rng: np.random.Generator, known: bool) -> None:
    path = folder(tmp_path, rng, **MIXTRAL)
    if not known:
        (path / "config.json").write_text(json.dumps(tiny_config(model_type="mamba")))
    found = inspect_model(path, recipe())
    assert Inspection.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_estimates_add_up_and_grow_with_the_work(tmp_path: Path, rng: np.random.Generator) -> None:
    path = folder(tmp_path, rng)

    def estimate(**changes: Any) -> Any:
        return inspect_model(path, recipe(**{"calibration": "pydoc"} | changes)).estimate

    plain = estimate()
    assert plain.peak_memory_bytes == max(sum(parts.values()) for parts in plain.memory.values())
    assert plain.peak_memory_bytes == sum(plain.memory[plain.peak_phase].values())
    assert set(plain.memory) == {"start", "Grams", "layer solves"}
    drawn = estimate(calibration="self")
    assert set(drawn.memory) == {"drawing text", *plain.memory}
    assert drawn.memory["drawing text"]["model"] == 4 * inspect_model(path, recipe()).parameters
    more, best = estimate(windows=64, seqlen=128), estimate(method="best", allocation="curves")
    # Windows of 2 tokens are 128 by default, which leaves no room for variants that nobody asked for.
    shown = [inspect_model(path, Recipe(method="best", seqlen=seqlen)).recipe for seqlen in (2, 512)]
    assert [(each["windows"], each["variants"]) for each in shown] == [(128, 0), (16, 3)]
    assert more.peak_memory_bytes > plain.peak_memory_bytes
    assert set(best.memory) - set(plain.memory) == {"survey", "training"}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "wanda"},
        {"method": "wanda", "ignore": ["model.layers.2.mlp.up_proj", "o_proj"], "targets": {"q_proj": 0.25}},
        {"effort": "good", "method": None},
    ],
)
def test_the_time_of_a_run_is_that_of_two_blocks_and_of_one_more_for_each_other(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The runs are whole ones, on two blocks and on one, twice each; nothing is left behind."""
    path, times, blocks = folder(tmp_path / "m", rng), iter((10.0, 100.0, 0.0, 50.0, 20.0, 27.0, 30.0, 34.0)), []
    (path / "tokenizer.json").write_text(TOKENIZER)
    monkeypatch.setattr(inspection, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(inspection.tempfile, "tempdir", str(tmp_path))

    def pruning(source: Source, output: Path, chosen: Recipe) -> None:
        blocks.append({record.block for record in prune_model(source, output, chosen).layers})

    monkeypatch.setattr(inspection, "prune_model", pruning)
    found = inspect_model(path, recipe(**changes), measure=True)
    assert blocks == [{0, 1}, {0}, {0, 1}, {0}]
    assert found.seconds == 90 + (7 - 4)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("method", "preset"), [*((name, None) for name in METHODS), ("maiht", "paper")])
def test_every_method_has_a_cost(method: str, preset: str | None) -> None:
    cost = method_cost(find_method(method, preset))
    assert all(value >= 0 for value in jax.tree.leaves(dataclasses.asdict(cost)))
    assert cost.workspace.wide > 0


def test_a_method_of_ones_own_has_an_estimate(tmp_path: Path, rng: np.random.Generator) -> None:
    from sparseopt.core.base.types import pytree
    from sparseopt.pruning import Magnitude

    @pytree
    class Mine:
        def __call__(self, layer: Any, pattern: Any) -> Any:
            return Magnitude()(layer, pattern)

    estimate = inspect_model(folder(tmp_path, rng), recipe(method=Mine())).estimate
    assert estimate is not None
    assert estimate.peak_memory_bytes > 0


def test_mistakes_are_told_before_any_work(tmp_path: Path, rng: np.random.Generator) -> None:
    path = folder(tmp_path, rng)
    with pytest.raises(ValueError, match="unknown method"):
        inspect_model(path, recipe(method="obs"))
    with pytest.raises(ValueError, match=r"self_attn\.q_proj: .*3:5"):
        inspect_model(path, recipe(pattern="3:5", sparsity=None))


def test_a_tokenizer_that_is_refused_is_told(tmp_path: Path, rng: np.random.Generator, command: Any) -> None:
    tensors = random_tensors(tiny_config(), rng)
    known = write_gguf(tmp_path / "known.gguf", tiny_config(), tensors)
    assert inspect_model(known).no_text is None
    odd = write_gguf(tmp_path / "odd.gguf", tiny_config(), tensors, pre="odd")
    status, out, _ = command("inspect", odd)
    assert status == 0
    assert "`sparseopt prune` and `eval` refuse it" in out
    assert "splits words by 'odd' (tokenizer.ggml.pre)" in out
    status, _, err = command("eval", odd, "--seqlen", 32)
    assert status == 2
    assert "splits words by 'odd' (tokenizer.ggml.pre)" in err


def test_the_command_shows_a_table_or_json(tmp_path: Path, rng: np.random.Generator, command: Any) -> None:
    path = write_folder(tmp_path / "m", tiny_config(), random_tensors(tiny_config(), rng), 2)
    (path / "tokenizer.json").write_text(TOKENIZER)
    status, out, err = command("inspect", path, "--sparsity", 0.25, "--memory", "256MiB")
    assert status == 0, err
    for text in (
        "llama, 3 blocks",
        "all blocks alike: full attention",
        "29,440 parameters: 27,840 in blocks, of which prunable 27,648; embedding 1,568, head tied to the embedding",
        "│ mlp.down_proj │ 0-2 │ 32x64 │ 3 │ float32 │ 6,144 │ 0.2500 │",
        "6,912 zeros, 25.00% of the linears, 23.48% of all",
        "output 115.0 KiB dense",
        "that does not fit in 256.0 MiB",
        "--measure says the time of a run",
    ):
        assert text in out
    status, out, err = command("inspect", path, "--device-memory", "8KiB")
    assert status == 0, err
    assert "its largest layers are solved by up to 64 blocks of their outputs" in out
    assert "that does not fit in 8.0 KiB" in out
    status, out, _ = command("inspect", path, "--json")
    assert status == 0
    assert Inspection.from_dict(json.loads(out)) == inspect_model(path, Recipe())
    (path / "config.json").write_text(json.dumps(tiny_config(model_type="mamba")))
    status, out, _ = command("inspect", path)
    assert status == 0
    assert "mamba, 3 blocks; this package's decoder does not have this family" in out
    assert "no estimate of memory for this family" in out
    status, _, err = command("inspect", path, "--measure")
    assert status == 2
    assert "is measured for families that run in JAX, and 'mamba' is none of them: leave measure out" in err
    status, _, err = command("inspect", path, "--gflops", 100)
    assert status == 2
    assert "--gflops has ended: `sparseopt inspect --measure` measures the time of a run" in err
    status, _, err = command("inspect", path, "--memory", "8")
    assert status == 2
    assert "written like 8GiB, 1.5GB or 800M, given '8'" in err


def test_token_ids_are_estimated_by_their_own_number(tmp_path: Path, rng: np.random.Generator) -> None:
    source = write_folder(tmp_path, tiny_config(), random_tensors(tiny_config(), rng))
    recipe = Recipe(method="wanda", calibration=np.zeros((28, 20), np.int32))
    found = inspect_model(source, recipe).recipe
    assert (found["windows"], found["seqlen"]) == (24, 20)
    with pytest.raises(ValueError, match=r"windows is for text; .* there are 24 besides the held-out ones, given 1"):
        recipe.model_copy(update={"windows": 1})
