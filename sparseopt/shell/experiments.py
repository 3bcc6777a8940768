"""The commands `run`, `report` and `compare`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseopt.experiments.tracking import Tracked, check_tracker
from sparseopt.shell import options
from sparseopt.shell.console import command_line, console, say, stop, write_page

if TYPE_CHECKING:
    from sparseopt.experiments.report import Section
    from sparseopt.experiments.runs import Outcome, Planned

EVALUATION = "Evaluation"
AllowAll = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Import any class that a config names by path, also from the current folder and the config's folder. "
        "This runs the code of its module, so use it only with configs that you trust.",
    ),
]
AllowPackages = Annotated[
    list[str] | None,
    typer.Option("--allow-package", help="Import classes named by path from this installed package; repeatable."),
]


def permitted(allow_code: bool, packages: list[str] | None, *folders: Path) -> bool | list[str]:
    """What a command may import for a config; with `--allow-code`, also from these folders.

    The folders are searched then alone: a module beside a stranger's config could take the place of an optional
    package that is not installed.
    """
    if not allow_code:
        return packages or []
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return True


def run(
    config: Annotated[Path, typer.Argument(help="Experiment file, or one that comes with sparseopt: denoise-medical.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: key=value, penalty.weight=20.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of all runs; each gets a subfolder.")] = Path("runs"),
    shard: Annotated[str, typer.Option(help="i/n: do every n-th run from the i-th on, for n processes.")] = "1/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and stop.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Repeat finished runs; their results are replaced.")] = False,
    devices: options.ManyDevices = None,
    distributed: options.Distributed = False,
    coordinator: options.Coordinator = None,
    processes: options.Processes = None,
    process_id: options.ProcessId = None,
    log: options.Log = None,
    allow_code: AllowAll = False,
    allow_package: AllowPackages = None,
) -> None:
    """Run an experiment or a sweep. Finished runs are kept, interrupted ones resume where they stopped."""
    check_tracker(log)
    with options.cooperating(distributed, coordinator, processes, process_id):
        from sparseopt.experiments.config import find_config, load_config
        from sparseopt.experiments.report import run_page
        from sparseopt.experiments.runs import FAILURE, check_all, plan, run_all, take_shard
        from sparseopt.shell import show_experiments as shown
        from sparseopt.system.processes import is_first
        from sparseopt.system.run_folder import PAGE

        config = find_config(config)
        allowed = permitted(allow_code, allow_package, Path.cwd(), config.resolve().parent)
        runs = take_shard(load_config(config, overrides or [], allow_code=allowed), shard)
        asked = "all" if devices is None and distributed else devices
        if (chosen := options.number_of_devices(asked)) is not None:
            runs = [replace(run, task=run.task.model_copy(update={"devices": chosen})) for run in runs]
        planned = plan(runs, output)
        if dry_run:
            console.print(shown.plan_table(planned))
            say(shown.plan_line(planned, again))
        check_all(planned, again=again)
        if dry_run:
            return
        say(shown.plan_line(planned, again) + ("" if shard == "1/1" else f" (shard {shard})"))
        outcomes = _executed(planned, partial(run_all, planned, output, again=again), partial(_logged, log, allowed))
        failed = [outcome for outcome in outcomes if outcome.error]
        if failed:
            told = ", ".join(str(outcome.folder) for outcome in failed if (outcome.folder / FAILURE).is_file())
            raise RuntimeError(
                f"{len(failed)} of {len(outcomes)} runs failed; the others are finished"
                + (f". See {FAILURE} in {told}" if told else "")
            )
        if planned and is_first():
            sections = _show([p.folder for p in planned], allowed)
            folder = output / planned[0].run.task.name
            write_page(folder / PAGE, partial(run_page, sections, folder))
            say(f"sparseopt report {folder} --output FOLDER writes this as files, with pictures")


def _executed(
    planned: "Sequence[Planned]",
    work: "Callable[..., list[Outcome]]",
    then: "Callable[[Planned, Outcome], None]" = lambda planned, outcome: None,
) -> "list[Outcome]":
    """The outcomes of runs whose progress is shown; `then` is called after each."""
    from sparseopt.shell.show_experiments import SweepProgress

    stop.words = lambda: "stopped; the same command continues with what is missing"
    with SweepProgress(len(planned)) as progress:

        def ended(run: "Planned", outcome: "Outcome") -> None:
            progress.ended(run, outcome)
            then(run, outcome)

        return work(observer=progress.observer, ended=ended)


def _logged(log: str | None, allowed: bool | list[str], planned: "Planned", outcome: "Outcome") -> None:
    """Log a run that has just been finished: its settings, its mean figures, and a page of its own."""
    from sparseopt.experiments.report import gather, run_page
    from sparseopt.shell.show_experiments import name_of
    from sparseopt.system.processes import is_first
    from sparseopt.system.run_folder import PAGE, SUMMARY, flat, read_json

    if log is None or outcome.error or not (outcome.done and is_first()):
        return
    with Tracked(log, name_of(planned), dict(flat(planned.run.task.model_dump(mode="json")))) as tracked:
        figures = read_json(outcome.folder / SUMMARY)["figures"]
        tracked.log({name: value.get("mean") for name, value in figures.items() if hasattr(value, "get")})
        page = outcome.folder / PAGE
        write_page(page, partial(run_page, gather([outcome.folder], allowed), outcome.folder))
        tracked.keep(page)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders that hold them.")],
    output: Annotated[
        Path | None, typer.Option(help="New folder for CSV, Parquet, Markdown, HTML and figures.")
    ] = None,
    allow_code: AllowAll = False,
    allow_package: AllowPackages = None,
) -> None:
    """Collect finished runs in one table and, with --output, in files and a page of plots."""
    from sparseopt.experiments.report import write_report

    sections = _show(folders, permitted(allow_code, allow_package, Path.cwd()))
    if output is not None:
        for file in write_report(sections, output, command_line()):
            say(f"wrote {file}")


def _show(folders: list[Path], allowed: bool | list[str]) -> "list[Section]":
    from sparseopt.experiments.report import gather
    from sparseopt.shell.show_experiments import show_section

    sections = gather(folders, allowed)
    for section in sections:
        show_section(section.report())
    return sections


@options.takes_recipe(
    without=["effort", "method", "preset", "score"],
    lists={"sparsity": "Several are separated by commas: 0.5,0.6.", "pattern": "Several are separated by commas."},
)
def compare(
    source: options.Source,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the table, the figure and the cells; new, or of this comparison.",
            rich_help_panel="Output",
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Efforts and methods as in `sparseopt prune`, separated by commas; a preset follows a colon.",
            rich_help_panel="How to prune",
        ),
    ] = "good,fast,wanda",
    text: Annotated[str, typer.Option(help=options.TEXT_HELP, rich_help_panel=EVALUATION)] = "pydoc",
    eval_windows: Annotated[
        int, typer.Option(help="Windows from the start of the evaluation text.", rich_help_panel=EVALUATION)
    ] = 8,
    eval_seqlen: Annotated[int, typer.Option(help="Tokens per evaluation window.", rich_help_panel=EVALUATION)] = 1024,
    tasks: Annotated[
        str, typer.Option(help="Zero-shot tasks, as in `sparseopt zero-shot`: piqa=FILE.", rich_help_panel=EVALUATION)
    ] = "",
    limit: Annotated[
        int | None, typer.Option(help="Largest number of examples per task.", min=1, rich_help_panel=EVALUATION)
    ] = None,
    allow_code: AllowAll = False,
    allow_package: AllowPackages = None,
    **given: Any,
) -> None:
    """Prune with several methods at several sparsities, and compare perplexity, errors, time and memory.

    Writes one table and one figure. A second run computes missing cells and adds new methods and sparsities.
    """
    from sparseopt.experiments import comparison
    from sparseopt.experiments.runs import run_all
    from sparseopt.shell import show_experiments as shown
    from sparseopt.system.run_folder import PAGE

    allowed = permitted(allow_code, allow_package, Path.cwd())
    usual = "0" if given.get("keep_zeros") or given.get("masks") else "0.5"
    lists = str(given.pop("sparsity", usual)), given.pop("pattern", "unstructured")
    names, shares, patterns = comparison.read_lists(methods, *lists)
    runs = comparison.build(
        source,
        names,
        shares,
        patterns,
        allow_code=allowed,
        evaluation=text,
        evaluation_windows=eval_windows,
        evaluation_seqlen=eval_seqlen,
        zero_shot=options.words(tasks),
        zero_shot_limit=limit,
        **given,
    )
    planned = comparison.prepare(runs, output)
    say(shown.plan_line(planned))
    outcomes = _executed(planned, partial(run_all, planned, output))
    section = comparison.tabulate(planned, outcomes, output, allowed)
    written = comparison.write(section, output)
    shown.show_section(section.report())
    for file in written:
        say(f"wrote {file}")
    if not any(file.suffix == ".png" for file in written):
        say("no picture: it needs a pruned cell that is finished, and matplotlib (pip install 'sparseopt[plot]')")
    write_page(output / PAGE, partial(comparison.page, section, written, source))
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(outcomes)} cells failed, with their reasons in the table; the others are finished. "
            "The same command tries the failed ones again"
        )
