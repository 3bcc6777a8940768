"""The summary of a finished run: facts about the model and the run, and a table of the layers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from sparseopt.models.base.errors import listed
from sparseopt.pruning.base.records import LayerRecord, mean, mean_errors
from sparseopt.pruning.base.reports import PruneReport
from sparseopt.pruning.run.output_form import is_file
from sparseopt.pruning.text.documents import part_of_text
from sparseopt.pruning.text.mix import sources_of
from sparseopt.system.machine import format_bytes
from sparseopt.system.report import Fact, Table, cell

# How recipes describe calibrations that no command line can hold.
TOKEN_IDS = "token ids of shape"
# More rows make a page slow.
MOST_ROWS = 2000
# Fields of the records of single layers, with their headings.
COLUMNS = {
    "relative_error": "rel. error", "heldout_error": "held-out", "rounded_error": "by rounding",
    "sparsity": "sparsity", "bits": "bits", "shape": "shape", "steps": "steps", "seconds": "seconds",
    "status": "status",
}  # fmt: skip


def model_facts(report: PruneReport) -> Iterator[Fact]:
    """What was made, and how. It is the same for every run of the recipe on one machine, so a card shows it."""
    for score in report.scores:
        change = 100 * (score.after / score.before - 1) if score.before else math.nan
        text = f"{score.before:.2f} before, {score.after:.2f} after ({change:+.1f} %); "
        yield Fact(f"perplexity on {score.text}", f"{text}{score.windows} windows of {score.seqlen} tokens")
    layers, grids, size = report.layers, report.grids, sum(r.size for r in report.layers)
    if shape := report.shape:
        share = shape.parameters / shape.dense_parameters
        text = f"keeps {shape.kept()}; " if shape.kept() else ""
        text += f"{shape.parameters:,} of {shape.dense_parameters:,} parameters ({share:.1%})"
        yield Fact("size", f"{text}, {report.stored_bytes:,} of {shape.dense_bytes:,} bytes")
        if shape.rises:
            yield Fact("removing these blocks alone", f"loss {shape.rises[-1]:+.4f} nats a token")
    elif layers:
        text = f"{report.sparsity:.2%} of the {size:,} weights of {len(layers)} linear layers are zero"
        if (stays := report.prunable_size - size) > 0:
            text += (
                f", {report.total_sparsity:.2%} of the weights of all linear layers: {stays:,} were not to be pruned"
            )
        if others := report.other_weights:
            text += f"; {others:,} weights in other matrices of the blocks, such as stacked experts, stay as they are"
        yield Fact("sparsity", text)
    if report.vocabulary:
        yield Fact("vocabulary", str(report.vocabulary))
    if given := sum(r.given_zeros for r in layers):
        text = f"{given:,} weights had to be zero ({given / size:.1%})"
        if kept := report.kept_masks:
            text += f"; {len(kept)} of {len(layers)} layers already had the zeros asked for and keep their mask"
            if len(kept) == len(layers) and report.recipe["masks"] is None:
                # The model is its own target, which it meets.
                text += " and weights; to fit the weights again, give the dense model and --masks"
        yield Fact("given zeros", text)
    if report.calibration.windows:
        yield _calibration(report)
    if layers:
        error, heldout = mean_errors(layers)
        other = "" if heldout is None else f", {heldout:.5f} on held-out tokens"
        text = f"mean relative squared error of the layers' outputs: {error:.5f} on the calibration tokens{other}"
        yield Fact("layer errors", text)
    if grids:
        error, rounded = report.errors["mean_grid_error"], report.errors["mean_rounded_error"]
        zeros = sum(record.zeros for record in grids) / sum(record.size for record in grids)
        text = f"{len(grids)} linear layers in {', '.join(dict.fromkeys(record.bits for record in grids))}, with "
        text += f"{zeros:.2%} of the weights zero afterwards; what that adds to the relative squared error, mean: "
        text += f"{error:.5f}, by plain rounding {rounded:.5f}"
        if floats := report.in_floats:
            text += f"; the other {len(floats)} stay in floats: {listed(floats, 3)}"
        yield Fact("few bits", text)
    for each in report.repairs:
        text = f"block {each.block} fitted across {listed([*map(str, each.removed)], 8)}, relative error of the stream "
        text += f"{each.first_error:.5f} -> {each.last_error:.5f}"
        if each.heldout_first is not None:
            text += f", held-out {each.heldout_first:.5f} -> {each.heldout_last:.5f}"
        yield Fact("repair", text)
    if report.blocks:
        first, last = report.block_losses
        stopped = sum(b.status in ("DIVERGED", "NONFINITE") for b in report.blocks)
        text = f"{len(report.blocks)} blocks were trained, mean relative error {first:.5f} -> {last:.5f}"
        yield Fact("training", text + f"; {stopped} diverged and kept their best state" * (stopped > 0))
    if trained := report.distilled:
        text = f"from the dense model, divergence {trained.first_loss:.5f} -> {trained.last_loss:.5f}"
        if trained.heldout_first is not None:
            text = f"{text}, held-out {trained.heldout_first:.5f} -> {trained.heldout_best:.5f}"
        yield Fact("distillation", f"{text} nats a token")


def _calibration(report: PruneReport) -> Fact:
    given, split, seen = report.recipe["calibration"], report.recipe.get("split"), report.calibration
    read = part_of_text(given, "calibration", split)
    tokens = "" if read.startswith(TOKEN_IDS) else f"{seen.windows} windows of {seen.seqlen} tokens of "
    bos = "" if report.bos is None else f", each starting with the model's BOS (token {report.bos})"
    whole = all(part_of_text(text, "calibration", split) == text for text, _ in sources_of(given))
    rest = "" if whole else "; the rest is left to `sparseopt eval`"
    return Fact("calibration", f"{tokens}{read}{bos}{rest}")


def run_facts(report: PruneReport) -> Iterator[Fact]:
    """What the run cost, and what was unusual about it."""
    phases = {
        "survey of the dense model": report.survey_seconds,
        "solver": report.solver_seconds,
        "reconstruction": report.reconstruction_seconds,
        "distillation": report.distilled.seconds if report.distilled else 0.0,
        "forward passes": report.calibration_seconds,
    }
    parts = [f"{name} {seconds:.1f} s" for name, seconds in phases.items() if seconds]
    compiling = f"compiling {report.compile_seconds:.1f} s ({report.layer_compilations} layer programs)"
    yield Fact("time", f"{report.seconds:.1f} s in all: {', '.join([*parts, compiling])}")
    text, given = format_bytes(report.peak_memory_bytes), report.footprint
    asked, estimated = given.budget_bytes, given.memory_bytes
    if estimated is not None:
        text += f", estimated {format_bytes(estimated)}"
    if asked is not None:
        more = ": MORE than asked for" if report.peak_memory_bytes > asked else ""
        text += f", asked for {format_bytes(asked)}{more}"
    yield Fact("peak memory", text)
    if report.source.endswith(".gguf") and not is_file(report.output) and report.recipe["dtype"] == "bfloat16":
        text = "stored in bfloat16, which rounds the file's quantised weights; --dtype float32 keeps them exact"
        yield Fact("dtype", text)
    if report.devices > 1:
        several = f" of {report.processes} processes" if report.processes > 1 else ""
        yield Fact("devices", f"{report.devices} devices{several} ({report.platform}) shared the work")
    if report.resumed_blocks:
        text = f"{report.resumed_blocks} blocks were finished by an earlier run; the times include it"
        yield Fact("resumed", text)
    if report.route == "torch":
        text = "the model was loaded whole by transformers, since its family is not known here: all output errors have "
        yield Fact("torch", f"{text}the same weight, and nothing is trained")
    if dead := sum(r.dead_inputs for r in report.layers):
        text = f"{dead} inputs (one shared by several layers counts for each) were zero for all calibration tokens; "
        yield Fact("dead inputs", f"{text}their weights were pruned first")
    if blocked := report.blocked_layers:
        text = f"{len(blocked)} layers did not fit in memory whole and were solved in blocks of outputs, up to "
        yield Fact("split solves", f"{text}{max(blocked.values())}: {listed(list(blocked), 3)}")
    if starved := report.starved_experts:
        least = report.recipe["min_expert_tokens"]
        tokens = f"fewer than {least} calibration tokens" if least > 1 else "no calibration token"
        text = f"{len(starved)} experts saw {tokens} and were pruned by magnitude: {listed(starved, 3)}; "
        yield Fact("starved experts", f"{text}give more --windows, or --expert-tokens all")


def layer_table(report: PruneReport) -> Table:
    """Mean errors by kind of layer, and the totals; for a smaller model the fraction of inputs that stay."""
    smaller = report.shape is not None
    rows, groups = [], dict[str, list[LayerRecord]]()
    for record in report.layers:
        groups.setdefault(record.layer.rpartition(".")[2], []).append(record)
    for kind, records in (groups | {"all": report.layers}).items():
        error, heldout = mean_errors(records)
        zeros = sum(r.zeros for r in records) / sum(r.size for r in records)
        figures = [f"{1 - zeros if smaller else zeros:.4f}", f"{error:.5f}"]
        figures += ["-" if heldout is None else f"{heldout:.5f}", f"{mean(r.steps for r in records):.0f}"]
        shape = "" if kind == "all" else cell(tuple(records[0].shape))
        rows.append([kind, shape, *figures, f"{sum(r.seconds for r in records):.1f}"])
    title, share = ("Inputs kept", "kept") if smaller else ("Pruned layers", "sparsity")
    headings = ("layer", "shape", share, "rel. error", "held-out", "steps", "seconds")
    return Table(f"{title}, means over blocks", headings, rows, totals=1)


def linear_table(title: str, records: Sequence[Any]) -> Table:
    """A table of layer or grid records; if there are very many, only the largest errors."""
    if len(records) > MOST_ROWS:
        title = f"{title}, the {MOST_ROWS:,} of {len(records):,} with the largest errors"
        records = sorted(records, key=lambda r: r.relative_error, reverse=True)[:MOST_ROWS]
    names = [name for name in COLUMNS if any(getattr(r, name, None) is not None for r in records)]
    # The names without the path of their block.
    own = ((r.layer.split(f".{r.block}.", 1)[-1], r) for r in records)
    rows = [[linear, str(r.block), *(cell(getattr(r, name)) for name in names)] for linear, r in own]
    return Table(title, ["layer", "block", *(COLUMNS[name] for name in names)], rows)
