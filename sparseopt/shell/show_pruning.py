"""What a finished run that prunes or shrinks shows: a table of its layers, its facts, and its page."""

from pathlib import Path

from sparseopt.pruning.base.reports import PruneReport
from sparseopt.pruning.run.card import run_page
from sparseopt.pruning.run.facts import layer_table, model_facts, run_facts
from sparseopt.pruning.run.output_form import run_folder_of
from sparseopt.shell.console import comparison_table, console, say, write_page
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
