"""Floor 8: the command `inspect`."""

import json
from typing import Annotated, Any

import typer

from sparseopt.shell.options import AsJson, Source, recipe_fields, takes_recipe
from sparseopt.shell.processes import machine_option


@takes_recipe()
def inspect(
    source: Source,
    gflops: Annotated[
        float | None, machine_option("Rate of float32 matrix products, 10^9 operations a second. Default: measured.")
    ] = None,
    memory: Annotated[
        str | None, machine_option("Memory to compare with, as in 16GiB. Default: this machine's.")
    ] = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """What a model is, what pruning it would zero, and how much memory and time that takes. Reads headers only."""
    from sparseopt.pruning import Recipe
    from sparseopt.pruning.cost import measure_gflops
    from sparseopt.pruning.inspection import inspect_model
    from sparseopt.shell import console, show_inspection
    from sparseopt.system.machine import available_memory_bytes, parse_bytes

    limit = available_memory_bytes() if memory is None else parse_bytes(memory)
    recipe = Recipe(**recipe_fields(options))
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
