"""Repair of a gap: the answer is the least-squares one, found apart from the package, and it is what the files hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import load_decoder, open_model
from sparseopt.pruning import ShrinkRecipe, shrink_model
from sparseopt.pruning.base.activations import Batches, Stream
from sparseopt.pruning.base.records import RepairRecord
from sparseopt.pruning.train.repair import repair_block
from tests.jitted import run
from tests.models.tiny import VOCAB
from tests.pruning.train.tasks import through
from tests.pruning.whole_runs import Broken, ended_by, model_bytes, write_model

WINDOWS, HELDOUT = 14, 2


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(5).integers(0, len(VOCAB), (WINDOWS + HELDOUT, 24)).astype(np.int32)


def streams_of(model, ids, behind):
    """The stream before block 0, and the dense model's behind block `behind`."""
    x = model.embedding()(jnp.asarray(ids)).at[:, 0].multiply(30)  # a few tokens are far larger than the others
    before = [x[start : start + 2] for start in range(0, len(x), 2)]
    after = [through([model.block(index) for index in range(behind + 1)], part) for part in before]
    return tuple(Stream(Batches(each[:-1]), Batches(each[-1:])) for each in (before, after))


def float32_of(block):
    return {f"mlp.down_proj.{what}": np.dtype(np.float32) for what in ("weight", "bias")} | {
        f"{name}.weight": np.dtype(np.float32) for name in block.linears
    }


def rows(batches):
    return np.concatenate([np.asarray(part, np.float64).reshape(-1, part.shape[-1]) for part in batches])


def without_mlp(block):
    """The same block whose MLP adds nothing."""
    block = block.copy()
    names = [f"{name}.weight" for name in block.linears if name.endswith("down_proj")]
    names += ["mlp.down_proj.bias"] if block.config.mlp_bias and not block.num_experts else []
    block.write({name: np.zeros(block.read(name).shape) for name in names})
    return block


def mlp_inputs(block, x):
    """What `down_proj` reads, computed from the parts of the block."""
    read = block.mlp_norm(x + block.self_attn(block.attention_norm(x)))
    return jax.nn.silu(block.mlp.gate_proj(read)) * block.mlp.up_proj(read)


def relative_error(block, stream, target):
    error, size = rows(run(block, x) for x in stream) - rows(target), rows(target)
    return np.mean(np.sum(error**2, axis=1) / np.sum(size**2, axis=1))


@pytest.mark.parametrize("ridge", [1.0, 1e-3])
@pytest.mark.parametrize("name", ["llama", "biased", "experts"])
def test_the_map_is_the_least_squares_answer_of_collected_activations(models, ids, name, ridge):
    model = open_model(models(name))
    dense, block, (before, after) = model.block(0), model.block(0), streams_of(model, ids, 1)
    found, record = repair_block(block, before, after, float32_of(block), 0, (1,), ridge)
    outputs, targets = rows(run(dense, x) for x in before.calibration), rows(after.calibration)
    if dense.num_experts:
        inputs = outputs - rows(run(without_mlp(dense), x) for x in before.calibration)
    else:
        inputs = rows(jax.jit(mlp_inputs)(dense, x) for x in before.calibration)
    if name == "biased":
        inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
    scale = 1 / np.linalg.norm(targets, axis=1, keepdims=True)
    inputs, wanted = scale * inputs, scale * (targets - outputs)
    ridged = np.vstack([inputs, np.sqrt(ridge) * np.diag(np.linalg.norm(inputs, axis=0))])
    change = np.linalg.lstsq(ridged, np.vstack([wanted, np.zeros((inputs.shape[1], wanted.shape[1]))]))[0].T
    for path, value in found.items():
        old = np.asarray(dense.read(path), np.float64)
        new = (
            old + change @ old
            if dense.num_experts
            else old + (change[:, -1] if "bias" in path else change[:, : old.shape[1]])
        )
        np.testing.assert_allclose(value, new, rtol=0, atol=2e-4 * np.abs(new).max(), err_msg=path)
    assert len(found) == (4 if dense.num_experts else 1 + (name == "biased"))
    errors = [
        relative_error(each, stream, target)
        for stream, target in ((before.calibration, after.calibration), (before.heldout, after.heldout))
        for each in (dense, block)
    ]
    shown = [record.first_error, record.last_error, record.heldout_first, record.heldout_last]
    np.testing.assert_allclose(shown, errors, rtol=1e-4)
    assert record.last_error < 0.95 * record.first_error
    assert (record.block, record.removed) == (0, (1,))


@pytest.mark.parametrize("name", ["llama", "experts"])
def test_removed_blocks_that_are_linear_in_what_the_mlp_computes_are_repaired_exactly(models, ids, name):
    model = open_model(models(name))
    block, (before, _) = model.block(0), streams_of(model, ids, 0)
    linear = np.eye(32) + np.random.default_rng(6).normal(size=(32, 32)) / 8

    def mapped(x):
        rest = run(without_mlp(model.block(0)), x)
        return rest + (run(model.block(0), x) - rest) @ linear

    targets = Stream(*(Batches(list(map(mapped, part))) for part in (before.calibration, before.heldout)))
    _, record = repair_block(block, before, targets, float32_of(block), ridge=1e-6)
    assert record.heldout_first > 1e-3
    assert record.heldout_last < 1e-6 * record.heldout_first


@pytest.fixture(scope="module")
def repaired(models, ids, tmp_path_factory):
    """Blocks removed from the model with biases: a gap behind its first block."""
    recipe = ShrinkRecipe(calibration=ids, heldout_windows=HELDOUT, layers=0.67, train_epochs=0)
    return recipe, shrink_model(models("biased"), tmp_path_factory.mktemp("repaired") / "out", recipe)


def test_a_run_changes_the_layer_before_the_gap_alone_and_reports_the_stream_s_error(models, ids, repaired):
    _, report = repaired
    dense, small = open_model(models("biased")), open_model(report.output)
    [record] = report.repairs
    assert (report.shape.removed, record.block, record.removed) == ((1,), 0, (1,))
    changed = {
        path
        for place, index in enumerate(report.shape.blocks)
        for path, key in small.block_keys(place).items()
        if not np.array_equal(small.stored(key), dense.stored(dense.block_keys(index)[path]))
    }
    assert changed == {"mlp.down_proj.weight", "mlp.down_proj.bias"}
    x = [dense.embedding()(jnp.asarray(part)) for part in (ids[:WINDOWS], ids[WINDOWS:])]
    wanted = [through([dense.block(0), dense.block(1)], part) for part in x]
    for part, target, old, new in zip(
        x, wanted, (record.first_error, record.heldout_first), (record.last_error, record.heldout_last), strict=True
    ):
        assert relative_error(dense.block(0), [part], [target]) == pytest.approx(old, rel=1e-4)
        assert relative_error(small.block(0), [part], [target]) == pytest.approx(new, rel=1e-4)
        assert new < old


def test_a_gguf_file_of_it_computes_the_same_and_an_interrupted_run_too(tmp_path, models, ids, repaired):
    recipe, report = repaired
    with pytest.raises(Broken):
        shrink_model(models("biased"), tmp_path / "again", recipe, observer=ended_by(RepairRecord))
    again = shrink_model(models("biased"), tmp_path / "again", recipe)
    assert model_bytes(again.output) == model_bytes(report.output)
    assert shrink_model(models("biased"), tmp_path / "again", recipe).repairs == again.repairs == report.repairs
    file = shrink_model(models("llama"), tmp_path / "small.gguf", recipe).output
    folder = shrink_model(models("llama"), tmp_path / "small", recipe).output
    logits = [np.asarray(run(load_decoder(place), ids[:2])) for place in (file, folder)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


def test_training_of_the_block_before_a_gap_aims_behind_it(tmp_path, models, ids, repaired):
    recipe, report = repaired
    trained = shrink_model(models("biased"), tmp_path / "out", recipe.model_copy(update={"train_epochs": 1}))
    # Both compare the same streams, weighted alike up to the channels' weights.
    assert trained.blocks[0].first_loss == pytest.approx(report.repairs[0].last_error, rel=0.5)
    assert trained.blocks[0].first_loss < report.repairs[0].first_error


@pytest.mark.parametrize("name", ["gemma3_text", "mixtral"])
def test_a_norm_behind_the_mlp_and_a_gap_at_the_start_leave_nothing_to_fit(tmp_path, ids, name):
    """Of the mixture the first block goes; of Gemma 3 a norm fixes the size of what the MLP adds."""
    source = write_model(tmp_path / "in", name)
    blocks = open_model(source).num_blocks
    recipe = ShrinkRecipe(calibration=ids % 40, heldout_windows=HELDOUT, layers=1 - 1 / blocks, train_epochs=0)
    report = shrink_model(source, tmp_path / "out", recipe)
    assert report.repairs == []
    assert report.shape.removed == (0,) or name != "mixtral"
    dense, small = open_model(source), open_model(report.output)
    for place, index in enumerate(report.shape.blocks):
        for path, key in small.block_keys(place).items():
            assert np.array_equal(small.stored(key), dense.stored(dense.block_keys(index)[path])), key
