"""Floor 8: the commands `run` and `report`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparseopt.shell.processes import (
    Coordinator,
    Distributed,
    ManyDevices,
    Processes,
    ProcessId,
    cooperating,
    number_of_devices,
)

AllowAll = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Import whatever classes configs name by their path, also from here and from beside the config: runs "
        "their modules. For configs that you trust.",
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
    config: Annotated[Path, typer.Argument(help="Experiment file, as in configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: key=value, penalty.weight=20.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of all runs; each gets a folder below it.")] = Path("runs"),
    shard: Annotated[str, typer.Option(help="i/n: do every n-th run from the i-th, for n processes.")] = "1/1",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run and what it needs, and stop.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Repeat finished runs; their results are replaced.")] = False,
    devices: ManyDevices = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process_id: ProcessId = None,
    allow_code: AllowAll = False,
    allow_package: AllowPackages = None,
) -> None:
    """Run an experiment or a sweep. Finished runs are kept, interrupted ones resume where they stopped."""
    allowed = permitted(allow_code, allow_package, Path.cwd(), config.resolve().parent)
    with cooperating(distributed, coordinator, processes, process_id):
        from sparseopt.experiments.config import load_config
        from sparseopt.experiments.sweep import check_all, over_devices, parse_shard, plan, run_all, take_shard
        from sparseopt.shell import show_experiments as shown
        from sparseopt.shell.console import console, errors, say
        from sparseopt.system.processes import is_first

        part = parse_shard(shard)
        runs = take_shard(load_config(config, overrides or [], allow_code=allowed), part)
        if (chosen := number_of_devices("all" if distributed else devices)) is not None:
            runs = over_devices(runs, chosen)
        planned = plan(runs, output)
        if dry_run:
            console.print(shown.plan_table(planned))
            say(shown.plan_line(planned))
            return
        check_all(planned, again=again)
        say(shown.plan_line(planned) + ("" if part == (1, 1) else f" (shard {shard})"))
        try:
            with shown.SweepProgress(len(planned)) as progress:
                outcomes = run_all(planned, output, progress.observer, again=again, ended=progress.ended)
        except KeyboardInterrupt:
            errors.print("\nstopped; the same command resumes after the last finished unit")
            raise typer.Exit(130) from None
        failed = [outcome for outcome in outcomes if outcome.error]
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {len(outcomes)} runs failed; the others are finished. See error.txt in "
                + ", ".join(str(outcome.folder) for outcome in failed)
            )
        if planned and is_first():
            _show([p.folder for p in planned], allowed)
            folder = output / planned[0].run.task.name
            say(f"sparseopt report {folder} --output FOLDER writes this as files, with pictures")


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders that hold them.")],
    output: Annotated[
        Path | None, typer.Option(help="New folder for CSV, Parquet, Markdown, HTML and pictures.")
    ] = None,
    allow_code: AllowAll = False,
    allow_package: AllowPackages = None,
) -> None:
    """Gather finished runs into one table, and with --output into files and one page of plots."""
    from sparseopt.experiments.report import write_report
    from sparseopt.shell.console import say

    sections = _show(folders, permitted(allow_code, allow_package, Path.cwd()))
    if output is not None:
        for file in write_report(sections, output):
            say(f"wrote {file}")


def _show(folders: list[Path], allowed: bool | list[str]) -> list:
    from sparseopt.experiments.report import gather
    from sparseopt.shell.console import console, say
    from sparseopt.shell.show_experiments import section_tables

    sections = gather(folders, allowed)
    for section in sections:
        for table in section_tables(section, console.width):
            console.print(table)
        if section.paper:
            say(f"original: {section.paper.source}")
            for sentence in section.paper.differs:
                say(f"  differs: {sentence}")
    return sections
