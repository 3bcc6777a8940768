"""The commands `prune`, `shrink` and `eval`."""

import contextlib
import functools
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparseopt.experiments.tracking import Tracked, check_tracker
from sparseopt.shell import console, options
from sparseopt.system.run_folder import RUN

if TYPE_CHECKING:
    from sparseopt.models import Source
    from sparseopt.pruning import Recipe, ShrinkRecipe
    from sparseopt.pruning.recipe.pass_recipe import PassRecipe

# EX_TEMPFAIL of sysexits: a scheduler that sent SIGTERM may start the same command again.
RESUMABLE = 75
# Endings of the shards of an unfinished run.
SHARDS = (".safetensors", ".gguf")
# Of a finished run's summary, what a tracker gets besides perplexities.
LOGGED = (
    "sparsity", "total_sparsity", "mean_relative_error", "mean_heldout_error", "mean_grid_error", "seconds",
    "peak_memory_bytes", "stored_bytes",
)  # fmt: skip


def makes_models(
    recipe: str, several: Sequence[str], example: str, folders: str
) -> Callable[[Callable[..., str]], Callable[[], None]]:
    """Turn a function that gives the title of a run of recipes into the command that makes their models.

    Args:
        recipe: the name of its kind of recipe.
        several: options that take several numbers; every combination is made by the same command.
        example: of such numbers.
        folders: says where the models of several combinations lie.
    """

    def made(title: Callable[..., str]) -> Callable[[], None]:
        def command(
            source: options.Source,
            output: Annotated[
                Path,
                typer.Option(
                    help=f"Folder to write: new, empty or of the same run; or a new GGUF file, NAME.gguf. {folders}",
                    rich_help_panel="Output",
                ),
            ],
            memory: options.Memory = None,
            devices: options.PassDevices = None,
            distributed: options.Distributed = False,
            coordinator: options.Coordinator = None,
            processes: options.Processes = None,
            process_id: options.ProcessId = None,
            log: options.Log = None,
            follow_links: options.FollowLinks = False,
            dry_run: Annotated[
                bool, options.machine_option("Show what the run would make and need, write nothing.", "--dry-run")
            ] = False,
            measure: Annotated[
                bool,
                options.machine_option(
                    "With --dry-run: estimate the time too, from runs of the recipe on the first blocks.", "--measure"
                ),
            ] = False,
            as_json: Annotated[
                bool, options.machine_option("With --dry-run: print one JSON line and nothing else.", "--json")
            ] = False,
            **given: Any,
        ) -> None:
            if (measure or as_json) and not dry_run:
                raise ValueError(f"--{'measure' if measure else 'json'} belongs to --dry-run: add it")
            check_tracker(log)
            chosen = options.number_of_devices(devices)
            with options.cooperating(distributed, coordinator, processes, process_id):
                from sparseopt import pruning

                recipes = options.recipes(getattr(pruning, recipe), given, several)
                varied = [name for name in several if len({getattr(each, name) for each in recipes}) > 1]
                named = "{1:g}" if len(several) == 1 else "{0}-{1:g}"
                names = ["-".join(named.format(name, getattr(each, name)) for name in varied) for each in recipes]
                plans = [(each, output_named(output, name)) for each, name in zip(recipes, names, strict=True)]
                if len({place for _, place in plans}) < len(plans):
                    raise ValueError(f"every model needs its own output, given {', '.join(str(p) for _, p in plans)}")
                opened = options.opened(source, follow_links)
                if not as_json:
                    for line in choice_lines(recipes[0], given):
                        console.say(line)
                if dry_run:
                    from sparseopt.shell.show_pruning import show_dry_run

                    for each, place in plans:
                        plan = pruning.dry_run(opened, place, each, memory=memory, devices=chosen, measure=measure)
                        show_dry_run(plan, as_json)
                    return
                code = run_pass(opened, plans, title, memory, chosen, log)
            if code:
                raise typer.Exit(code)

        command.__name__, command.__doc__ = title.__name__, title.__doc__
        lists = dict.fromkeys(several, f"Several, as in {example}, make a model each.")
        return options.takes_recipe(recipe, lists=lists)(command)

    return made


@makes_models(
    "Recipe", ("sparsity",), "0.5,0.6,0.7", "With several sparsities, each gets a subfolder, or a file beside it."
)
def prune(recipes: "Sequence[Recipe]") -> str:
    """Prune a causal language model one layer at a time and write a folder that transformers loads."""
    first, sparsities = recipes[0], [each.sparsity for each in recipes]
    asked = [f"{sparsity:.0%}" if sparsity or not first.has_support else "given zeros" for sparsity in sparsities]
    title = f"{' '.join(name_of(first))} {', '.join(asked)}"
    return title if first.pattern == "unstructured" else f"{title} {first.pattern}"


@makes_models(
    "ShrinkRecipe",
    ("channels", "heads", "layers"),
    "0.75,0.5",
    "With several fractions, each combination gets a subfolder, such as channels-0.75-layers-0.9.",
)
def shrink(recipes: "Sequence[ShrinkRecipe]") -> str:
    """Shrink a causal language model to a dense one with fewer channels, key-value groups, blocks or experts.

    The result is a folder that transformers and other runtimes load like any model of the family.
    """
    return "shrink"


def output_named(output: Path, name: str) -> Path:
    """The output of one of several models: a folder in a folder, a file beside a file; of a single one the output."""
    from sparseopt.pruning.run.output_form import is_file

    return output.with_stem(f"{output.stem}-{name}") if name and is_file(output) else output / name


def name_of(recipe: "PassRecipe") -> list[str]:
    """The effort and the method of a recipe as far as they are named; "good" where neither is."""
    return [str(name) for name in (recipe.effort, recipe.given("method")) if name is not None]


def choice_lines(recipe: "PassRecipe", typed: Mapping[str, Any]) -> list[str]:
    """What a recipe takes where nothing was `typed`, with its cost, a choice a line."""
    from sparseopt.layers.patterns import implied_sparsity
    from sparseopt.pruning import Recipe
    from sparseopt.pruning.recipe.effort import COSTS, PRUNES, SHRINKS

    if recipe.get("only_vocabulary"):
        return []
    lines, prunes = [], isinstance(recipe, Recipe)
    if (effort := recipe.effort) is not None:
        usual = "" if "effort" in typed else "default "
        costs = "; its time beside others: " + ", ".join(f"{name} {cost:g}" for name, cost in COSTS.items())
        lines.append(f"{usual}--effort {effort}: {(PRUNES if prunes else SHRINKS)[effort]}{costs * prunes}")
    if isinstance(recipe, Recipe) and "sparsity" not in typed and implied_sparsity(recipe.pattern) is None:
        lines.append(f"default --sparsity {recipe.sparsity:g}: that fraction of the weights of every linear layer")
    if recipe.draws:
        usual = "" if "calibration" in typed else "default "
        lines.append(
            f"{usual}--calibration self: text that the model draws, which needs no data; text like that which the "
            "model will see does better, --calibration file:PATH or hf:OWNER/NAME"
        )
    return lines


def run_pass(
    opened: "Source",
    plans: "Sequence[tuple[PassRecipe, Path]]",
    title: Callable[..., str],
    memory: str | None,
    devices: int | Literal["all"] | None,
    log: str | None,
) -> int:
    """Make the models of one command, each into its output, and show and log their progress and figures.

    Returns:
        The exit status: 0, or `RESUMABLE` after SIGTERM.
    """
    from sparseopt.pruning import Stopped, prune_model
    from sparseopt.pruning.pipeline import checked
    from sparseopt.pruning.run.output_form import run_folder_of
    from sparseopt.shell.prune_progress import PruneProgress
    from sparseopt.shell.show_pruning import show_report
    from sparseopt.system.processes import is_first

    # What is wrong with any of them is said before the first one's work.
    for recipe, output in plans[1:]:
        checked(opened, output, recipe, memory, devices)
    console.stop.words = functools.partial(kept, [run_folder_of(output.expanduser()) for _, output in plans])
    slow, whole = plans[0][0].effort in ("good", "most"), title([recipe for recipe, _ in plans])
    with Tracked(log if is_first() else None, whole, parameters(opened.name, plans)) as tracked, stop_asked() as stop:
        for recipe, output in plans:
            name = title([recipe])
            if len(plans) > 1 and name == whole:
                name = f"{name} {output.name}"
            try:
                with PruneProgress(name, faster=slow) as progress:

                    def observe(*event: Any, progress: PruneProgress = progress) -> None:
                        progress(*event)
                        tracked(*event)

                    report = prune_model(
                        opened, output, recipe, observer=observe, stop=stop, memory=memory, devices=devices
                    )
            except Stopped as stopped:
                if is_first():
                    console.say(f"\n{stopped}", console.errors)
                return RESUMABLE
            page, summary = show_report(report), report.summary()
            figures = {name: summary[name] for name in LOGGED}
            for number, score in enumerate(report.scores, 1):
                figures |= {f"perplexity_{number}_before": score.before, f"perplexity_{number}_after": score.after}
            prefix = f"{report.output.name}/" if len(plans) > 1 else ""
            tracked.log({prefix + name: value for name, value in figures.items()})
            tracked.keep(page)
    return 0


def parameters(source: str, plans: "Sequence[tuple[PassRecipe, Path]]") -> dict[str, Any]:
    """What a command is logged with: the source, and the fields of its recipes; a list where they differ."""
    fields = [{"source": source} | recipe.model_dump(mode="json", exclude_none=True) for recipe, _ in plans]
    return {
        name: value if all(each.get(name) == value for each in fields) else [each.get(name) for each in fields]
        for name, value in fields[0].items()
    }


def kept(folders: Sequence[Path]) -> str:
    """What Ctrl-C leaves of runs in these folders."""
    if not any((folder / RUN).is_file() for folder in folders):
        return console.NOTHING
    shards = [shard for folder in folders for shard in folder.glob("*-*") if shard.suffix in SHARDS]
    where = ", ".join(map(str, folders))
    if not shards:
        return f"stopped: no shard in {where} is finished yet. Run the same command again"
    return (
        f"stopped: {len(shards)} finished shards in {where} are whole and stay there. "
        "Run the same command again to resume after them"
    )


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


@options.takes_recipe(only=[*options.READING, "targets", "ignore"])
def evaluate(
    model: options.Source,
    text: Annotated[str, typer.Option(help=options.TEXT_HELP)] = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows from the start of the evaluation text.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    pattern: Annotated[
        str | None, typer.Option(help="Also check that every layer has this pattern, as in `sparseopt prune`.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="The pattern's fraction of zeros; implied by n:m.")] = None,
    follow_links: options.FollowLinks = False,
    as_json: options.AsJson = False,
    **given: Any,
) -> None:
    """Measure the token-level perplexity of a model, and the exact sparsity of its layers."""
    from sparseopt.models import check_window, open_any
    from sparseopt.pruning import Recipe, audit_pattern, audit_sparsity, perplexity
    from sparseopt.pruning.run.plan import layer_shares
    from sparseopt.pruning.text.documents import part_of_text
    from sparseopt.pruning.text.windows import begin_windows, text_windows, token_digest

    if sparsity is not None and pattern is None:
        raise ValueError("--sparsity is that of a pattern to check: give --pattern too, as in --pattern unstructured")
    opened = open_any(options.opened(model, follow_links))
    reading = {name: given.pop(name) for name in options.READING if name in given}
    chosen = layer_shares(opened, Recipe(**given))
    check_window(seqlen, opened.config.max_positions)
    ids, start = text_windows(opened.source, text, "evaluation", windows, seqlen, **reading)
    digest = token_digest(begin_windows(ids, start))
    found = audit_pattern(opened, pattern, sparsity, chosen) if pattern else []
    broken = [a for a in found if not a.fits]
    if broken:
        first = broken[0]
        raise RuntimeError(
            f"{len(broken)} of {len(found)} linear layers break the pattern {pattern!r}; {first.layer} holds up to "
            f"{first.most:,} {first.unit}, allowed are {first.allowed:,}"
        )
    with console.block_progress("perplexity") as progress:
        score = perplexity(opened, ids, bos=start, observer=progress)
    audits = audit_sparsity(opened, chosen)
    zeros, size = sum(a.zeros for a in audits), sum(a.size for a in audits)
    exact = sum(a.exact for a in found)
    if as_json:
        found_pattern = {"pattern": pattern, "exact": exact} if pattern else {}
        figures = {
            "model": model, "text": text, "windows": windows, "seqlen": seqlen, "bos": start, "digest": digest,
            "perplexity": score,
            "zeros": zeros, "size": size, "sparsity": zeros / size, "layers": {a.layer: a.zeros for a in audits},
            **found_pattern,
        }  # fmt: skip
        # JSON has no NaN and no infinity.
        typer.echo(json.dumps({**figures, "perplexity": score if math.isfinite(score) else None}))
        return
    least, most = min(audits, key=lambda a: a.sparsity), max(audits, key=lambda a: a.sparsity)
    read = part_of_text(text, "evaluation", reading.get("split"))
    console.say(
        f"perplexity {score:.4f} on {windows} windows of {seqlen} tokens of {read}"
        + ("" if start is None else f", each starting with BOS (token {start})")
        + f"; digest {digest}"
    )
    console.say(
        f"sparsity {zeros / size:.6f}: {zeros:,} zeros of {size:,} weights in {len(audits)} linear layers "
        f"(from {least.sparsity:.6f} in {least.layer} to {most.sparsity:.6f} in {most.layer})"
    )
    if pattern:
        console.say(f"pattern {pattern} holds in all {len(found)} linear layers, exact in {exact}")
