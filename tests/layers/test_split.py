"""Layers that do not fit in memory, solved by blocks of outputs, and those that are solved side by side on devices."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from sparseopt.core.penalties.patterns import TopK
from sparseopt.layers import split
from sparseopt.layers.methods import Magnitude, MaihtPruning, SparseGpt, Wanda, find_method, method_cost
from sparseopt.layers.patterns import count_groups, parse_pattern
from sparseopt.layers.problem import LayerJob, check_answer, layer_solver
from sparseopt.layers.side_by_side import LayerTask, quicker_side_by_side, share_out
from sparseopt.layers.split import fewest_blocks, join_reports, largest_by_row, solve_within_memory, split_job
from sparseopt.pruning import LayerRecord, PruningError, Recipe, prune_layer, prune_model
from sparseopt.pruning.run.facts import run_facts
from sparseopt.system.run_folder import RECORDS
from tests.layers.layers import error_of, make_layer
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder
from tests.pruning.whole_runs import model_bytes

# What XLA says on a device, and what Python says on the host.
FAILURES = {
    "device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.\nmore"),
    "host": MemoryError("Unable to allocate 1 GiB"),
}


def running_out(monkeypatch, outputs, failure=None):
    """Let every solve of more outputs than that run out of memory; what was tried is returned."""
    tried = []

    def solve(job, method):
        tried.append(len(job.weight))
        if len(job.weight) > outputs:
            raise failure or FAILURES["device"]
        return layer_solver(job, method)

    monkeypatch.setattr(split, "layer_solver", solve)
    return tried


def joined_parts(job, method, count):
    return join_reports([jax.device_get(layer_solver(part, method)) for part in split_job(job, method, count)])


@pytest.fixture
def layer(rng):
    """A layer whose outputs differ in size, so that an even share of the count would be a poor one."""
    weight, gram, test_gram = make_layer(rng)
    sizes = np.exp(0.5 * rng.standard_normal(len(weight))).astype(np.float32)
    return weight * sizes[:, None], gram, test_gram


def make_job(layer, pattern, sparsity=0.6, output_weights=None):
    weight, gram, test_gram = layer
    return LayerJob(weight, gram, test_gram, parse_pattern(pattern, sparsity, weight.shape), output_weights)


@pytest.mark.parametrize(
    ("method", "within"),
    [(Wanda(), 0), (Magnitude(), 0), (SparseGpt(), 0.03), (MaihtPruning(), 0.03)],
    ids=lambda value: type(value).__name__,
)
def test_a_count_over_the_layer_stays_exact_and_the_error_nearly_the_same(layer, rng, monkeypatch, method, within):
    job = make_job(layer, "unstructured", output_weights=np.exp(2 * rng.standard_normal(48)).astype(np.float32))
    whole = solve_within_memory(job, method)
    assert whole.output_blocks == 1
    tried = running_out(monkeypatch, 12, FAILURES["host" if within else "device"])
    parts = solve_within_memory(job, method)
    assert tried == [48, 24, *[12] * 4]
    assert parts.output_blocks == 4
    check_answer(parts, method, job.pattern)
    weight, gram, test_gram = layer
    assert np.count_nonzero(parts.weight) == round(0.4 * weight.size)
    for given, found in ((gram, parts.relative_error), (test_gram, parts.test_error)):
        assert float(found) == pytest.approx(error_of(parts.weight, weight, given), rel=1e-4)
    if within:
        assert float(parts.relative_error) == pytest.approx(float(whole.relative_error), rel=within)
    else:
        np.testing.assert_array_equal(parts.weight, whole.weight)
        assert prune_layer(weight, gram, 0.6, method=method).output_blocks == 4


def test_patterns_that_count_by_output_give_the_same_weights(layer, rng):
    """Also with weights of the outputs, whose mean another block does not have."""
    outputs = np.exp(rng.standard_normal(48)).astype(np.float32)
    job, method = make_job(layer, "per-row", output_weights=outputs), SparseGpt()
    whole, joined = layer_solver(job, method), joined_parts(job, method, 2)
    check_answer(joined, method, job.pattern)
    np.testing.assert_array_equal(joined.weight != 0, np.asarray(whole.weight) != 0)
    np.testing.assert_allclose(joined.weight, whole.weight, rtol=1e-3, atol=1e-4)


def test_blocks_of_outputs_are_rounded_to_few_bits_as_the_whole(layer):
    job, method = make_job(layer, "unstructured"), find_method("wanda", bits="q4_0")
    whole, parts = layer_solver(job, method), joined_parts(job, method, 2)
    np.testing.assert_array_equal(parts.weight, whole.weight)
    for one, other in zip(parts.grid_energies, whole.grid_energies, strict=True):
        assert one.lost == pytest.approx(float(other.lost), rel=1e-4)


def test_blocks_of_a_pattern_are_not_parted(layer):
    job = make_job(layer, "block:4x8")
    # 12 rows of blocks over 8 parts.
    assert [len(part.weight) for part in split_job(job, Wanda(), 8)] == [8] * 4 + [4] * 4
    joined = joined_parts(job, Wanda(), 8)
    np.testing.assert_array_equal(joined.weight, layer_solver(job, Wanda()).weight)
    assert count_groups(joined.weight, job.pattern).each == [round(0.4 * 96)]


@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_scores_are_counted_row_by_row(rng, ties):
    scores = np.abs(rng.standard_normal((20, 30)) * 10.0 ** rng.integers(-20, 20, (20, 1))).astype(np.float32)
    if ties:
        scores = np.round(np.minimum(scores, 8)).astype(np.float32)
    for k in (0, 1, 37, 500, 600):
        found = largest_by_row(scores, k)
        assert found.sum() == k
        limit = np.sort(scores.ravel())[::-1][k - 1] if k else np.inf
        above, tied = (scores > limit).sum(axis=1), (scores == limit).sum(axis=1)
        assert (above <= found).all()
        assert (found <= above + tied).all()


def test_a_device_that_tells_its_memory_gets_the_blocks_of_the_estimate_at_once(layer, monkeypatch):
    job, method = make_job(layer, "unstructured"), SparseGpt()
    outputs, inputs = job.weight.shape
    workspace = method_cost(method).workspace
    tried = running_out(monkeypatch, outputs)
    for room, blocks in ((workspace.nbytes(outputs, inputs), 1), (workspace.nbytes(outputs // 4, inputs), 4), (1, 16)):
        monkeypatch.setattr(split, "device_memory_left", lambda room=room: room)
        assert solve_within_memory(job, method).output_blocks == blocks
        assert fewest_blocks((outputs, inputs), workspace, room) == blocks
    assert tried == [outputs, *[outputs // 4] * 4, *[outputs // 16] * 16]


OTHER = jax.errors.JaxRuntimeError("INTERNAL: something else")
# The failure of every solve, the pattern, the sizes that are tried, and what is told.
UNSOLVED = [
    (FAILURES["host"], "unstructured", [48, 24, 12, 6, 3], r"\[out=48, in=64\].*3 outputs.*1 GiB"),
    (FAILURES["device"], "group:4", [48], "chosen for all outputs together"),
    # Not taken for missing memory.
    (OTHER, "unstructured", [48], "something else"),
]


@pytest.mark.parametrize(("failure", "pattern", "sizes", "message"), UNSOLVED)
def test_a_layer_that_cannot_be_split_is_rejected_with_its_sizes(layer, monkeypatch, failure, pattern, sizes, message):
    tried = running_out(monkeypatch, 0, failure)
    with pytest.raises(type(OTHER) if failure is OTHER else MemoryError, match=message):
        prune_layer(*layer[:2], 0.5, pattern, "wanda")
    assert tried == sizes


def test_a_run_says_which_layers_were_solved_by_blocks_and_resumes_where_memory_was_missing(tmp_path, monkeypatch):
    config = tiny_config(num_key_value_heads=4)
    source = write_folder(tmp_path / "model", config, random_tensors(config, np.random.default_rng(7)))
    tokens = np.random.default_rng(8).integers(0, len(VOCAB), (4, 24)).astype(np.int32)
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=1)
    running_out(monkeypatch, 32)
    whole = prune_model(source, tmp_path / "whole", recipe)
    large = [r.layer for r in whole.layers if r.layer.endswith(("gate_proj", "up_proj"))]
    assert whole.blocked_layers == dict.fromkeys(large, 2)
    assert all(r.zeros == r.size // 2 for r in whole.layers)
    lines = [json.loads(line) for line in (tmp_path / "whole" / RECORDS).read_text().splitlines()]
    assert [line["output_blocks"] for line in lines] == [1, 1, 1, 1, 2, 2, 1] * 3
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["blocked_layers"] == whole.blocked_layers
    told = "6 layers did not fit in memory whole and were solved in blocks of outputs, up to 2: model.layers.0.mlp.gate"
    assert any(fact.text.startswith(told) for fact in run_facts(whole))

    def short_from_the_third_block_on(event, done, total):
        if isinstance(event, LayerRecord) and done == 15:
            running_out(monkeypatch, 0)

    with pytest.raises(PruningError, match=r"model.layers.2.self_attn.k_proj: the solve .* \[out=32, in=32\] does not"):
        prune_model(source, tmp_path / "out", recipe, observer=short_from_the_third_block_on)
    running_out(monkeypatch, 32)
    resumed = prune_model(source, tmp_path / "out", recipe)
    assert (resumed.resumed_blocks, resumed.blocked_layers) == (2, whole.blocked_layers)
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")


# Every program is compiled before the limit falls: the compiler itself cannot be short of memory and live.
LIMITED = """
import resource, time
from pathlib import Path
import numpy as np
from sparseopt.layers.methods import Wanda
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import check_answer, layer_solver
from sparseopt.layers.split import solve_within_memory, split_job
from sparseopt.pruning import LayerJob
rng, method = np.random.default_rng(0), Wanda()
weight, x = rng.standard_normal((131072, 64), np.float32), rng.standard_normal((256, 64), np.float32)
job = LayerJob(weight, x.T @ x, None, parse_pattern("unstructured", 0.5, weight.shape))
for parts in (4, 2, 1):
    layer_solver(split_job(job, method, parts)[0], method)
time.sleep(0.5)
# Whole it takes about 200 MiB, by fourths less than half of that.
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 160 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
solved = solve_within_memory(job, method)
check_answer(solved, method, job.pattern)
assert solved.output_blocks > 1
assert int(solved.kept) == 131072 * 64 // 2
assert 0 < float(solved.relative_error) < 0.2
"""


@pytest.mark.processes
def test_a_solve_that_really_runs_out_of_memory_is_done_by_blocks():
    # Memory that was freed goes back to the system at once, not into a heap for the next allocation.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
    call = [sys.executable, "-c", LIMITED]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    # By a signal, or by the system's library where a thread that begins only now has no memory for its own data.
    if done.returncode < 0 or "thread-local data: ABORT" in done.stderr:
        pytest.skip(f"SKIPPED: a limit on memory ends the process here ({done.returncode}): {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr


# Of a 7B model, and the experts of a mixture.
LLAMA = dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
EXPERTS = {f"{i}.{name}": (768, 2048) for i in range(16) for name in ("gate", "up")}
EXPERTS |= {f"{i}.down": (2048, 768) for i in range(16)}
ATTENTION = [["q", "k", "v", "o"]]


def batches(shapes, devices):
    """The names of what is solved side by side, batch by batch."""
    tasks = [
        LayerTask(name, shape, shape, lambda: LayerJob(None, None, None, TopK(1))) for name, shape in shapes.items()
    ]
    return [[task.name for task in batch] for batch in share_out(tasks, find_method("maiht"), devices, "gpu")]


# So many devices save a small linear no time that their sums do not cost.
@pytest.mark.parametrize(
    ("devices", "beside"),
    [(2, [["q", "k"], ["v", "o"], ["gate", "up"]]), (4, ATTENTION), (8, ATTENTION), (512, ATTENTION)],
)
def test_whole_batches_of_one_shape_are_solved_side_by_side(devices, beside):
    assert batches(LLAMA, devices) == beside


def test_experts_fill_the_devices():
    found = batches(EXPERTS, 8)
    assert [len(batch) for batch in found] == [8] * 6
    assert {name for batch in found for name in batch} == set(EXPERTS)


def mine(layer, pattern):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("layers", "shape", "method", "devices", "platform", "beside"),
    [
        # Other devices rest where sums cost more than they gain.
        (1, (64, 64), find_method("maiht", "paper"), 2, "cpu", True),
        (1, (4096, 4096), find_method("maiht", "paper"), 2, "cpu", False),
        # SparseGPT inverts on every device, and sums once.
        (1, (4096, 1024), find_method("sparsegpt"), 8, "gpu", False),
        # A method that is not known fills all devices or is cut.
        (4, (64, 64), mine, 4, "gpu", True),
        (3, (64, 64), mine, 4, "gpu", False),
    ],
)
def test_what_is_quicker_depends_on_sums_and_method(layers, shape, method, devices, platform, beside):
    assert quicker_side_by_side(layers, shape, method, devices, platform) == beside
