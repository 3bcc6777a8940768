"""The command `zero-shot`."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt.core.base.types import Observer
from sparseopt.shell import console
from sparseopt.shell.options import AsJson, FollowLinks, Source, takes_recipe


@takes_recipe(only=["bos"])
def zero_shot(
    model: Source,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval tasks or groups, separated by commas.")],
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Largest number of examples per task, from its start.")] = None,
    shots: Annotated[int, typer.Option(help="Solved examples in each prompt.")] = 0,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens that the model reads. Default: its own limit.")
    ] = None,
    follow_links: FollowLinks = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Measure accuracy on lm-eval tasks, with data from the Hugging Face hub or your own files."""
    from sparseopt.models import open_model, open_source
    from sparseopt.pruning.evaluate.zero_shot import zero_shot as run_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with task_progress() as progress:
        found = run_tasks(
            open_model(open_source(model, follow_links=follow_links)),
            names,
            limit=limit,
            include_path=include_path,
            shots=shots,
            max_length=max_length,
            observer=progress,
            **options,
        )
    if as_json:
        typer.echo(json.dumps(found))
        return
    console.console.print(
        console.comparison_table(
            f"{found['model']}, {shots} shots", ("task", "examples", "metric", "value", "std. error"), score_rows(found)
        )
    )
    if found["bos"] is not None:
        console.say(f"every input started with the model's BOS (token {found['bos']})")
    if found["cut"]:
        console.say(f"{found['cut']} requests were longer than the model reads; the beginning of their prompt was cut")


def score_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a metric: task, examples, metric, value, standard error."""
    rows: list[tuple[str, ...]] = []
    for task, scores in found["tasks"].items():
        metrics = scores["metrics"]
        errors = {name.replace("_stderr", "", 1): value for name, value in metrics.items() if "_stderr" in name}
        for name, value in metrics.items():
            if "_stderr" not in name:
                shown, spread = (("-" if v is None else f"{v:.4f}") for v in (value, errors.get(name)))
                rows.append((task, str(scores["examples"] or "-"), name, shown, spread))
    return rows


@contextmanager
def task_progress() -> Iterator[Observer]:
    """Observer of `zero_shot`, on the error stream: a bar on a terminal, elsewhere a line each tenth of the work."""
    bar, task, title, start, tenth = console.counting_bar(console.errors), None, "", 0.0, 0

    def observe(stage: Any, done: int, total: int) -> None:
        nonlocal task, title, start, tenth
        if task is None or stage != title:
            # Started only now: lm-eval shows bars of its own while it makes the prompts.
            bar.start()
            task, title, start, tenth = bar.add_task(stage, total=total), stage, time.perf_counter(), 0
        bar.update(task, completed=done, total=total)
        if not console.errors.is_terminal and 10 * done // total > tenth:
            tenth, spent = 10 * done // total, time.perf_counter() - start
            left = spent / done * (total - done)
            line = f"{title}: {100 * done // total} %, {spent:.0f} s, {left:.0f} s left"
            console.say(line, console.errors)

    try:
        yield observe
    finally:
        bar.stop()
