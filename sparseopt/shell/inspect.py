"""The command `inspect`, and what a person sees of an inspection."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparseopt.shell import console
from sparseopt.shell.options import AsJson, FollowLinks, Source, machine_option, opened, takes_recipe
from sparseopt.system.machine import format_bytes, parse_bytes, working_memory_bytes

if TYPE_CHECKING:  # its package needs flax
    from sparseopt.pruning.inspection import Inspection


@takes_recipe()
def inspect(
    source: Source,
    measure: Annotated[
        bool,
        machine_option("Also estimate the time of a run, by running the recipe on the first blocks.", "--measure"),
    ] = False,
    memory: Annotated[
        str | None, machine_option("Memory to compare with, as in 16GiB. Default: this machine's.")
    ] = None,
    device_memory: Annotated[
        str | None,
        machine_option(
            "Memory of a GPU or TPU that is not here, as in 80GiB; larger layers are solved in blocks of outputs."
        ),
    ] = None,
    follow_links: FollowLinks = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Describe a model, what pruning would remove, and the memory needed.

    Only headers are read, unless the time is measured.
    """
    from sparseopt.pruning import Recipe
    from sparseopt.pruning.inspection import inspect_model

    device = None if device_memory is None else parse_bytes(device_memory)
    limit = (device or working_memory_bytes()) if memory is None else parse_bytes(memory)
    recipe = Recipe(**options)
    found = inspect_model(opened(source, follow_links), recipe, measure=measure, device_memory=device)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    for line in model_lines(found):
        console.say(line)
    console.console.print(linear_table(found))
    for line in prune_lines(found, limit):
        console.say(line)


def model_lines(found: "Inspection") -> list[str]:
    """What the model is."""
    where = found.path if found.source == found.path else f"{found.source} (in {found.path})"
    revision = f", commit {found.revision}" if found.revision else ""
    family = f"{found.model_type}, {found.num_blocks} blocks"
    if not found.supported:
        family += (
            "; this package's decoder does not have this family: `sparseopt prune` loads it whole through transformers "
            "(`pip install 'sparseopt[torch]'`). What follows is taken from the names of its tensors"
        )
    lines = [f"{where}{revision}", family]
    if found.kinds:
        alike = "all blocks alike: " if len(found.kinds) == 1 else ""
        lines += [f"  {alike or f'blocks {ranges(kind.indices)}: '}{kind.description}" for kind in found.kinds]
    head = "head tied to the embedding" if found.tied else f"head {found.head_parameters:,}"
    lines.append(
        f"{found.parameters:,} parameters: {found.block_parameters:,} in blocks, of which prunable "
        f"{found.prunable_parameters:,}; embedding {found.embedding_parameters:,}, {head}"
    )
    if found.unused_parameters:
        lines.append(f"another {found.unused_parameters:,} parameters of other parts are copied unchanged")
    stored = ", ".join(f"{dtype} {format_bytes(nbytes)}" for dtype, nbytes in found.dtypes.items())
    lines.append(f"tensors as they read: {stored}; files: {format_bytes(found.file_bytes)}")
    if found.no_text:
        lines.append(f"`sparseopt prune` and `eval` refuse it: {found.no_text}")
    return lines


def linear_table(found: "Inspection") -> Table:
    """The distinct linear layers of the blocks, and what pruning makes of them."""
    rows = [
        (
            linear.name,
            ranges(linear.blocks),
            f"{linear.outputs}x{linear.inputs}",
            f"{linear.count:,}",
            linear.dtype,
            f"{linear.size:,}",
            f"{linear.zeros / linear.size:.4f}" if linear.zeros is not None else "stay" if linear.blocks else "-",
        )
        for linear in found.linears
    ]
    return console.comparison_table(
        "Linear layers of the blocks", ("layer", "blocks", "shape", "count", "dtype", "weights", "to prune"), rows
    )


def prune_lines(found: "Inspection", memory_bytes: int) -> list[str]:
    """What pruning would remove and cost; `memory_bytes` is the memory available."""
    from sparseopt.layers.patterns import implied_sparsity

    estimate = found.estimate
    if estimate is None or found.zeros is None or found.dense_bytes is None or found.packed_bytes is None:
        return ["no estimate of memory for this family"]
    recipe = found.recipe
    lines = [
        f"pruned by {recipe['method']}, pattern {recipe['pattern']}: {found.zeros:,} zeros, "
        f"{found.zeros / found.prunable_parameters:.2%} of the linear layers, "
        f"{found.zeros / found.parameters:.2%} of all",
        f"output {format_bytes(found.dense_bytes)} dense, {format_bytes(found.packed_bytes)} packed",
    ]
    if recipe["allocation"] != "uniform":
        some = implied_sparsity(recipe["pattern"]) is not None
        lines.append(
            f"allocation {recipe['allocation']} decides on the zeros of each linear during the run"
            + f"; some stay dense, and {recipe['sparsity']:.2%} or a little more of the weights become zero" * some
        )
    if stays := found.prunable_parameters - (found.targeted_parameters or 0):
        lines.insert(0, f"{stays:,} weights of linear layers are not pruned")
    parts, variants = console.bytes_by_size(estimate.memory[estimate.peak_phase]), recipe["variants"]
    windows = f"{recipe['windows']} + {recipe['heldout_windows']} windows of {recipe['seqlen']} tokens"
    lines += [
        f"estimated memory of `sparseopt prune` with {windows}{f' and {variants} variants' * bool(variants)}: "
        f"{format_bytes(estimate.peak_memory_bytes)}, in phase {estimate.peak_phase}",
        *(f"  {part}" for part in parts),
    ]
    if estimate.solve_blocks > 1:
        lines.append(f"its largest layers are solved by up to {estimate.solve_blocks} blocks of their outputs")
    lines.append(
        f"with activations on disk ({format_bytes(estimate.scratch_bytes)}): "
        f"{format_bytes(estimate.disk_peak_memory_bytes)}"
    )
    if estimate.peak_memory_bytes <= memory_bytes:
        fits = "that fits"
    elif estimate.disk_peak_memory_bytes <= memory_bytes:
        fits = "with activations on disk, which --memory allows, that fits"
    else:
        fits = "that does not fit"
    lines.append(f"{fits} in {format_bytes(memory_bytes)}")
    if found.seconds is None:
        lines.append("--measure says the time of a run")
    else:
        drawn = "; its text is drawn once for a model besides" * (recipe["calibration"] == "self")
        lines.append(f"time of a run, measured on its first blocks: {console.duration(found.seconds)}{drawn}")
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs joined: `0, 2-4, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
