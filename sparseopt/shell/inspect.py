"""Floor 8: the command `inspect`."""

import json
from typing import Annotated, Any, cast

import typer

from sparseopt.shell.prune import SOURCE_HELP


def inspect(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    sparsity: Annotated[
        float | None, typer.Option(help="Share of zeros, in [0, 1); default: 0.5, or that of the n:m pattern.")
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="Which weights may survive: unstructured, per-row, n:m such as 2:4, block:RxC.")
    ] = "unstructured",
    method: Annotated[str, typer.Option(help="best, maiht, admm, splice, sparsegpt, wanda or magnitude.")] = "maiht",
    preset: Annotated[str, typer.Option(help="paper or best.")] = "best",
    allocation: Annotated[str, typer.Option(help="Sparsity over the linears: uniform, owl or curves.")] = "uniform",
    propagate: Annotated[float | None, typer.Option(help="As in `sparseopt prune`; default: the method's.")] = None,
    reconstruct: Annotated[
        int | None, typer.Option(help="Epochs of training for each pruned block; default: the method's, 0 for none.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    heldout_samples: Annotated[int, typer.Option(help="Windows for the held-out error; 0 for none.")] = 4,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the source's.")] = None,
    gflops: Annotated[
        float | None,
        typer.Option(
            help="The machine's rate of float32 matrix products, 10^9 operations a second; default: measured."
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory to compare with, as in 16GiB; default: this machine's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")] = False,
) -> None:
    """What a model is, what pruning it would zero, and how much memory and time that takes. Reads headers only."""
    from sparseopt.pruning import Recipe
    from sparseopt.pruning.cost import measure_gflops
    from sparseopt.pruning.inspection import inspect_model
    from sparseopt.pruning.patterns import implied_sparsity
    from sparseopt.shell import console, show_inspection
    from sparseopt.system.machine import available_memory_bytes, parse_bytes

    limit = available_memory_bytes() if memory is None else parse_bytes(memory)
    recipe = Recipe(
        sparsity=0.5 if sparsity is None and implied_sparsity(pattern) is None else sparsity,
        pattern=pattern,
        method=method,
        preset=preset,
        allocation=cast(Any, allocation),
        propagate=propagate,
        reconstruct=reconstruct,
        samples=samples,
        seqlen=seqlen,
        heldout_samples=heldout_samples,
        dtype=dtype,
    )
    recipe.check()
    rate = measure_gflops() if gflops is None else gflops
    found = inspect_model(source, recipe, gflops=rate)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    for line in show_inspection.model_lines(found):
        console.say(line)
    console.console.print(show_inspection.linear_table(found))
    for line in show_inspection.prune_lines(found, limit):
        console.say(line)
