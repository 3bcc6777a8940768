"""What a run that prunes or shrinks shows before work, of a dry run, and when it is finished."""

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from sparseopt.pruning.base.reports import PruneReport
from sparseopt.pruning.dry_run import DryRun
from sparseopt.pruning.run.card import run_page
from sparseopt.pruning.run.facts import layer_table, model_facts, run_facts
from sparseopt.pruning.run.output_form import run_folder_of
from sparseopt.shell.console import comparison_table, console, duration, say, write_page
from sparseopt.shell.prune_progress import calibration_lines, footprint_lines
from sparseopt.system.processes import is_first
from sparseopt.system.run_folder import PAGE, SUMMARY, read_json


def show_report(report: PruneReport) -> Path:
    """Print the table and the facts of a finished run, and write its page unless an earlier command did; the page."""
    if report.layers:
        found = layer_table(report)
        table = comparison_table(found.title, found.headings, found.rows)
        table.rows[-2].end_section = True
        console.print(table)
    for fact in (*model_facts(report), *run_facts(report)):
        say(str(fact))
    say(f"finished before, in {report.output}" if report.kept else f"wrote {report.output}")
    folder = run_folder_of(report.output)
    page = folder / PAGE
    if is_first() and not (report.kept and page.is_file()):
        write_page(page, lambda command: run_page(report, command, read_json(folder / SUMMARY)))
    return page


def show_dry_run(found: DryRun, as_json: bool) -> None:
    """Print what a run would make and need."""
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    revision = f", commit {found.revision}" if found.revision else ""
    say(f"{found.source}{revision}: {found.parameters:,} parameters, {found.weights:,} in linear layers of the blocks")
    rows = [("layer", "blocks", "shape", "becomes", "count", "zeros", "bits")]
    for kind in found.layers:
        shape, becomes = (f"{outputs}x{inputs}" for outputs, inputs in (kind.shape, kind.becomes))
        zeros = "" if kind.zeros is None else f"{kind.zeros:.4f}"
        cells = (kind.name, ranges(kind.blocks), shape, becomes * (becomes != shape))
        rows.append((*cells, f"{kind.count:,}", zeros, kind.bits or ""))
    # Without the columns that say nothing.
    headings, *shown = zip(*(column for column in zip(*rows, strict=True) if any(column[1:])), strict=True)
    console.print(comparison_table("Linear layers", headings, shown))
    seen = calibration_lines(found.calibration) if found.calibration.windows else []
    for line in (*_made(found), *seen, *footprint_lines(found.footprint)):
        say(line)
    if found.seconds is not None:
        drawn = "" if found.calibration.digest else "; drawing its text, once for a model, comes on top"
        say(f"time of the run, measured on the first blocks: {duration(found.seconds)}{drawn}")
    say(f"nothing was written to {found.output}: the same command without --dry-run starts the run")


def _made(found: DryRun) -> list[str]:
    """What becomes of the weights."""
    lines, stay = [], found.kept_parameters
    if found.zeros:
        share, whole = found.zeros / found.weights, found.zeros / found.parameters
        lines.append(f"{found.zeros:,} zeros, {share:.2%} of the linear layers, {whole:.2%} of all parameters")
    if found.recipe.get("allocation") == "curves":
        lines.append("allocation curves: measured losses distribute these zeros over the layers, some may stay dense")
    if stay is None:
        lines.append(f"measured losses choose what stays: {found.recipe['parameters']:.2%} of the parameters")
    elif stay < found.parameters:
        lines.append(f"{stay:,} parameters stay ({stay / found.parameters:.1%})")
    if found.vocabulary is not None:
        lines.append(str(found.vocabulary))
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs joined: `0, 2-4, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
