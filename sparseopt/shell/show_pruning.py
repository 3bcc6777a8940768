"""What a finished run that prunes or shrinks shows: a table and its figures."""

from rich.table import Table

from sparseopt.models.base.errors import listed
from sparseopt.pruning.base.reports import (
    LayerRecord,
    PruneReport,
    ShapeRecord,
    mean,
    mean_errors,
)
from sparseopt.pruning.text.documents import part_of_text
from sparseopt.shell.console import comparison_table, console, packed_line, say
from sparseopt.system.machine import format_bytes


def memory_line(report: PruneReport) -> str:
    """The peak memory of a run beside its estimate."""
    line = f"peak memory {format_bytes(report.peak_memory_bytes)}"
    asked, estimated = report.footprint.budget_bytes, report.footprint.memory_bytes
    if estimated is not None:
        line += f", estimated {format_bytes(estimated)}"
    if asked is not None:
        line += f", asked for {format_bytes(asked)}"
        if report.peak_memory_bytes > asked:
            line += ": MORE than asked for"
    return line


def show_report(report: PruneReport) -> None:
    """Print the table and the figures of a finished run."""
    if report.layers:
        console.print(prune_table(report))
    for line in run_lines(report):
        say(line)
    say(f"finished before, in {report.output}" if report.kept else f"wrote {report.output}")


def prune_table(report: PruneReport) -> Table:
    """Mean errors by kind of linear, and the totals; of a smaller model the fraction of inputs that stay."""
    smaller = report.shape is not None
    rows, groups = [], dict[str, list[LayerRecord]]()
    for record in report.layers:
        groups.setdefault(record.layer.rpartition(".")[2], []).append(record)
    for kind, records in (groups | {"all": report.layers}).items():
        shape = "" if kind == "all" else f"{records[0].shape[0]}x{records[0].shape[1]}"
        error, heldout = mean_errors(records)
        zeros = sum(r.zeros for r in records) / sum(r.size for r in records)
        rows.append(
            (
                kind,
                shape,
                f"{1 - zeros if smaller else zeros:.4f}",
                f"{error:.5f}",
                "-" if heldout is None else f"{heldout:.5f}",
                f"{mean(r.steps for r in records):.0f}",
                f"{sum(r.seconds for r in records):.1f}",
            )
        )
    title, share = ("Inputs kept", "kept") if smaller else ("Pruned layers", "sparsity")
    headings = ("layer", "shape", share, "rel. error", "held-out", "steps", "seconds")
    table = comparison_table(f"{title}, means over blocks", headings, rows)
    table.rows[-2].end_section = True
    return table


def shape_lines(report: PruneReport, shape: ShapeRecord) -> list[str]:
    """The size of a smaller model beside the dense one's, and what the removal of blocks costs."""
    lines = [
        f"keeps {shape.kept()}",
        f"{shape.parameters:,} of {shape.dense_parameters:,} parameters "
        f"({shape.parameters / shape.dense_parameters:.1%}), {report.stored_bytes:,} of {shape.dense_bytes:,} bytes",
    ]
    if shape.rises:
        lines.append(f"removing these blocks alone: loss {shape.rises[-1]:+.4f} nats a token")
    return lines


def run_lines(report: PruneReport) -> list[str]:
    """The figures of a run that are not a layer's."""
    dead = sum(r.dead_inputs for r in report.layers)
    lines = [
        *(score.line for score in report.scores),
        f"solver {report.solver_seconds:.1f} s, compiling {report.compile_seconds:.1f} s "
        f"({report.layer_compilations} layer programs), forward passes {report.calibration_seconds:.1f} s, "
        f"{report.seconds:.1f} s in all",
        memory_line(report),
    ]
    if report.source.endswith(".gguf") and report.recipe["dtype"] == "bfloat16":
        lines.append("stored in bfloat16, which rounds the file's quantised weights; --dtype float32 keeps them exact")
    if report.shape is not None:
        lines = [*shape_lines(report, report.shape), *lines]
    elif (stays := report.prunable_size - sum(r.size for r in report.layers)) > 0:
        lines.append(
            f"zeros in {report.sparsity:.4f} of the weights of the pruned linears, in {report.total_sparsity:.4f} of "
            f"those of all linears: {stays:,} weights were not to be pruned"
        )
    calibration, split = str(report.recipe["calibration"]), report.recipe["split"]
    if report.bos is not None:
        lines.append(f"every calibration window started with the model's BOS (token {report.bos})")
    if (read := part_of_text(calibration, "calibration", split)) != calibration:
        lines.append(f"calibrated on {read}; the rest is left to `sparseopt eval`")
    if report.devices > 1:
        several = f" of {report.processes} processes" if report.processes > 1 else ""
        lines.append(f"{report.devices} devices{several} ({report.platform}) shared the work")
    if report.resumed_blocks:
        lines.append(f"{report.resumed_blocks} blocks were finished by an earlier run; the times include it")
    if report.route == "torch":
        lines.append(
            "blocks ran in torch, since the model's family is not known here: all output errors have the same weight, "
            "and blocks are not trained"
        )
    if report.blocks:
        first, last = report.block_losses
        stopped = sum(b.status in ("DIVERGED", "NONFINITE") for b in report.blocks)
        lines.append(
            f"reconstruction {report.reconstruction_seconds:.1f} s, mean block error {first:.5f} -> {last:.5f}"
            + (f"; {stopped} blocks diverged and kept their best state" if stopped else "")
        )
    if trained := report.distilled:
        line = f"distillation {trained.seconds:.1f} s, divergence {trained.first_loss:.5f} -> {trained.last_loss:.5f}"
        if trained.heldout_first is not None:
            line = f"{line}, held-out {trained.heldout_first:.5f} -> {trained.heldout_best:.5f}"
        lines.append(f"{line} nats a token")
    if report.survey_seconds:
        lines.append(f"survey of the dense model {report.survey_seconds:.1f} s")
    if dead:
        lines.append(
            f"{dead} inputs (one shared by several linears counts for each) were zero for all calibration tokens; "
            "their weights were pruned first"
        )
    if given := sum(r.given_zeros for r in report.layers):
        line = f"{given:,} weights had to be zero ({given / sum(r.size for r in report.layers):.1%})"
        if kept := report.kept_masks:
            line += f"; {len(kept)} of {len(report.layers)} linears had as many zeros as asked for and keep their mask"
            if len(kept) == len(report.layers) and report.recipe["masks"] is None:
                # The model is its own target, which it meets.
                line += " and weights; to fit the weights again, give the dense model and --masks"
        lines.append(line)
    if blocked := report.blocked_layers:
        lines.append(
            f"{len(blocked)} layers did not fit in memory whole and were solved in blocks of outputs, up to "
            f"{max(blocked.values())}: {listed(list(blocked), 3)}"
        )
    if starved := report.starved_experts:
        least = report.recipe["min_expert_tokens"]
        tokens = f"fewer than {least} calibration tokens" if least > 1 else "no calibration token"
        lines.append(
            f"{len(starved)} experts saw {tokens} and were pruned by magnitude: "
            f"{listed(starved, 3)}; give more --windows, or --expert-tokens all"
        )
    if report.recipe.get("pack"):
        lines.append(packed_line(report.dense_bytes, report.stored_bytes))
    return lines
