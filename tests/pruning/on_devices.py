"""Tests that need eight devices: `test_devices.py` runs them in a process with eight virtual ones.

The results of one device, and the amount of communication. Layers are tiny: nearly all of the time is compilation.
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.core.base.mesh import device_line, over, put, whole
from sparseopt.core.base.thresholds import kth_largest, top_k_mask
from sparseopt.core.losses.quadratic import Quadratic
from sparseopt.core.penalties.entries import L0
from sparseopt.core.penalties.patterns import NM, RowTopK, TopK
from sparseopt.core.penalties.sets import Support
from sparseopt.core.problem.problem import Problem
from sparseopt.core.solve import solve
from sparseopt.core.solvers.maiht import Maiht
from sparseopt.core.solvers.refit import Refit
from sparseopt.layers import side_by_side, split
from sparseopt.layers.methods.admm import QuadraticAdmm
from sparseopt.layers.patterns import check_cut, parse_pattern
from sparseopt.layers.problem import layer_solver
from sparseopt.layers.side_by_side import LayerTask, side_by_side_solver, solve_block
from sparseopt.layers.split import cut_solver, solve_within_memory
from sparseopt.models import open_model
from sparseopt.pruning import LayerJob, Recipe, Stopped, find_method, prune_model
from sparseopt.pruning.base.activations import Batches, SpreadBatches
from sparseopt.pruning.base.grams import BlockRunner, grams_over, sum_over
from tests.collectives import collectives
from tests.layers.layers import make_layer
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder
from tests.pruning.whole_runs import stored

INPUTS = 32
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
SCALARS = ("relative_error", "test_error", "zeros", "kept", "steps", "status", "stray", "fits")


def job_of(rng, outputs, pattern, sparsity=0.5, support=None):
    weight, gram, test_gram = make_layer(rng, outputs, INPUTS)
    weights = np.exp(rng.standard_normal(outputs)).astype(np.float32)
    if support is not None:
        support = rng.random(weight.shape) < support
    return LayerJob(weight, gram, test_gram, parse_pattern(pattern, sparsity, weight.shape), weights, support=support)


def assert_same(one, other, apart=2e-4):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    np.testing.assert_array_equal(one != 0, other != 0)
    np.testing.assert_allclose(one, other, rtol=0, atol=apart)


def assert_same_models(folder, other, apart=1e-4):
    one, other = stored(folder), stored(other)
    assert one.keys() == other.keys()
    for key in one:
        assert_same(one[key], other[key], apart)


@pytest.mark.parametrize(
    ("method", "preset", "pattern", "outputs", "devices"),
    [
        ("maiht", "paper", "unstructured", 48, 8),
        ("maiht", "tuned", "unstructured", 37, 8),
        ("admm", None, "per-row", 37, 3),
        ("sparsegpt", None, "unstructured", 48, 8),
        ("wanda", None, "2:4", 37, 8),
        ("osscar", None, "group:4", 37, 8),
        ("magnitude", None, "block:4x4", 64, 8),
    ],
)
def test_a_layer_solved_on_many_devices_is_that_of_one_and_never_brought_together(
    method, preset, pattern, outputs, devices
):
    job = job_of(np.random.default_rng(3), outputs, pattern, support=0.7 if method == "wanda" else None)
    solver = find_method(method, preset)
    one, many = layer_solver(job, solver), solve_within_memory(job, solver, device_line(devices))
    assert_same(one.weight, many.weight)
    ours, theirs = ([float(getattr(report, name)) for name in SCALARS] for report in (one, many))
    assert theirs == pytest.approx(ours, rel=1e-3)
    # Counts, steps and status are the same to the last one.
    assert theirs[2:] == ours[2:]
    size = outputs * INPUTS * 4
    for found in collectives(cut_solver.texts[-1]):
        # A device's own part of the layer is an eighth or a third of it; what is gathered are counts, and of one
        # input the scores where a tie is broken. What is reduced is the sample, and totals of inputs.
        assert found.kind in ("all-reduce", "all-gather")
        assert found.bytes <= (size // devices // 4 if found.kind == "all-gather" else size)


def test_a_layer_that_does_not_fit_is_solved_by_blocks_over_all_devices(monkeypatch):
    solved, plain = [], split.solve_over

    def short(job, method, mesh):
        if len(job.weight) > 24:
            raise MemoryError("out of memory")
        solved.append(len(job.weight))
        return plain(job, method, mesh)

    monkeypatch.setattr(split, "solve_over", short)
    job, wanda = job_of(np.random.default_rng(3), 48, "unstructured"), find_method("wanda")
    many = solve_within_memory(job, wanda, device_line(8))
    assert (solved, many.output_blocks) == ([24, 24], 2)
    assert_same(solve_within_memory(job, wanda).weight, many.weight, apart=0)


@pytest.fixture(scope="module")
def linears():
    """Seven linears of two kinds, of different counts and steps, and what one device makes of them by maiht."""
    rng, found = np.random.default_rng(9), []
    for i, outputs in enumerate([37, 24, 37, 37, 24, 37, 37]):
        job = job_of(rng, outputs, "unstructured", 0.3 + 0.05 * i)
        found.append(LayerTask(f"{i}", job.weight.shape, job.weight.shape, lambda job=job: job))
    alone = [solved.report for solved in solve_block(found, find_method("maiht", "tuned"), None)]
    return found, {linear.name: report for linear, report in zip(found, alone, strict=True)}


@pytest.mark.parametrize(("memory", "order"), [(True, "0123456"), (False, "14")])
def test_linears_side_by_side_are_those_of_one_device_and_tell_each_other_nothing(linears, monkeypatch, memory, order):
    def short(*arguments):
        raise MemoryError("out of memory")

    if not memory:
        monkeypatch.setattr(side_by_side, "side_by_side_solver", lambda mesh: short)
    (tasks, alone), cut = linears, len(cut_solver.texts)
    some, mesh = [tasks[int(name)] for name in order], device_line(8)
    reports = [one.report for one in solve_block(some, find_method("maiht", "tuned"), mesh)]
    for task, report in zip(some, reports, strict=True):
        expected = alone[task.name]
        # Rounding, which differs between processors, moves weights along directions that the Gram hardly sees.
        assert_same(expected.weight, report.weight, apart=1e-3)
        assert int(report.steps) == int(expected.steps)
        assert float(report.test_error) == pytest.approx(float(expected.test_error), rel=1e-3)
    assert len({int(report.steps) for report in reports}) > 1
    # A program a shape; where memory is too short for them, the linears are cut.
    programs = side_by_side_solver(mesh).texts
    assert [collectives(text) for text in programs] == [[], []]
    assert len(cut_solver.texts) - cut == (0 if memory else 1)


def test_a_pattern_of_blocks_that_a_cut_would_part_is_rejected():
    pattern, shape = parse_pattern("block:4x4", 0.5, (48, 32)), (48, 32)
    with pytest.raises(ValueError, match=r"blocks of 4 outputs; 1, 2, 3, 4, 6 devices do not"):
        check_cut(pattern, shape, device_line(8))
    check_cut(pattern, shape, None)


@pytest.mark.parametrize("axis", [0, 1])
def test_ties_are_broken_as_on_one_device(axis):
    score = np.round(np.abs(np.random.default_rng(5).standard_normal((24, 40))) * 4).astype(np.float32) / 4
    select = jax.jit(lambda x, k: (top_k_mask(x, k), kth_largest(x, k)))
    for k in (1, 333, 700):
        mask = np.zeros(score.size, bool)
        mask[np.argsort(-score, axis=None, kind="stable")[:k]] = True
        chosen, level = select(put(score, over(device_line(8), axis)), k)
        np.testing.assert_array_equal(whole(chosen), mask.reshape(score.shape))
        assert float(level) == np.sort(score, axis=None)[-k]


@pytest.mark.parametrize(
    ("solver", "penalty", "each", "once"),
    [
        # Ten int32 counts and two float32 losses; "always" compares the two points by two more counts and one more sum.
        (Maiht(0.9, 0.5, "on_increase", "support"), L0(0.1), 0, 10 * 4 + 2 * 4),
        (Maiht(0.9, 0.5, "always", "support"), L0(0.1), 0, 12 * 4 + 3 * 4),
        # Two counts, two losses, and three times a flag for whether a point lies in the pattern.
        (Maiht(0.9, None, "on_increase", "support"), NM(2, 4), 0, 2 * 4 + 2 * 4 + 3),
        # As 2:4, and two selections: a flag before every pass and one for ties.
        (Maiht(0.9, None, "on_increase", "support"), RowTopK(32), 2, 2 * 4 + 2 * 4 + 3 + 2),
        # A selection: three counts a pass, and every 17th score of the 256 x 64 as the sample. Ties have their branch:
        # the totals of the inputs, and one input's scores.
        (QuadraticAdmm(0.1, watch=False), TopK(8192), 3 * 4, 4 * 964 + 4 * (64 + 1) + 4 * 256 // 8),
        # Two sums.
        (Refit(), Support(np.arange(64)[:, None] % 4 < np.full(256, 2)), 0, 2 * 4),
    ],
)
def test_an_iteration_exchanges_few_bytes_whatever_the_layer(solver, penalty, each, once):
    """`each` pass of a selection, and `once` an iteration, on a layer of 256 outputs and 64 inputs."""
    mesh = device_line(8)
    hessian = put(np.eye(64, dtype=np.float32), over(mesh, None))
    center = put(np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32), over(mesh, 1))
    if isinstance(penalty, Support):
        penalty = Support(put(penalty.mask, over(mesh, 1)))

    def run(hessian, center, solver, penalty):
        return solve(Problem(Quadratic(hessian, center), penalty), solver, center, tol=5e-4, max_steps=80).value

    sent = collectives(jax.jit(run).lower(hessian, center, solver, penalty).compile().as_text())
    assert sum(found.bytes for found in sent if len(found.loops) == 2) == each
    assert sum(found.bytes for found in sent if len(found.loops) == 1) == once


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["plain", "experts"])
def test_grams_and_streams_over_devices_are_those_of_one_and_exchanged_once(tmp_path, changes):
    mesh = device_line(8)
    tokens = np.random.default_rng(4).integers(0, len(VOCAB), (11, 24)).astype(np.int32)
    config = tiny_config(**changes)
    model = open_model(write_folder(tmp_path / "model", config, random_tensors(config, np.random.default_rng(7))))
    block, embedding, runner = model.block(0), model.embedding(), BlockRunner()
    one, many = (kind.embed(embedding, tokens) for kind in (Batches(), SpreadBatches(mesh)))
    programs = [grams_over(mesh, "residual", "routed"), sum_over(mesh)]
    before = [len(program.texts) for program in programs]
    drift = (runner.forward(block, one), runner.forward(block, many))
    grams = [runner.grams(block, s, "residual", d).stacked for s, d in zip((one, many), drift, strict=True)]
    for tap, right in grams[0].items():
        for a, b in zip(right, grams[1][tap], strict=True):
            if a is not None:
                np.testing.assert_allclose(whole(b), a, rtol=0, atol=2e-5 * max(float(jnp.abs(a).max()), 1e-6))
    # Eleven windows, two a device in one batch of sixteen.
    assert (len(many), len(many[0])) == (1, 16)
    behind = [np.concatenate([np.asarray(x) for x in s.on_one_device()]) for s in drift]
    assert len(behind[1]) == 11
    np.testing.assert_allclose(behind[1], behind[0], rtol=0, atol=1e-4)
    adding, summing = (
        [found for text in program.texts[start:] for found in collectives(text)]
        for program, start in zip(programs, before, strict=True)
    )
    assert adding == []
    assert {found.kind for found in summing} == {"all-reduce"}
    if not changes:
        # Gram, drift and sum of every input in float32, the sum of the tokens' weights and their number.
        widths = [g.gram.shape[-1] for g in grams[0].values() if g.drift is not None]
        assert sum(found.bytes for found in summing) == sum(2 * 4 * width**2 + 4 * width + 4 + 4 for width in widths)


TOKENS = np.random.default_rng(8).integers(0, len(VOCAB), (13, 24)).astype(np.int32)
# All linears of one shape: one program for all of them.
SQUARE = tiny_config(num_hidden_layers=2, intermediate_size=32, num_key_value_heads=4)
CURVES = {"method": "wanda", "allocation": "curves", "propagate": 0.5, "train_epochs": 1}


@pytest.mark.parametrize(
    ("config", "settings", "programs"),
    [
        (SQUARE, {"preset": "paper", "weighting": "residual"}, (1, 0)),
        (SQUARE, CURVES, (0, 1)),
        # Some experts see fewer tokens than that.
        (tiny_config(num_hidden_layers=1, **EXPERTS), {"method": "wanda", "min_expert_tokens": 130}, (0, 5)),
    ],
    ids=["paper", "curves", "experts"],
)
def test_a_model_pruned_on_many_devices_is_that_of_one(tmp_path, monkeypatch, config, settings, programs):
    source = write_folder(tmp_path / "model", config, random_tensors(config, np.random.default_rng(7)))
    recipe = Recipe(calibration=TOKENS, heldout_windows=2, **settings)
    if "preset" in settings:
        # Were sums for nothing, layers would be cut: the seven linears of a block have eight devices.
        monkeypatch.setattr(side_by_side, "STAGE", {"cpu": 0.0})
    beside = side_by_side_solver(device_line("all"))
    before = len(cut_solver.texts), len(beside.texts)
    one = prune_model(source, tmp_path / "one", recipe)
    many = prune_model(source, tmp_path / "many", recipe, devices="all")
    assert (len(cut_solver.texts) - before[0], len(beside.texts) - before[1]) == programs
    assert_same_models(one.output, many.output)
    for ours, theirs in zip(many.layers, one.layers, strict=True):
        assert (ours.steps, ours.starved) == (theirs.steps, theirs.starved)
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-3)
    assert any(record.starved for record in many.layers) == (config is not SQUARE)
    # Eleven windows of 24 tokens.
    assert many.layers[0].tokens == one.layers[0].tokens == 264
    summary = SimpleNamespace(**json.loads((many.output / "summary.json").read_text()))
    assert (summary.devices, summary.processes, summary.platform, summary.precision) == (8, 1, "cpu", "highest")
    if settings is CURVES:
        with pytest.raises(Stopped):
            prune_model(source, tmp_path / "stopped", recipe, devices=8, stop=lambda: True)
        resumed = prune_model(source, tmp_path / "stopped", recipe, devices=3)
        assert resumed.resumed_blocks == 1
        assert_same_models(one.output, resumed.output)
        with pytest.raises(ValueError, match="given 8GiB and 8 devices"):
            prune_model(source, tmp_path / "rejected", recipe, devices=8, memory="8GiB")
