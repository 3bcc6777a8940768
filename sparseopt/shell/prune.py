"""Floor 8: the commands `sparseopt prune` and `sparseopt eval`."""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt.shell.options import TEXT_HELP, AsJson, Source, recipe_fields, takes_recipe
from sparseopt.shell.processes import (
    Coordinator,
    Distributed,
    Processes,
    ProcessId,
    cooperating,
    machine_option,
    number_of_devices,
)

# EX_TEMPFAIL of sysexits: a scheduler that asked for the end may start the same command again.
RESUMABLE = 75


@takes_recipe(lists={"sparsity": "Several, as in 0.5,0.6,0.7, share one pass."})
def prune(
    source: Source,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder to write: new, empty or of the same run. Several sparsities get a folder in it each.",
            rich_help_panel="Output",
        ),
    ],
    memory: Annotated[
        str | None,
        machine_option(
            "Memory that the run may use, as in 8GiB; activations go to disk where needed. Default: what is available."
        ),
    ] = None,
    devices: Annotated[
        str | None, machine_option("Devices to work on: a number, or all. Default: one; in several processes all.")
    ] = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process_id: ProcessId = None,
    **options: Any,
) -> None:
    """Prune a causal language model layer by layer and write a folder that transformers loads."""
    chosen = number_of_devices(devices)
    with cooperating(distributed, coordinator, processes, process_id):
        from sparseopt.models import open_source
        from sparseopt.pruning import Recipe, Stopped, prune_models
        from sparseopt.shell import console, show_pruning
        from sparseopt.system.processes import count, is_first

        several = options.pop("sparsity")
        fields = recipe_fields(options)
        shares = [None] if several is None else numbers(several, "--sparsity")
        recipes = [Recipe(sparsity=share, **fields) for share in shares]
        for each in recipes:
            each.check()
        plans = [(each, output / f"{each.sparsity:g}" if len(recipes) > 1 else output) for each in recipes]
        title = f"{fields['method']} {', '.join(f'{each.sparsity:.0%}' for each in recipes)}"
        if (pattern := fields["pattern"]) != "unstructured":
            title = f"{title} {pattern}"
        # Opened out here: a download shows a bar of its own, and two bars do not go together.
        opened = open_source(source)
        code = 0
        try:
            with stop_asked() as stop, show_pruning.PruneProgress(title) as progress:
                reports = prune_models(opened, plans, observer=progress, stop=stop, memory=memory, devices=chosen)
        except KeyboardInterrupt:
            if count() > 1:
                raise
            shards = sorted(output.rglob("*.safetensors")) if output.is_dir() else []
            console.errors.print(
                f"\nstopped: {len(shards)} finished shards in {output} are whole and stay there. "
                f"Run the same command again to resume after them"
            )
            code = 130
        except Stopped as stopped:
            if is_first():
                console.errors.print(f"\n{stopped}")
            code = RESUMABLE
        else:
            for report in reports:
                console.console.print(show_pruning.prune_table(report))
                for line in show_pruning.run_lines(report):
                    console.say(line)
                console.say(f"finished before, in {report.output}" if report.kept else f"wrote {report.output}")
    if code:
        raise typer.Exit(code)


@contextlib.contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM does not kill: the block in hand is finished first. Yields what tells whether it came."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def numbers(text: str, option: str) -> list[float]:
    """The numbers of a comma-separated option, each once.

    Raises:
        ValueError: naming the option, if it is not such a list.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes numbers separated by commas, as in 0.5,0.7, given {text!r}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"{option} names a number twice: {text!r}")
    return found


@takes_recipe(only=["bos"])
def evaluate(
    model: Source,
    text: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows from the start of the evaluation text.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    pattern: Annotated[
        str | None, typer.Option(help="Also check that every linear has this pattern, as in `sparseopt prune`.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="The pattern's fraction of zeros; n:m has its own.")] = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Token-level perplexity of a model, and the exact sparsity of its linears."""
    from sparseopt.models import check_window, open_model
    from sparseopt.pruning import audit_pattern, audit_sparsity, perplexity
    from sparseopt.pruning.texts import part_of_text, text_windows
    from sparseopt.shell import console

    opened = open_model(model)
    check_window(seqlen, opened.config.max_positions)
    ids, start = text_windows(opened.source, text, "evaluation", windows, seqlen, bos=options["bos"])
    found = audit_pattern(opened, pattern, sparsity) if pattern else []
    broken = [a for a in found if not a.fits]
    if broken:
        first = broken[0]
        raise RuntimeError(
            f"{len(broken)} of {len(found)} linears break the pattern {pattern!r}; {first.layer} holds up to "
            f"{first.most:,} {first.unit}, allowed are {first.allowed:,}"
        )
    with console.block_progress("perplexity") as progress:
        score = perplexity(opened, ids, bos=start, observer=progress)
    audits = audit_sparsity(opened)
    zeros, size = sum(a.zeros for a in audits), sum(a.size for a in audits)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "model": model,
                    "text": text,
                    "windows": windows,
                    "seqlen": seqlen,
                    "bos": start,
                    "perplexity": score,
                    "zeros": zeros,
                    "size": size,
                    "sparsity": zeros / size,
                    "layers": {a.layer: a.zeros for a in audits},
                    **({"pattern": pattern, "exact": sum(a.exact for a in found)} if pattern else {}),
                }
            )
        )
        return
    least, most = min(audits, key=lambda a: a.sparsity), max(audits, key=lambda a: a.sparsity)
    console.say(
        f"perplexity {score:.4f} on {windows} windows of {seqlen} tokens of {part_of_text(text, 'evaluation')}"
        + ("" if start is None else f", each starting with BOS (token {start})")
    )
    console.say(
        f"sparsity {zeros / size:.6f}: {zeros:,} zeros of {size:,} weights in {len(audits)} linears "
        f"(from {least.sparsity:.6f} in {least.layer} to {most.sparsity:.6f} in {most.layer})"
    )
    if pattern:
        console.say(f"pattern {pattern} holds in all {len(found)} linears, exact in {sum(a.exact for a in found)}")
