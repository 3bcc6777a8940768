"""The command `zero-shot`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt.shell import console
from sparseopt.shell.options import AsJson, FollowLinks, Source, opened, takes_recipe, words


@takes_recipe(only=["bos"])
def zero_shot(
    model: Source,
    tasks: Annotated[str, typer.Option(help="lm-eval's tasks or groups, with commas: piqa=FILE, arc_easy.")],
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
    from sparseopt.pruning.evaluate.zero_shot import DecoderLM
    from sparseopt.pruning.evaluate.zero_shot import zero_shot as run_tasks

    with console.block_progress(f"tasks {tasks}") as progress:
        read = DecoderLM(opened(model, follow_links), max_length=max_length, observer=progress, **options)
        found = run_tasks(read, words(tasks), limit=limit, include_path=include_path, shots=shots)
    if as_json:
        typer.echo(json.dumps(found))
        return
    headings = ("task", "examples", "metric", "value", "std. error")
    console.console.print(console.comparison_table(f"{found['model']}, {shots} shots", headings, list(_rows(found))))
    if found["bos"] is not None:
        console.say(f"every input started with the model's BOS (token {found['bos']})")
    if found["cut"]:
        console.say(f"{found['cut']} requests were longer than the model reads; the beginning of their prompt was cut")


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row a metric: task, examples, metric, value, standard error."""
    for task, scores in found["tasks"].items():
        metrics = scores["metrics"]
        errors = {name.replace("_stderr", "", 1): value for name, value in metrics.items() if "_stderr" in name}
        for name in (name for name in metrics if "_stderr" not in name):
            shown, spread = (("-" if v is None else f"{v:.4f}") for v in (metrics[name], errors.get(name)))
            yield task, str(scores["examples"] or "-"), name, shown, spread
