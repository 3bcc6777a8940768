"""Floor 8: the commands `sparseopt prune` and `sparseopt eval`."""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from sparseopt.shell.processes import (
    Coordinator,
    Distributed,
    Processes,
    ProcessId,
    cooperating,
    number_of_devices,
)

SOURCE_HELP = (
    "Model folder (safetensors), GGUF file, or name on the Hugging Face hub: OWNER/NAME or OWNER/NAME@REVISION."
)
# EX_TEMPFAIL of sysexits: a scheduler that asked for the end may start the same command again.
RESUMABLE = 75
TEXT_HELP = (
    "pydoc, wikitext2:PATH, file:PATH or hf:NAME[/CONFIG]. Of a file, calibration reads the first half and evaluation "
    "the second."
)
BOS_HELP = "Begin every window with the tokenizer's BOS: yes, no, or auto, as the tokenizer itself does it."


def prune(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder to write, new, empty or of the same run; several sparsities get a folder in it each."
        ),
    ],
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Share of zeros in every linear, in [0, 1); default: 0.5, or that of the n:m pattern. "
            "Several, as in 0.5,0.6,0.7, share one pass."
        ),
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="Which weights may survive: unstructured, per-row, n:m such as 2:4, block:RxC.")
    ] = "unstructured",
    method: Annotated[str, typer.Option(help="best, maiht, admm, splice, sparsegpt, wanda or magnitude.")] = "maiht",
    preset: Annotated[str, typer.Option(help="paper or best.")] = "best",
    ridge: Annotated[
        float | None, typer.Option(help="Added to the unit diagonal of the scaled Gram; default: the method's.")
    ] = None,
    weighting: Annotated[
        str, typer.Option(help="Tokens in the Grams: uniform, or residual by the residual stream's size.")
    ] = "uniform",
    outputs: Annotated[
        str | None, typer.Option(help="Errors at the outputs: uniform or gradient; default: the method's.")
    ] = None,
    allocation: Annotated[str, typer.Option(help="Sparsity over the linears: uniform, owl or curves.")] = "uniform",
    bounds: Annotated[
        str | None, typer.Option(help="Least and most sparsity of a linear, as in 0.3,0.8; for owl and curves.")
    ] = None,
    propagate: Annotated[
        float | None,
        typer.Option(help="Share of the earlier blocks' error that a linear makes up for; default: the method's."),
    ] = None,
    reconstruct: Annotated[
        int | None, typer.Option(help="Epochs of training for each pruned block; default: the method's, 0 for none.")
    ] = None,
    calibration: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    bos: Annotated[str, typer.Option(help=BOS_HELP)] = "auto",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    heldout_samples: Annotated[int, typer.Option(help="Windows for the held-out error; 0 for none.")] = 4,
    seed: Annotated[int, typer.Option(help="0: windows from the text's start; else drawn at random.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the source's.")] = None,
    min_expert_tokens: Annotated[
        int, typer.Option(help="Experts that fewer calibration tokens are routed to are pruned by magnitude.")
    ] = 64,
    pack: Annotated[
        bool,
        typer.Option("--pack", help="Store zeros as a bitmask; `sparseopt unpack` makes what transformers loads."),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What the run may take, as in 8GiB: activations lie on disk where that needs it. "
            "Default: what the machine has available."
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="Devices to work on: a number, or all. Default: one; in several processes all."),
    ] = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process_id: ProcessId = None,
) -> None:
    """Prune a causal language model layer by layer and write a folder that transformers loads."""
    chosen = number_of_devices(devices)
    settings: dict[str, Any] = {
        "pattern": pattern,
        "method": method,
        "preset": preset,
        "ridge": ridge,
        "weighting": weighting,
        "outputs": outputs,
        "allocation": allocation,
        "bounds": None if bounds is None else tuple(numbers(bounds, "--bounds")),
        "propagate": propagate,
        "reconstruct": reconstruct,
        "calibration": calibration,
        "bos": bos,
        "samples": samples,
        "seqlen": seqlen,
        "heldout_samples": heldout_samples,
        "seed": seed,
        "dtype": dtype,
        "pack": pack,
        "min_expert_tokens": min_expert_tokens,
    }
    with cooperating(distributed, coordinator, processes, process_id):
        code = _prune(source, output, settings, sparsity, memory, chosen)
    if code:
        raise typer.Exit(code)


def _prune(
    source: str,
    output: Path,
    settings: Mapping[str, Any],
    sparsity: str | None,
    memory: str | None,
    devices: int | Literal["all"] | None,
) -> int:
    """The command with all that was asked for; the exit status."""
    from sparseopt.models import open_source
    from sparseopt.pruning import Recipe, Stopped, prune_models
    from sparseopt.pruning.patterns import implied_sparsity
    from sparseopt.shell import console, show_pruning
    from sparseopt.system import processes

    pattern, method = settings["pattern"], settings["method"]
    implied = implied_sparsity(pattern)
    shares: list[float | None] = [*numbers(sparsity, "--sparsity")] if sparsity is not None else [None]
    if shares == [None] and implied is None:
        shares = [0.5]
    recipes = [Recipe(sparsity=share, **settings) for share in shares]
    for each in recipes:
        each.check()
    alone = len(recipes) == 1
    plans = [(each, output if alone else output / f"{each.sparsity:g}") for each in recipes]
    share = ", ".join(f"{implied if s is None else s:.0%}" for s in shares)
    title = f"{method} {share}" if pattern == "unstructured" else f"{method} {share} {pattern}"
    # Opened out here: a download shows a bar of its own, and two bars do not go together.
    opened = open_source(source)
    try:
        with stop_asked() as stop, show_pruning.PruneProgress(title) as progress:
            reports = prune_models(opened, plans, observer=progress, stop=stop, memory=memory, devices=devices)
    except KeyboardInterrupt:
        if processes.count() > 1:
            raise
        shards = sorted(output.rglob("*.safetensors")) if output.is_dir() else []
        console.errors.print(
            f"\nstopped: {len(shards)} finished shards in {output} are whole and stay there. "
            f"Run the same command again to go on behind them"
        )
        return 130
    except Stopped as stopped:
        if processes.is_first():
            console.errors.print(f"\n{stopped}")
        return RESUMABLE
    for report in reports:
        console.console.print(show_pruning.prune_table(report))
        for line in show_pruning.run_lines(report):
            console.say(line)
        console.say(f"finished before, in {report.output}" if report.kept else f"wrote {report.output}")
    return 0


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


def evaluate(
    model: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    text: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    bos: Annotated[str, typer.Option(help=BOS_HELP)] = "auto",
    windows: Annotated[int, typer.Option(help="Windows from the start of the evaluation text.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    pattern: Annotated[
        str | None, typer.Option(help="Also check that every linear has this pattern, as in `sparseopt prune`.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="The pattern's share of zeros; n:m has its own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")] = False,
) -> None:
    """Token-level perplexity of a model, and the exact sparsity of its linears."""
    from sparseopt.models import check_window, open_model
    from sparseopt.pruning import audit_pattern, audit_sparsity, perplexity
    from sparseopt.pruning.texts import part_of_text, text_windows
    from sparseopt.shell import console

    opened = open_model(model)
    check_window(seqlen, opened.config.max_positions)
    ids, start = text_windows(opened.source, text, "evaluation", windows, seqlen, bos=cast(Any, bos))
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
