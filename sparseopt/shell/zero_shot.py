"""Floor 8: the command `zero-shot`."""

import json
import time
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sparseopt.shell.prune import BOS_HELP, SOURCE_HELP


def zero_shot(
    model: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    tasks: Annotated[str, typer.Option(help="Names of lm-eval tasks or groups, with commas between.")],
    include_path: Annotated[Path | None, typer.Option(help="Folder of your own task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples a task at most, from the start.")] = None,
    shots: Annotated[int, typer.Option(help="Solved examples in each prompt.")] = 0,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens that the model reads at most; default: its own limit.")
    ] = None,
    bos: Annotated[str, typer.Option(help=BOS_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")] = False,
) -> None:
    """Accuracy on tasks of lm-eval, whose data come from the Hugging Face hub or from your own files."""
    from sparseopt.pruning.zero_shot import zero_shot as run_tasks
    from sparseopt.shell import console

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    progress = TaskProgress()
    try:
        found = run_tasks(
            model,
            names,
            limit=limit,
            include_path=include_path,
            shots=shots,
            max_length=max_length,
            bos=cast(Any, bos),
            observer=progress,
        )
    finally:
        progress.stop()
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


class TaskProgress:
    """Observer of `zero_shot`, on the error stream: a bar on a terminal, elsewhere a line each tenth of the work."""

    def __init__(self) -> None:
        from sparseopt.shell.console import counting_bar, errors

        self._console = errors
        self._title = ""
        self._start = 0.0
        self._tenth = 0
        self._bar = counting_bar(errors)

    def __call__(self, title: str, done: int, total: int) -> None:
        """`done` of `total` steps of what `title` names."""
        if title != self._title:
            # Started only now: lm-eval shows bars of its own while it makes the prompts.
            self._bar.start()
            self._title, self._start, self._tenth = title, time.perf_counter(), 0
            self._task = self._bar.add_task(title, total=total)
        self._bar.update(self._task, completed=done, total=total)
        if not self._console.is_terminal and 10 * done // total > self._tenth:
            self._tenth = 10 * done // total
            spent = time.perf_counter() - self._start
            left = spent / done * (total - done)
            self._console.print(f"{title}: {100 * done // total} %, {spent:.0f} s, {left:.0f} s left", soft_wrap=True)

    def stop(self) -> None:
        """Leave the terminal to others."""
        self._bar.stop()
