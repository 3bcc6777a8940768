"""Runs with eight virtual devices in a separate process and writes its results: `on_devices.py RESULT FOLDER`.

`test_devices` checks the results. Layers are tiny: nearly all of the time is compilation.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

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

# Name: method, preset, pattern, outputs, devices.
LAYERS = {
    "maiht paper": ("maiht", "paper", "unstructured", 48, 8),
    "maiht tuned, 37 over 8": ("maiht", "tuned", "unstructured", 37, 8),
    "admm per-row, 37 over 3": ("admm", None, "per-row", 37, 3),
    "sparsegpt": ("sparsegpt", None, "unstructured", 48, 8),
    "wanda 2:4, 37 over 8": ("wanda", None, "2:4", 37, 8),
    "osscar group:4, 37 over 8": ("osscar", None, "group:4", 37, 8),
    "magnitude block:4x4": ("magnitude", None, "block:4x4", 64, 8),
}
INPUTS = 32
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}


def facts(program):
    """Collectives as JSON has them: kind, bytes, depth of loops."""
    return [(one.kind, one.bytes, len(one.loops)) for one in collectives(program)]


def same(one, other):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return {"support": bool(np.all((one != 0) == (other != 0))), "apart": float(np.abs(one - other).max())}


def layers():
    found = {}
    for name, (method, preset, pattern, outputs, devices) in LAYERS.items():
        rng = np.random.default_rng(3)
        weight, gram, test_gram = make_layer(rng, outputs, INPUTS)
        weights = np.exp(rng.standard_normal(outputs)).astype(np.float32)
        support = rng.random(weight.shape) < 0.7 if method == "wanda" else None
        job = LayerJob(weight, gram, test_gram, parse_pattern(pattern, 0.5, weight.shape), weights, support=support)
        solver = find_method(method, preset)
        one = layer_solver(job, solver)
        many = solve_within_memory(job, solver, device_line(devices))
        scalars = ("relative_error", "test_error", "zeros", "kept", "steps", "status", "stray", "fits")
        found[name] = same(one.weight, many.weight) | {
            "bytes": outputs * INPUTS * 4,
            "one": [float(getattr(one, s)) for s in scalars],
            "many": [float(getattr(many, s)) for s in scalars],
            "program": facts(cut_solver.texts[-1]),
        }
    # A memory that takes half a layer at most, at a time.
    solved, whole_solve = [], split.solve_over

    def short(job, method, mesh):
        if len(job.weight) > 24:
            raise MemoryError("out of memory")
        solved.append(len(job.weight))
        return whole_solve(job, method, mesh)

    split.solve_over = short
    weight, gram, _ = make_layer(np.random.default_rng(3), 48, INPUTS)
    job = LayerJob(weight, gram, None, parse_pattern("unstructured", 0.5, weight.shape))
    many = solve_within_memory(job, find_method("wanda"), device_line(8))
    one = solve_within_memory(job, find_method("wanda"))
    split.solve_over = whole_solve
    found["by blocks"] = same(one.weight, many.weight) | {
        "solved": solved,
        "parts": many.output_blocks,
    }
    try:
        check_cut(parse_pattern("block:4x4", 0.5, (48, 32)), (48, 32), device_line(8))
    except ValueError as error:
        found["refused"] = str(error)
    return found


def blocks():
    """Seven linears of two kinds, by maiht on eight devices and on one; steps and counts differ."""
    rng, linears = np.random.default_rng(9), []
    for i, outputs in enumerate([37, 24, 37, 37, 24, 37, 37]):
        weight, gram, test_gram = make_layer(rng, outputs, INPUTS)
        weights = np.exp(rng.standard_normal(outputs)).astype(np.float32)
        pattern = parse_pattern("unstructured", 0.3 + 0.05 * i, weight.shape)
        job = LayerJob(weight, gram, test_gram, pattern, weights)
        linears.append(LayerTask(f"{i}", weight.shape, weight.shape, lambda job=job: job))
    solver, found = find_method("maiht", "tuned"), {}
    reports = [solved.report for solved in solve_block(linears, solver, None)]
    alone = {linear.name: report for linear, report in zip(linears, reports, strict=True)}

    def short(*arguments):
        raise MemoryError("out of memory")

    mesh = device_line(8)
    for name, some in (("side by side", linears), ("no memory", [linears[1], linears[4]])):
        if name == "no memory":
            side_by_side.side_by_side_solver = lambda mesh: short
        cut = len(cut_solver.texts)
        solved = list(zip(some, solve_block(some, solver, mesh), strict=True))
        found[name] = {
            "order": [linear.name for linear, _ in solved],
            "same": [same(alone[linear.name].weight, one.report.weight) for linear, one in solved],
            "steps": [[int(alone[linear.name].steps), int(one.report.steps)] for linear, one in solved],
            "errors": [[float(r.test_error) for r in (alone[linear.name], one.report)] for linear, one in solved],
            "programs": [facts(text) for text in side_by_side_solver(mesh).texts],
            "cut": len(cut_solver.texts) - cut,
            "seconds": min(one.seconds for _, one in solved),
        }
    side_by_side.side_by_side_solver = side_by_side_solver
    return found


def ties():
    """Whether selections with ties at the limit are those of one device, cut along either axis."""
    score = np.round(np.abs(np.random.default_rng(5).standard_normal((24, 40))) * 4).astype(np.float32) / 4
    select = jax.jit(lambda x, k: (top_k_mask(x, k), kth_largest(x, k)))
    right = {}
    for k in (1, 333, 700):
        order = np.argsort(-score, axis=None, kind="stable")[:k]
        mask = np.zeros(score.size, bool)
        mask[order] = True
        for axis in (0, 1):
            chosen, level = select(put(score, over(device_line(8), axis)), k)
            right[f"{k} along {axis}"] = bool(
                (whole(chosen) == mask.reshape(score.shape)).all() and float(level) == np.sort(score, axis=None)[-k]
            )
    return right


def loops():
    """The collectives inside the loop of each solver that methods use, on a layer of 256 outputs and 64 inputs."""
    mesh = device_line(8)
    hessian = put(np.eye(64, dtype=np.float32), over(mesh, None))
    center = put(np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32), over(mesh, 1))
    cases = {
        "maiht on_increase": (Maiht(0.9, 0.5, "on_increase", "support"), L0(0.1)),
        "maiht always": (Maiht(0.9, 0.5, "always", "support"), L0(0.1)),
        "maiht 2:4": (Maiht(0.9, None, "on_increase", "support"), NM(2, 4)),
        "maiht per-row": (Maiht(0.9, None, "on_increase", "support"), RowTopK(32)),
        "admm": (QuadraticAdmm(0.1, watch=False), TopK(8192)),
        "refit": (Refit(), Support(put(np.arange(64)[:, None] % 4 < np.full(256, 2), over(mesh, 1)))),
    }

    def run(hessian, center, solver, penalty):
        return solve(Problem(Quadratic(hessian, center), penalty), solver, center, tol=5e-4, max_steps=80).value

    return {
        name: [fact for fact in facts(jax.jit(run).lower(hessian, center, *case).compile().as_text()) if fact[2]]
        for name, case in cases.items()
    }


def calibration(folder):
    """Grams and streams of eleven windows over eight devices beside those of one, of plain blocks and of experts."""
    found, mesh = {}, device_line(8)
    tokens = np.random.default_rng(4).integers(0, len(VOCAB), (11, 24)).astype(np.int32)
    for name, changes in (("plain", {}), ("experts", EXPERTS)):
        config = tiny_config(**changes)
        model = open_model(write_folder(folder / name, config, random_tensors(config, np.random.default_rng(7))))
        block, embedding, runner = model.block(0), model.embedding(), BlockRunner()
        one, many = (kind.embed(embedding, tokens) for kind in (Batches(), SpreadBatches(mesh)))
        before = len(grams_over(mesh, "residual", "routed").texts), len(sum_over(mesh).texts)
        drift = (runner.forward(block, one), runner.forward(block, many))
        grams = [runner.grams(block, s, "residual", d).stacked for s, d in zip((one, many), drift, strict=True)]
        apart = {}
        for tap, right in grams[0].items():
            for part, a, b in zip(right._fields, right, grams[1][tap], strict=True):
                if a is not None:
                    largest = max(float(jnp.abs(a).max()), 1e-6)
                    apart[f"{tap} {part}"] = float(np.abs(np.asarray(a) - whole(b)).max()) / largest
        behind = [np.concatenate([np.asarray(x) for x in s.on_one_device()]) for s in drift]
        found[name] = {
            "grams": apart,
            "stream": float(np.abs(behind[0] - behind[1]).max()),
            "windows": [len(behind[0]), len(behind[1]), len(many), len(many[0])],
            "adding": [
                fact for text in grams_over(mesh, "residual", "routed").texts[before[0] :] for fact in facts(text)
            ],
            "summing": [fact for text in sum_over(mesh).texts[before[1] :] for fact in facts(text)],
            "widths": [g.gram.shape[-1] for g in grams[0].values() if g.drift is not None],
        }
    return found


def model_of(folder):
    """Every tensor of a pruned folder."""
    source = open_model(folder).source
    return {key: np.asarray(source.read(key), np.float64) for key in source.tensors}


def models(folder):
    """Whole runs on eight devices beside those on one; one of them is stopped and gone on with on three."""
    tokens = np.random.default_rng(8).integers(0, len(VOCAB), (13, 24)).astype(np.int32)
    # All linears of one shape: one program for all of them.
    config = tiny_config(num_hidden_layers=2, intermediate_size=32, num_key_value_heads=4)
    source = write_folder(folder / "square", config, random_tensors(config, np.random.default_rng(7)))
    found = {}
    experts = tiny_config(num_hidden_layers=1, **EXPERTS)
    routed = write_folder(folder / "routed", experts, random_tensors(experts, np.random.default_rng(7)))
    cases = {
        "paper": (source, {"preset": "paper", "weighting": "residual"}),
        "wanda curves": (
            source,
            {"method": "wanda", "allocation": "curves", "propagate": 0.5, "train_epochs": 1, "variants": 1},
        ),
        # Some experts see fewer tokens than that.
        "experts": (routed, {"method": "wanda", "min_expert_tokens": 130}),
    }
    stage, recipes, alone = side_by_side.STAGE, {}, {}
    for name, (model, settings) in cases.items():
        # Were sums for nothing, layers would be cut: the seven linears of a block have eight devices.
        side_by_side.STAGE = {"cpu": 0.0} if name == "paper" else stage
        programs = len(cut_solver.texts), len(side_by_side_solver(device_line("all")).texts)
        recipes[name] = recipe = Recipe(calibration=tokens, heldout_windows=2, **settings)
        one = prune_model(model, folder / f"{name} one", recipe)
        many = prune_model(model, folder / f"{name} many", recipe, devices="all")
        tensors = [model_of(report.output) for report in (one, many)]
        alone[name] = tensors[0]
        summary = json.loads((many.output / "summary.json").read_text())
        found[name] = {
            "support": all(bool(np.all((tensors[0][k] != 0) == (tensors[1][k] != 0))) for k in tensors[0]),
            "apart": max(float(np.abs(tensors[0][k] - tensors[1][k]).max()) for k in tensors[0]),
            "steps": [[r.steps for r in report.layers] for report in (one, many)],
            "starved": [[r.starved for r in report.layers] for report in (one, many)],
            "tokens": [one.layers[0].tokens, many.layers[0].tokens],
            "errors": [[r.relative_error for r in report.layers] for report in (one, many)],
            "programs": [
                len(cut_solver.texts) - programs[0],
                len(side_by_side_solver(device_line("all")).texts) - programs[1],
            ],
            "summary": {k: summary[k] for k in ("devices", "processes", "platform", "precision")},
        }
    recipe, wanted = recipes["wanda curves"], alone["wanda curves"]
    try:
        prune_model(source, folder / "stopped", recipe, devices=8, stop=lambda: True)
    except Stopped:
        report = prune_model(source, folder / "stopped", recipe, devices=3)
    tensors = model_of(report.output)
    found["gone on with"] = {
        "blocks": report.resumed_blocks,
        "apart": max(float(np.abs(wanted[k] - tensors[k]).max()) for k in wanted),
    }
    try:
        prune_model(source, folder / "refused", recipe, devices=8, memory="8GiB")
    except ValueError as error:
        found["refused"] = str(error)
    return found


if __name__ == "__main__":
    jnp.zeros(()).block_until_ready()
    result, folder = Path(sys.argv[1]), Path(sys.argv[2])
    found = {
        "layers": layers(),
        "blocks": blocks(),
        "ties": ties(),
        "loops": loops(),
        "calibration": calibration(folder),
    }
    found["models"] = models(folder)
    result.write_text(json.dumps(found))
