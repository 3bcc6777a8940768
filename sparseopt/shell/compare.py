"""Floor 8: the command `compare`."""

from pathlib import Path
from typing import Annotated

import typer

from sparseopt.shell.experiments import AllowAll, AllowPackages, permitted
from sparseopt.shell.prune import BOS_HELP, SOURCE_HELP, TEXT_HELP


def compare(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    output: Annotated[
        Path, typer.Option(help="Folder for the table, the picture and the cells; new, or of this comparison.")
    ],
    methods: Annotated[
        str,
        typer.Option(help="With commas between: best, maiht, maiht:paper, admm, splice, sparsegpt, wanda, magnitude."),
    ] = "best,maiht,wanda",
    sparsity: Annotated[
        str, typer.Option(help="Shares of zeros in [0, 1), with commas between; an n:m pattern has its own.")
    ] = "0.5",
    pattern: Annotated[
        str, typer.Option(help="Patterns as in `sparseopt prune`, with commas between: unstructured,2:4.")
    ] = "unstructured",
    calibration: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    bos: Annotated[str, typer.Option(help=BOS_HELP)] = "auto",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens a calibration window.")] = 512,
    heldout_samples: Annotated[int, typer.Option(help="Windows for the held-out error; 0 for none.")] = 4,
    text: Annotated[str, typer.Option(help=f"For the perplexity: {TEXT_HELP}")] = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows from the start of the evaluation text.")] = 8,
    eval_seqlen: Annotated[int, typer.Option(help="Tokens an evaluation window.")] = 1024,
    seed: Annotated[int, typer.Option(help="0: calibration windows from the text's start; else at random.")] = 0,
    ridge: Annotated[
        float | None, typer.Option(help="As in `sparseopt prune`, for the methods that have one; default: theirs.")
    ] = None,
    weighting: Annotated[
        str, typer.Option(help="Tokens in the Grams: uniform, or residual by the residual stream's size.")
    ] = "uniform",
    allow_code: AllowAll = False,
    allow_package: AllowPackages = None,
) -> None:
    """Prune by several methods at several sparsities, and compare perplexity, errors, time and memory.

    Writes one table and one picture. Started again, it does what is missing; new methods and sparsities join the table.
    """
    from sparseopt.experiments import comparison
    from sparseopt.experiments.task_prune import Prune
    from sparseopt.shell import show_experiments as shown
    from sparseopt.shell.console import console, errors, say

    allowed = permitted(allow_code, allow_package, Path.cwd())
    names, shares, patterns = comparison.read_lists(methods, sparsity, pattern)
    runs = comparison.build(
        source,
        names,
        shares,
        patterns,
        allow_code=allowed,
        calibration=calibration,
        bos=bos,
        samples=samples,
        seqlen=seqlen,
        heldout_samples=heldout_samples,
        evaluation=text,
        windows=windows,
        evaluation_seqlen=eval_seqlen,
        seed=seed,
        ridge=ridge,
        weighting=weighting,
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
