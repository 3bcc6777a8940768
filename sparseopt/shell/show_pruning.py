"""What a finished run that prunes or shrinks shows: a table of its linears, and its facts."""

from sparseopt.pruning.base.reports import PruneReport
from sparseopt.pruning.run.facts import layer_table, model_facts, run_facts
from sparseopt.shell.console import comparison_table, console, packed_line, say


def show_report(report: PruneReport) -> None:
    """Print the table and the facts of a finished run."""
    if report.layers:
        found = layer_table(report)
        table = comparison_table(found.title, found.headings, found.rows)
        table.rows[-2].end_section = True
        console.print(table)
    for fact in (*model_facts(report), *run_facts(report)):
        say(str(fact))
    if report.recipe.get("pack"):
        say(packed_line(report.dense_bytes, report.stored_bytes))
    say(f"finished before, in {report.output}" if report.kept else f"wrote {report.output}")
