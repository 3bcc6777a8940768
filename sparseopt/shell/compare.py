"""Floor 8: the command `compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt.shell.experiments import AllowAll, AllowPackages, permitted
from sparseopt.shell.options import TEXT_HELP, Source, takes_recipe

EVALUATION = "Evaluation"


@takes_recipe(
    without=["method", "preset"],
    lists={"sparsity": "Several with commas between: 0.5,0.6.", "pattern": "Several with commas between."},
)
def compare(
    source: Source,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the table, the picture and the cells; new, or of this comparison.",
            rich_help_panel="Output",
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Methods as in `sparseopt prune`, with commas between; a preset follows a colon.",
            rich_help_panel="How to prune",
        ),
    ] = "best,maiht,wanda",
    text: Annotated[str, typer.Option(help=TEXT_HELP, rich_help_panel=EVALUATION)] = "pydoc",
    eval_windows: Annotated[
        int, typer.Option(help="Windows from the start of the evaluation text.", rich_help_panel=EVALUATION)
    ] = 8,
    eval_seqlen: Annotated[int, typer.Option(help="Tokens an evaluation window.", rich_help_panel=EVALUATION)] = 1024,
    allow_code: AllowAll = False,
    allow_package: AllowPackages = None,
    **options: Any,
) -> None:
    """Prune by several methods at several sparsities, and compare perplexity, errors, time and memory.

    Writes one table and one picture. Started again, it does what is missing; new methods and sparsities join the table.
    """
    from sparseopt.experiments import comparison
    from sparseopt.experiments.task_prune import Prune
    from sparseopt.shell import show_experiments as shown
    from sparseopt.shell.console import console, errors, say

    allowed = permitted(allow_code, allow_package, Path.cwd())
    names, shares, patterns = comparison.read_lists(methods, options.pop("sparsity") or "0.5", options.pop("pattern"))
    runs = comparison.build(
        source,
        names,
        shares,
        patterns,
        allow_code=allowed,
        evaluation=text,
        evaluation_windows=eval_windows,
        evaluation_seqlen=eval_seqlen,
        **options,
    )
    planned = comparison.prepare(runs, output)
    say(shown.plan_line(planned))
    try:
        with shown.SweepProgress(len(planned)) as progress:
            outcomes = comparison.measure(planned, output, progress.observer, progress.ended)
    except KeyboardInterrupt:
        errors.print("\nstopped; the same command goes on with the cells that are missing")
        raise typer.Exit(130) from None
    dense = runs[0].task
    assert isinstance(dense, Prune)
    section = comparison.tabulate(planned, outcomes, output, allowed)
    written = comparison.write(section, dense, output)
    for line in comparison.head(section, dense):
        say(line)
    for table in shown.section_tables(section, console.width):
        console.print(table)
    for file in written:
        say(f"wrote {file}")
    if not any(file.suffix == ".png" for file in written):
        say("no picture: it needs a pruned cell that is finished, and matplotlib (pip install 'sparseopt[plot]')")
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(outcomes)} cells failed, with their reasons in the table; the others are finished. "
            "The same command tries the failed ones again"
        )
