"""Parts of `bench_models.py`: errors of single layers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from common import Recorder, say
from pruned import SETTINGS, about, judged

from sparseopt.models import open_model
from sparseopt.pruning import prune_layer
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.text.windows import begin_windows, text_windows

# A preset follows the name. The most thorough method is last, since its target depends on the others.
THOROUGH = "admm_splice"
METHODS = ("magnitude", "wanda", "sparsegpt", "splice", "admm", "maiht paper", "maiht tuned", "best", THOROUGH)
LAYER_SETTINGS = ("0.5", "0.7", "2:4")
BLOCKS = (0, 9, 20)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
LAYER_WINDOWS, SEQLEN = 24, 512
MEAN_TARGET = 0.00265
# Of ALPS (Meng et al., 2024), on the same layers and tokens.
ALPS_ERRORS = {
    "0.mlp.down_proj": 0.00900, "0.mlp.gate_proj": 0.03733, "0.self_attn.o_proj": 0.00012,
    "0.self_attn.q_proj": 0.00052, "20.mlp.down_proj": 0.04313, "20.mlp.gate_proj": 0.01982,
    "20.self_attn.o_proj": 0.01831, "20.self_attn.q_proj": 0.01076, "9.mlp.down_proj": 0.03385,
}  # fmt: skip
# Relative errors of mAIHT's published procedure at 50 % on these layers, and how much of them each preset may have.
PAPER_ERRORS = {"0.mlp.gate_proj": 0.01733, "9.self_attn.o_proj": 0.02159, "20.mlp.down_proj": 0.01828}
PAPER_TARGETS = {"paper": 1.02, "tuned": 0.80}

# Of layers put on a grid: method, setting and bits, and the most that the error may be of that without the grid; of
# dense layers, of that of plain rounding.
ON_GRIDS = {
    ("admm_splice", "0.5", "q4_0"): 1.33, ("best", "0.5", "q4_0"): 1.33, ("best", "2:4", "q4_0"): 1.33,
    ("admm_splice", "0.5", "q8_0"): 1.004, ("best", "0.5", "q8_0"): 1.004, ("best", "0.5", "q5_0"): None,
    ("best", "0.5", "int8"): None, ("best", "0.5", "int4:64"): None, ("wanda", "0", "q4_0"): 0.33,
}  # fmt: skip


# Patterns along the inputs, with their share of zeros.
ALONG = {"6:8": 0.25, "2:4": 0.5, "4:8": 0.5, "8:16": 0.5, "1:4": 0.75}


class Layer(NamedTuple):
    """A linear of the dense model, `[out, in]`, and the Gram matrices of its inputs, `[in, in]`, all float32."""

    name: str
    weight: np.ndarray
    gram: np.ndarray
    heldout: np.ndarray


def dense_layers(source: Path, data: str, windows: int | None) -> Iterator[Layer]:
    """The layers, with Gram matrices of the first calibration windows and, held out, of as many further windows."""
    model, count = open_model(source), windows or LAYER_WINDOWS
    ids = begin_windows(*text_windows(model.source, data, "calibration", 2 * count, SEQLEN))
    parts = [make_batches(model.embedding()(jnp.asarray(part))) for part in (ids[:count], ids[count:])]
    runner = BlockRunner()
    for index in range(min(BLOCKS[-1] + 1, model.num_blocks)):
        block = model.block(index)
        if index in BLOCKS:
            grams, tests = (runner.grams(block, part) for part in parts)
            for name in LINEARS:
                pair = (np.asarray(found[block.linears[name]].gram) for found in (grams, tests))
                yield Layer(f"{index}.{name}", np.asarray(block.read(f"{name}.weight")), *pair)
        parts = [runner.forward(block, part) for part in parts]


def relative_error(pruned: np.ndarray, weight: np.ndarray, gram: np.ndarray) -> float:
    """`||X (V - W)ᵀ||² / ||X Wᵀ||²` in float64, without ridge."""
    dense, gram = weight.astype(np.float64), gram.astype(np.float64)
    lost, present = (float(np.sum((v @ gram) * v)) for v in (pruned.astype(np.float64) - dense, dense))
    return lost / present


def pruned_layer(layer: Layer, method: str, setting: str) -> dict[str, Any]:
    """The errors, steps and seconds of a method, without compilation; a preset follows its name."""
    name, _, preset = method.partition(" ")
    found = prune_layer(layer.weight, layer.gram, **SETTINGS[setting], method=name, preset=preset or None)
    return {
        "value": relative_error(found.weight, layer.weight, layer.gram), "unit": "relative error",
        "heldout_error": relative_error(found.weight, layer.weight, layer.heldout),
        "seconds": found.seconds, "steps": found.steps, "status": found.status.name, "sparsity": found.sparsity,
    }  # fmt: skip


def target_of(method: str, setting: str, layer: str, errors: Mapping[str, float]) -> dict[str, Any]:
    """The target of a method in a layer, and whether it was met; `errors` by method."""
    error, preset = errors[method], method.removeprefix("maiht ")
    if setting == "0.5" and preset in PAPER_TARGETS and layer in PAPER_ERRORS:
        factor, known = PAPER_TARGETS[preset], PAPER_ERRORS[layer]
        return {"ratio": error / known, "target": f"at most {factor} x {known}", "met": error <= factor * known}
    if method == THOROUGH and setting == "2:4" and errors.keys() >= {"sparsegpt", "admm"}:
        rivals = {rival: errors[rival] for rival in ("sparsegpt", "admm")}
        shown = " and ".join(f"{rival}, {error:.3g}" for rival, error in rivals.items())
        return {"target": f"below {shown}", "met": error < min(rivals.values())}
    if method == THOROUGH and setting == "0.7" and layer in ALPS_ERRORS:
        return {"target": f"at most ALPS, {ALPS_ERRORS[layer]:.5f}", "met": error <= ALPS_ERRORS[layer]}
    return judged(error, None)


def layers(recorder: Recorder, source: Path, data: str, windows: int | None) -> None:
    shared = about(source, windows is not None)
    found = list(dense_layers(source, data, windows))
    for setting in LAYER_SETTINGS:
        errors: dict[str, dict[str, float]] = {layer.name: {} for layer in found}
        for method in METHODS:
            say(f"layers: {method} at {setting}")
            rows = []
            for layer in found:
                figure = f"layer error, {method}, {layer.name} at {setting}"
                known = recorder.found(figure=figure, **shared)
                row = known or pruned_layer(layer, method, setting)
                errors[layer.name][method] = row["value"]
                if known is None:
                    goal = target_of(method, setting, layer.name, errors[layer.name])
                    recorder.emit(figure, **row, **goal, **shared)
                rows.append(row)
            mean, heldout = (geometric_mean([row[key] for row in rows]) for key in ("value", "heldout_error"))
            bound = MEAN_TARGET if method == THOROUGH and setting == "0.5" else None
            figure = f"layer error, geometric mean, {method}, {len(rows)} layers at {setting}"
            if recorder.found(figure=figure, **shared) is None:
                recorder.emit(
                    figure, value=mean, unit="relative error", heldout_error=heldout,
                    solver_seconds=sum(row["seconds"] for row in rows), **judged(mean, bound), **shared,
                )  # fmt: skip


def grids(recorder: Recorder, source: Path, data: str, windows: int | None) -> None:
    shared, found = about(source, windows is not None), list(dense_layers(source, data, windows))
    for (method, setting, bits), bound in ON_GRIDS.items():
        figure = f"error on a grid, {method} at {setting}, {bits}"
        if recorder.found(figure=figure, **shared):
            continue
        say(figure)
        sizes = {"sparsity": 0.0} if setting == "0" else SETTINGS[setting]
        given = [{"weight": layer.weight, "gram": layer.gram, "method": method, **sizes} for layer in found]
        alone, rounded = ([prune_layer(**each, bits=form) for each in given] for form in (None, bits))
        before = [each.pruned_error if setting != "0" else each.rounded_error for each in rounded]
        pairs = zip(rounded, found, strict=True)
        errors = [relative_error(each.weight, layer.weight, layer.gram) for each, layer in pairs]
        ratios = [error / known for error, known in zip(errors, before, strict=True)]
        plain = [each.rounded_error / known for each, known in zip(rounded, before, strict=True)]
        seconds = [sum(each.seconds for each in some) for some in (alone, rounded)]
        value = geometric_mean(ratios)
        recorder.emit(
            figure, value=value, unit="times the error before", error=geometric_mean(errors),
            plain_rounding=geometric_mean(plain), of_sums=sum(errors) / sum(before), method_seconds=seconds[0],
            grid_seconds=seconds[1] - seconds[0], **judged(value, bound), **shared,
        )  # fmt: skip


def patterns(recorder: Recorder, source: Path, data: str, windows: int | None) -> None:
    shared, found = about(source, windows is not None), list(dense_layers(source, data, windows))
    for method in ("wanda", "maiht", "best"):
        for pattern, share in ALONG.items():
            figure = f"layer error, along the inputs, {method}, {pattern}"
            if recorder.found(figure=figure, **shared):
                continue
            say(figure)
            errors = {}
            for name in (pattern, "unstructured"):
                given = [prune_layer(each.weight, each.gram, share, name, method).weight for each in found]
                pairs = list(zip(given, found, strict=True))
                for tokens in ("gram", "heldout"):
                    each = [relative_error(v, layer.weight, getattr(layer, tokens)) for v, layer in pairs]
                    errors[name, tokens] = geometric_mean(each)
            recorder.emit(
                figure, value=errors[pattern, "gram"], unit="relative error", zeros=share,
                heldout_error=errors[pattern, "heldout"], anywhere=errors["unstructured", "gram"],
                anywhere_heldout=errors["unstructured", "heldout"], **judged(0, None), **shared,
            )  # fmt: skip


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))
