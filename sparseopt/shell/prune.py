"""Floor 8: the commands `prune`, `eval`, `pack` and `unpack`."""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt.shell import console, options

# EX_TEMPFAIL of sysexits: a scheduler that sent SIGTERM may start the same command again.
RESUMABLE = 75


@options.takes_recipe(lists={"sparsity": "Several, as in 0.5,0.6,0.7, share one pass."})
def prune(
    source: options.Source,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder to write: new, empty or of the same run. Several sparsities get a folder in it each.",
            rich_help_panel="Output",
        ),
    ],
    memory: Annotated[
        str | None,
        options.machine_option(
            "Memory that the run may use, as in 8GiB; activations go to disk where needed. Default: what is available."
        ),
    ] = None,
    devices: Annotated[
        str | None,
        options.machine_option("Devices to work on: a number, or all. Default: one; in several processes all."),
    ] = None,
    distributed: options.Distributed = False,
    coordinator: options.Coordinator = None,
    processes: options.Processes = None,
    process_id: options.ProcessId = None,
    **given: Any,
) -> None:
    """Prune a causal language model layer by layer and write a folder that transformers loads."""
    chosen = options.number_of_devices(devices)
    with options.cooperating(distributed, coordinator, processes, process_id):
        from sparseopt.models import open_source
        from sparseopt.pruning import Recipe, Stopped, prune_models
        from sparseopt.shell import show_pruning
        from sparseopt.system.processes import count, is_first

        several, fields = given.pop("sparsity"), options.recipe_fields(given)
        shares = [None] if several is None else _numbers(several, "--sparsity")
        recipes = [Recipe(sparsity=share, **fields) for share in shares]
        for each in recipes:
            each.check()
        plans = [(each, output / f"{each.sparsity:g}" if len(recipes) > 1 else output) for each in recipes]
        title = f"{fields['method']} {', '.join(f'{each.sparsity:.0%}' for each in recipes)}"
        if (pattern := fields["pattern"]) != "unstructured":
            title = f"{title} {pattern}"
        # Opened before the bar starts, because a download shows its own.
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
    """Within, SIGTERM does not kill: the current block is finished first. Yields a function that says if it came."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _numbers(text: str, option: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes numbers separated by commas, as in 0.5,0.7, given {text!r}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"{option} names a number twice: {text!r}")
    return found


@options.takes_recipe(only=["bos"])
def evaluate(
    model: options.Source,
    text: Annotated[str, typer.Option(help=options.TEXT_HELP)] = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows from the start of the evaluation text.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    pattern: Annotated[
        str | None, typer.Option(help="Also check that every linear has this pattern, as in `sparseopt prune`.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="The pattern's fraction of zeros; n:m has its own.")] = None,
    as_json: options.AsJson = False,
    **given: Any,
) -> None:
    """Token-level perplexity of a model, and the exact sparsity of its linears."""
    from sparseopt.models import check_window, open_model
    from sparseopt.pruning import audit_pattern, audit_sparsity, perplexity
    from sparseopt.pruning.texts import part_of_text, text_windows

    opened = open_model(model)
    check_window(seqlen, opened.config.max_positions)
    ids, start = text_windows(opened.source, text, "evaluation", windows, seqlen, bos=given["bos"])
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
    exact = sum(a.exact for a in found)
    if as_json:
        found_pattern = {"pattern": pattern, "exact": exact} if pattern else {}
        figures = {
            "model": model, "text": text, "windows": windows, "seqlen": seqlen, "bos": start, "perplexity": score,
            "zeros": zeros, "size": size, "sparsity": zeros / size, "layers": {a.layer: a.zeros for a in audits},
            **found_pattern,
        }  # fmt: skip
        typer.echo(json.dumps(figures))
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
        console.say(f"pattern {pattern} holds in all {len(found)} linears, exact in {exact}")


def pack(
    folder: Annotated[Path, typer.Argument(help="Folder of a pruned model, dense.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
) -> None:
    """Store a pruned model's zeros as a bitmask: smaller on disk, for sparseopt only until it is unpacked."""
    from sparseopt.models import pack_folder

    with console.block_progress(f"packing {folder.name}") as progress:
        done = pack_folder(folder, output, observer=progress)
    console.say(console.packed_line(done.dense_bytes, done.stored_bytes))
    console.say(f"wrote {done.output}")


def unpack(
    folder: Annotated[Path, typer.Argument(help="Folder of a packed model.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
) -> None:
    """Write a packed model as the dense folder that transformers loads, identical to the one that was packed."""
    from sparseopt.models import unpack_folder

    with console.block_progress(f"unpacking {folder.name}") as progress:
        done = unpack_folder(folder, output, observer=progress)
    console.say(f"{done.stored_bytes:,} bytes of tensors, dense")
    console.say(f"wrote {done.output}")
