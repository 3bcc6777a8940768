"""A comparison of pruning methods: cells of method, pattern and sparsity, each a run of the task `prune`.

    OUTPUT/cells/method=dense/                 the dense model, always measured, first
    OUTPUT/cells/method=wanda,pattern=2_4/     one run folder for each cell, see `runs`
    OUTPUT/comparison.csv, .md, .png           the table and the picture of all finished cells

The cells of a folder differ only in method, pattern and sparsity, so their figures can be compared.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from sparseopt.core.base.types import Observer
from sparseopt.experiments import plots
from sparseopt.experiments.config import Run, expand
from sparseopt.experiments.names import AllowCode
from sparseopt.experiments.report import Row, Section, markdown, write_csv
from sparseopt.experiments.runs import (
    CONFIG,
    Outcome,
    Planned,
    State,
    can_draw,
    check_all,
    fingerprint,
    load_run,
    plan,
    run_all,
)
from sparseopt.experiments.task import FinishedRun
from sparseopt.experiments.tasks.prune import Prune
from sparseopt.layers.patterns import implied_sparsity
from sparseopt.pruning import METHODS
from sparseopt.pruning.recipe.effort import PRUNE
from sparseopt.pruning.text.documents import part_of_text
from sparseopt.system.run_folder import RUN, SUMMARY, Fingerprint, contents, differences, read_start

CELLS = "cells"
# Seconds of the method itself; forward passes and compilation are common to all.
TIMES = ("solver_seconds", "survey_seconds", "reconstruction_seconds")
# What may differ between the cells of one folder.
OWN_SETTINGS = {"effort", "method", "preset", "pattern", "sparsity"}
COLUMNS = (
    "perplexity", "mean_relative_error", "mean_heldout_error", "solver_seconds", "survey_seconds",
    "reconstruction_seconds", "whole_seconds", "peak_memory_GiB",
    "error",
)  # fmt: skip


def read_lists(methods: str, sparsity: str, pattern: str) -> tuple[list[str], list[float], list[str]]:
    """The three comma-separated lists of a command line; `build` checks what is in them.

    Raises:
        ValueError: listing every empty place, every sparsity outside [0, 1), and "dense".
    """
    names, shares, patterns = ([word.strip() for word in text.split(",")] for text in (methods, sparsity, pattern))
    mistakes = [
        f"{option}: an empty place in {words}; expected a comma-separated list such as {example}"
        for option, words, example in (
            ("--methods", names, "good,maiht:paper,wanda"),
            ("--sparsity", shares, "0.5,0.6"),
            ("--pattern", patterns, "unstructured,2:4"),
        )
        if not all(words)
    ]
    numbers = []
    for word in filter(None, shares):
        with contextlib.suppress(ValueError):
            numbers.append(float(word))
            if 0 <= numbers[-1] < 1:
                continue
        mistakes.append(f"--sparsity: expected shares of zeros in [0, 1), as in 0.5,0.6, given {word}")
    if "dense" in names:
        mistakes.append("--methods: dense is always measured, as the first row; leave it out")
    if mistakes:
        raise ValueError("\n  ".join(("the comparison cannot be used:", *mistakes)))
    return names, numbers, patterns


def build(
    source: str,
    methods: Sequence[str],
    shares: Sequence[float],
    patterns: Sequence[str],
    *,
    allow_code: AllowCode = False,
    ridge: float | None = None,
    **common: Any,
) -> list[Run]:
    """The runs of a comparison: the dense model, then every method with every pattern and share, in this order.

    A method is an effort, a name in `METHODS`, `maiht:paper` for a preset, or the path of your own. An n:m pattern has
    its own sparsity and makes one cell, unless `allocation` is "curves". `common` are settings of the task `prune` that
    all cells share; a ridge goes to the methods that have one.

    Raises:
        ConfigError: listing all settings that cannot be used, with the nearest known name.
    """
    cells: list[dict[str, Any]] = [{"method": "dense"}]
    for method in methods:
        settings = _method_settings(method)
        for pattern in patterns:
            # Curves choose the linears that get an n:m pattern, so that a sparsity below its own means something.
            implied = implied_sparsity(pattern) is not None and common.get("allocation") != "curves"
            points: list[dict[str, Any]] = [{}] if implied else [{"sparsity": share} for share in shares]
            cells += [{**settings, "pattern": pattern, **point} for point in points]
    title = f"Pruning methods compared on {source}"
    values = {"name": CELLS, "title": title, "task": "prune", "source": source, **common}
    runs = expand({**values, "sweep": {"list": cells}}, source="the comparison", allow_code=allow_code)
    for at, run in enumerate(runs):
        if _takes_ridge(run.settings.get("method")):
            runs[at] = replace(run, task=run.task.model_copy(update={"ridge": ridge}))
    return runs


def _method_settings(word: str) -> dict[str, str]:
    """The settings that an effort, `METHOD` or `METHOD:PRESET` names; the method's own preset is left out."""
    if word in PRUNE:
        return {"effort": word}
    method, colon, preset = word.partition(":")
    named = METHODS.get(method)
    if not colon or (named and named.presets.get(preset) == named.method):
        return {"method": method}
    return {"method": method, "preset": preset}


def method_name(task: Prune) -> str:
    """The name of the effort or of the method on the command line."""
    return task.method_label if task.preset is None else f"{task.method_label}:{task.preset}"


def _takes_ridge(method: Any) -> bool:
    """False for those of our methods that have no ridge; they stand beside the others without one."""
    return not isinstance(method, str) or method not in METHODS or hasattr(METHODS[method].method, "ridge")


def prepare(runs: Sequence[Run], output: Path) -> list[Planned]:
    """The plan of a comparison in a folder that is new or holds cells with the same settings, checked by `check_all`.

    Raises:
        ValueError: listing how the cells in the folder differ, or what the model or the texts do not allow.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give --output a folder that is new or holds this comparison")
    if contents(output) and not (output / CELLS).is_dir():
        raise ValueError(f"{output} holds no comparison and is not empty; give another --output or empty it")
    planned = plan(runs, output)
    _check_folder(planned, output)
    check_all(planned, again=False)
    return planned


def _check_folder(planned: Sequence[Planned], output: Path) -> None:
    # The dense model, which comes first, reads no calibration text.
    wanted = fingerprint(planned[min(1, len(planned) - 1)].run.task)
    mistakes: dict[str, None] = {}
    for folder in cell_folders(output):
        found = read_start(folder)["fingerprint"]
        # The others are those of the dense cell, which is in every comparison.
        read = {"calibration", "masks"} & found["inputs"].keys() & wanted["inputs"].keys()
        here = _common(wanted, read)
        if not _takes_ridge(found["settings"]["method"]):
            here["ridge"] = None
        mistakes |= dict.fromkeys(differences(_common(found, read), here))
    if mistakes:
        raise ValueError(
            "\n  ".join((
                f"{output} holds a comparison with other settings:", *mistakes,
                "give another --output, or use the settings and the version of this one",
            ))
        )  # fmt: skip
    if others := [p.why for p in planned if p.state is State.OTHER]:
        raise ValueError("\n  ".join((*others, "remove these folders or give another --output")))


def _common(found: Fingerprint, read: Collection[str]) -> Fingerprint:
    """What the cells of a comparison share; `read` names the inputs among it."""
    settings = {name: value for name, value in found["settings"].items() if name not in OWN_SETTINGS}
    return {**settings, "code": found["code"], **{f"inputs.{name}": found["inputs"][name] for name in read}}


def measure(
    planned: Sequence[Planned],
    output: Path,
    observer: Callable[[Planned], Observer],
    ended: Callable[[Planned, Outcome], None] = lambda planned, outcome: None,
) -> list[Outcome]:
    """Run all cells; one that fails does not stop the others. Arguments as in `run_all`."""

    def start(cell: Planned) -> Observer:
        _restart_peak_memory()
        return observer(cell)

    return run_all(planned, output, start, ended=ended)


def _restart_peak_memory() -> None:
    """Reset the peak of this process's memory; otherwise each cell would show the largest one so far."""
    # Only Linux can do this; elsewhere the peaks rise from row to row, as `head` says.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def cell_folders(output: Path) -> list[Path]:
    """Folders of the cells that were started, oldest first; one without a config holds no work yet."""
    starts = sorted((output / CELLS).glob(f"*/{RUN}"), key=lambda file: (file.stat().st_mtime, file.parent.name))
    return [file.parent for file in starts if (file.parent / CONFIG).is_file()]


def tabulate(
    planned: Sequence[Planned], outcomes: Sequence[Outcome], output: Path, allow_code: AllowCode = False
) -> Section:
    """The table: the planned cells in their order, failed ones with their reason, then the folder's other cells."""
    rows, runs = [], []
    errors = {outcome.folder: outcome.error for outcome in outcomes if outcome.error}
    tasks = {p.folder: cast(Prune, p.run.task) for p in planned}
    others = [f for f in cell_folders(output) if f not in tasks and (f / SUMMARY).is_file()]
    for folder in [*tasks, *others]:
        if folder in errors:
            task, figures = tasks[folder], {"error": " ".join(errors[folder].split())}
            sparsity = task.recipe().asked_sparsity
        else:
            try:
                finished = load_run(folder, allow_code)
            except ValueError as error:
                if folder in tasks:
                    raise
                # Of an earlier call: what this one has computed is told all the same.
                unknown = {"method": folder.name, "pattern": None, "sparsity": None}
                rows.append(Row(unknown, {"error": " ".join(str(error).split())}, {}, 1, folder))
                continue
            runs.append(finished)
            task, figures = finished.task, _figures(finished)
            sparsity = finished.records[0]["sparsity"]
        pattern = None if task.method == "dense" else task.pattern
        labels = {"method": method_name(task), "pattern": pattern, "sparsity": sparsity}
        rows.append(Row(labels, figures, {}, 1, folder))
    return Section("comparison", "Perplexity, layer errors, time and memory", COLUMNS, rows, None, runs)


def _figures(finished: FinishedRun) -> dict[str, Any]:
    """The figures of a finished row, and what they were measured with; the dense model has only a perplexity."""
    (record,) = finished.records
    start = read_start(finished.folder)
    machine = start["machine"]
    figures = {
        # In a record, null is a figure that was not finite.
        "perplexity": "not finite" if record["perplexity"] is None else record["perplexity"],
        "machine": f"{machine['system']}, {machine['cores']} cores, {' '.join(machine['devices'])}",
        "versions": ", ".join(f"{name} {number}" for name, number in start["versions"].items()),
    }
    if "layers" not in record:
        return figures
    recipe = finished.task.recipe()
    moved = f", {recipe.propagated_share:g} of the upstream error corrected" if recipe.propagated_share else ""
    return figures | {
        **{name: record[name] for name in ("mean_relative_error", "mean_heldout_error", *TIMES)},
        "whole_seconds": record["seconds"],
        "peak_memory_GiB": record["peak_memory_bytes"] / 2**30,
        # What the layer errors are relative to.
        "errors": f"{recipe.weighting} tokens{moved}",
    }


def head(section: Section, task: Prune) -> list[str]:
    """What was run, in lines for the top of the table: model, texts and tokens, versions and machine."""
    ridge = "" if task.ridge is None else f", ridge {task.ridge:g}"
    seed = "" if task.seed is None else f", seed {task.seed}"
    start, tokens = _start_token(section), task.evaluation_windows * task.evaluation_seqlen
    samples = _samples(section, task)
    lines = [
        f"model: {task.source}" + ("" if start is None else f", every window starts with its BOS (token {start})"),
        f"calibration: {part_of_text(task.calibration, 'calibration', task.split)}, {samples} x {task.seqlen} = "
        f"{samples * task.seqlen:,} tokens, and {task.heldout_samples * task.seqlen:,} held out; "
        f"{task.recipe().window_choice} windows{seed}{ridge}",
        f"evaluation: {part_of_text(task.evaluation, 'evaluation', task.reading('evaluation').get('split'))}, "
        f"{task.evaluation_windows} x {task.evaluation_seqlen} = {tokens:,} tokens",
    ]
    kinds = _grouped(section, ("errors",), lambda row: row.labels["method"])
    if len(kinds) > 1:
        each = "; ".join(f"{kind}: {names}" for (kind,), names in kinds.items())
        lines.append(f"layer errors compare only within one kind ({each})")
    elif kinds:
        lines.append(f"layer errors: {next(iter(kinds))[0]}")
    machines = _grouped(section, ("machine", "versions"), _row_name)
    for (machine, packages), names in machines.items():
        which = f" ({names})" if len(machines) > 1 else ""
        lines.append(f"measured on: {machine}, with {packages}{which}")
    return [
        *lines,
        "seconds: of the solver, and of the whole pass with compilation and forward passes, which cells of the same "
        "tokens share",
        "peak memory: of the process in that pass; outside Linux, in that pass and the earlier ones",
    ]


def _grouped(section: Section, figures: tuple[str, ...], name: Callable[[Row], str]) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for row in section.rows:
        if all(figure in row.figures for figure in figures):
            found.setdefault(tuple(row.figures[figure] for figure in figures), {})[name(row)] = None
    return {key: ", ".join(names) for key, names in found.items()}


def _start_token(section: Section) -> int | None:
    """The BOS at the start of every window, which all cells share; None for none."""
    return next((record["bos"] for run in section.runs for record in run.records), None)


def _samples(section: Section, task: Prune) -> int:
    """The calibration windows of every pruned cell; where their number was not given, a finished cell has it."""
    found = (record["samples"] for run in section.runs for record in run.records if "samples" in record)
    return task.samples or next(found, task.recipe().window_count)


def _row_name(row: Row) -> str:
    return " ".join(f"{value:.4g}" if isinstance(value, float) else value for value in row.labels.values() if value)


def write(section: Section, task: Prune, output: Path) -> list[Path]:
    """Write `comparison.csv`, `comparison.md` and, with matplotlib, `comparison.png`, over those of an earlier call.

    The task is that of any cell, for what all have in common.
    """
    table, text = output / "comparison.csv", output / "comparison.md"
    common = {
        "model": task.source,
        "calibration": task.calibration,
        "calibration_tokens": _samples(section, task) * task.seqlen,
        "heldout_tokens": task.heldout_samples * task.seqlen,
        "bos": _start_token(section),
        "windows": task.recipe().window_choice,
        "seed": task.seed,
        "ridge": task.ridge,
        "evaluation": task.evaluation,
        "evaluation_tokens": task.evaluation_windows * task.evaluation_seqlen,
    }
    names = [*section.labels(), *COLUMNS, "errors", *common, "machine", "versions", "folder"]
    folders = [row.folder.relative_to(output).as_posix() for row in section.rows]
    rows = [{**r.labels, **r.figures, **common, "folder": f} for r, f in zip(section.rows, folders, strict=True)]
    write_csv(table, names, rows)
    pictures = _draw(section, task.title, output / "comparison.png")
    lines = "\n".join(f"* {line}" for line in head(section, task))
    text.write_text(f"# {task.title}\n\n{lines}\n\n{markdown(section, pictures)}\n", encoding="utf-8")
    return [table, text, *pictures]


def _draw(section: Section, title: str, file: Path) -> list[Path]:
    """The picture; none without matplotlib or without a finished pruned cell."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    dense = None
    for row in section.rows:
        score = row.figures.get("perplexity")
        score = score if isinstance(score, float) else float("nan")
        if row.labels["method"] == "dense":
            dense = score
        elif "solver_seconds" in row.figures:
            label = " ".join(row.labels[key] for key in ("method", "pattern") if row.labels[key] != "unstructured")
            curves.setdefault(label, []).append((row.labels["sparsity"], score, sum(row.figures[t] for t in TIMES)))
    if not curves or not can_draw():
        return []
    lines = {label: tuple(np.array(sorted(points)).T) for label, points in curves.items()}
    return [plots.save_figure(plots.plot_comparison(lines, dense=dense), file, title)]
