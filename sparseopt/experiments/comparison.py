"""Floor 7: pruning methods side by side: cells of method, pattern and sparsity, each a run of the task `prune`.

    OUTPUT/cells/method=dense/                 the model as it is, always measured, first
    OUTPUT/cells/method=wanda,pattern=2_4/     one run folder a cell, as in `runs`
    OUTPUT/comparison.csv, .md, .png           the table and the picture of all finished cells

The cells of a folder differ in method, pattern and sparsity alone, so their figures may be compared.
"""

import contextlib
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from sparseopt.experiments.config import Run, expand
from sparseopt.experiments.names import AllowCode
from sparseopt.experiments.report import Row, Section, markdown
from sparseopt.experiments.runs import CONFIG, HEADER, SUMMARY, Outcome, State, code_digest, load_run
from sparseopt.experiments.sweep import Planned, check_all, plan, run_all
from sparseopt.experiments.task import FinishedRun, Observer
from sparseopt.experiments.task_prune import Prune
from sparseopt.experiments.yaml_file import read_yaml
from sparseopt.pruning import METHODS, Recipe
from sparseopt.pruning.patterns import check_pattern, implied_sparsity
from sparseopt.pruning.texts import part_of_text
from sparseopt.system.machine import versions

CELLS = "cells"
# What a method itself takes; forward passes and compilation are common to all.
TIMES = ("solver_seconds", "survey_seconds", "reconstruction_seconds")
PRESET = Prune.model_fields["preset"].default
# What may differ between the cells of one folder, and what says nothing about a result.
OWN_SETTINGS = {"task", "method", "preset", "pattern", "sparsity", "name", "title", "paper"}
COLUMNS = (
    "perplexity", "mean_relative_error", "mean_heldout_error", "solver_seconds", "survey_seconds",
    "reconstruction_seconds", "whole_seconds", "peak_memory_GiB",
    "error",
)  # fmt: skip


def read_lists(methods: str, sparsity: str, pattern: str) -> tuple[list[str], list[float], list[str]]:
    """The three lists of a command line, commas between.

    Raises:
        ValueError: listing all mistakes: an empty list or place, a value twice, no sparsity, no pattern.
    """
    mistakes: list[str] = []
    names = _words("--methods", methods, "best,maiht:paper,wanda", mistakes)
    patterns = _words("--pattern", pattern, "unstructured,2:4", mistakes)
    for word in patterns:
        try:
            check_pattern(word, 0.5 if implied_sparsity(word) is None else None)
        except ValueError as error:
            mistakes.append(f"--pattern: {error}")
    shares = []
    for word in _words("--sparsity", sparsity, "0.5,0.6", mistakes):
        try:
            shares.append(float(word))
        except ValueError:
            mistakes.append(f"--sparsity: expected shares of zeros in [0, 1), as in 0.5,0.6, given {word!r}")
            continue
        if not 0 <= shares[-1] < 1:
            mistakes.append(f"--sparsity: a share of zeros lies in [0, 1), given {word}; 0.5 keeps every second weight")
    if "dense" in names:
        mistakes.append("--methods: dense is always measured and stands first; leave it out")
    for option, words, values in (
        ("--methods", names, [_method_settings(name) for name in names]),
        ("--pattern", patterns, patterns),
        ("--sparsity", [f"{share:g}" for share in shares], shares),
    ):
        twice = [word for index, word in enumerate(words) if values[index] in values[:index]]
        mistakes += [f"{option}: {word} is given twice, under this name or another; leave one out" for word in twice]
    if mistakes:
        raise ValueError("\n  ".join(("the comparison cannot be used:", *mistakes)))
    return names, shares, patterns


def _words(option: str, text: str, example: str, mistakes: list[str]) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not any(words):
        mistakes.append(f"{option} is empty; expected a list with commas between, as in {example}")
    elif not all(words):
        mistakes.append(f"{option}: nothing stands between two commas or beside the outer one in {text!r}; expected "
                        f"a list such as {example}")  # fmt: skip
    return [word for word in words if word]


def build(
    source: str,
    methods: Sequence[str],
    sparsities: Sequence[float],
    patterns: Sequence[str],
    *,
    allow_code: AllowCode = False,
    **common: Any,
) -> list[Run]:
    """The runs of a comparison: the dense model, then every method with every pattern and sparsity, in this order.

    Args:
        source: as in the task `prune`.
        methods: names in `METHODS`, `maiht:paper` for a preset, or the path of a method of your own.
        sparsities: shares of zeros in [0, 1); an n:m pattern has its own and makes one cell.
        patterns: as in `sparseopt prune --pattern`.
        allow_code: whether to import methods that go by a path outside this package, as in `load_config`.
        common: settings of the task `prune` that all cells share; a ridge goes to the methods that have one.

    Raises:
        ConfigError: listing all settings that cannot be used, with the nearest known name.
    """
    cells: list[dict[str, Any]] = [{"method": "dense"}]
    for method in methods:
        settings = _method_settings(method)
        for pattern in patterns:
            shares: list[dict[str, Any]] = [{"sparsity": share} for share in sparsities]
            cells += [
                {**settings, "pattern": pattern, **share}
                for share in ([{}] if implied_sparsity(pattern) is not None else shares)
            ]
    title = f"Pruning methods side by side on {source}"
    values = {"name": CELLS, "title": title, "task": "prune", "source": source, **common}
    runs = expand({**values, "sweep": {"list": cells}}, source="the comparison", allow_code=allow_code)
    without = {"ridge": None}
    return [
        run if _takes_ridge(run.settings["method"]) else replace(run, task=run.task.model_copy(update=without))
        for run in runs
    ]


def _method_settings(word: str) -> dict[str, str]:
    """The settings that `METHOD` or `METHOD:PRESET` names; a preset that changes nothing is left out."""
    method, colon, preset = word.partition(":")
    presets = METHODS.get(method, {})
    if not colon or (preset in presets and presets[preset] is presets[PRESET]):
        return {"method": method}
    return {"method": method, "preset": preset}


def method_name(task: Prune) -> str:
    """The method as the command line names it."""
    name = task.method if isinstance(task.method, str) else task.method.name
    return name if task.preset == PRESET else f"{name}:{task.preset}"


def _takes_ridge(method: Any) -> bool:
    """False for those of our methods that have no ridge; they stand beside the others without one."""
    return not isinstance(method, str) or method not in METHODS or hasattr(METHODS[method][PRESET](), "ridge")


def prepare(runs: Sequence[Run], output: Path) -> list[Planned]:
    """The plan of a comparison, after all was checked that could stop it.

    Args:
        runs: from `build`.
        output: the comparison's folder, new or holding cells with the same settings.

    Raises:
        ValueError: saying how the folder's cells differ, or listing what the model or the texts cannot do.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give --output a folder that is new or holds this comparison")
    planned = plan(runs, output)
    _check_folder(planned, output)
    check_all(planned, again=False)
    return planned


def _check_folder(planned: Sequence[Planned], output: Path) -> None:
    """Refuse a folder whose cells were made with other settings or by another version."""
    given = planned[0].run.task.model_dump(mode="json")
    mistakes: dict[str, None] = {}
    for folder in cell_folders(output):
        header = _header(folder)
        there, _ = read_yaml(folder / CONFIG)
        here = given if _takes_ridge(there.get("method")) else {**given, "ridge": None}
        for name in here:
            if name not in OWN_SETTINGS and there.get(name) != here[name]:
                mistakes[f"{name}: {_shown(there.get(name))} there, {_shown(here[name])} given"] = None
        if header["code"] != code_digest():
            old, new = header["versions"].get("sparseopt"), versions().get("sparseopt")
            mistakes[f"sparseopt itself: {old} there, {'other code of ' if old == new else ''}{new} here"] = None
    if mistakes:
        raise ValueError(
            "\n  ".join((
                f"{output} holds a comparison with other settings:", *mistakes,
                "give another --output, or go on with the settings and the version that are there",
            ))
        )  # fmt: skip
    strange = [str(p.folder) for p in planned if p.state is State.OTHER]
    if strange:
        raise ValueError(
            f"{', '.join(strange)}: not what this command would have written there (no readable {HEADER}, or the file "
            "of a class of yours has changed); remove this or give another --output"
        )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _header(folder: Path) -> dict[str, Any]:
    """What a cell's start wrote: versions, machine, code."""
    try:
        return json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{folder / HEADER} is no JSON text; remove the folder to measure this cell anew") from None


def measure(
    planned: Sequence[Planned],
    output: Path,
    observer: Callable[[Planned], Observer],
    ended: Callable[[Planned, Outcome], None] = lambda planned, outcome: None,
) -> list[Outcome]:
    """Bring all cells to their end; one that fails does not stop the others. Arguments as in `run_all`."""

    def start(cell: Planned) -> Observer:
        _restart_peak_memory()
        return observer(cell)

    return run_all(planned, output, start, ended=ended)


def _restart_peak_memory() -> None:
    """Let the peak of this process's memory begin anew, or the largest cell so far would show in all that follow."""
    # Linux alone can do this; elsewhere the table's peaks rise from row to row, which its header says.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def cell_folders(output: Path) -> list[Path]:
    """Folders of the cells that were started, oldest first; without a config nothing has been done in one."""
    headers = sorted((output / CELLS).glob(f"*/{HEADER}"), key=lambda file: (file.stat().st_mtime, file.parent.name))
    return [header.parent for header in headers if (header.parent / CONFIG).is_file()]


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
            sparsity = implied_sparsity(task.pattern) if task.sparsity is None else task.sparsity
        else:
            finished, _ = load_run(folder, allow_code)
            runs.append(finished)
            task, figures = cast(Prune, finished.task), _figures(finished)
            sparsity = finished.records[0]["sparsity"]
        pattern = None if task.method == "dense" else task.pattern
        labels = {"method": method_name(task), "pattern": pattern, "sparsity": sparsity}
        rows.append(Row(labels, figures, {}, 1, folder))
    return Section("comparison", "Perplexity, layer errors, time and memory", COLUMNS, rows, None, runs)


def _figures(finished: FinishedRun) -> dict[str, Any]:
    """The figures of a finished row, and what they were measured with; the dense model has a perplexity alone."""
    (record,) = finished.records
    header = _header(finished.folder)
    machine = header["machine"]
    figures = {
        # A record's null is a figure that was not finite.
        "perplexity": "not finite" if record["perplexity"] is None else record["perplexity"],
        "machine": f"{machine['system']}, {machine['cores']} cores, {' '.join(machine['devices'])}",
        "versions": ", ".join(f"{name} {number}" for name, number in header["versions"].items()),
    }
    if "layers" not in record:
        return figures
    return figures | {
        **{name: record[name] for name in ("mean_relative_error", "mean_heldout_error", *TIMES)},
        "whole_seconds": record["seconds"],
        "peak_memory_GiB": record["peak_memory_bytes"] / 2**30,
        "errors": _errors(cast(Prune, finished.task).recipe()),
    }


def _errors(recipe: Recipe) -> str:
    """What a run's layer errors are relative to."""
    moved = f", {recipe.propagated_share:g} of the earlier error made up for" if recipe.propagated_share else ""
    return f"{recipe.weighting} tokens{moved}"


def head(section: Section, task: Prune) -> list[str]:
    """What was run, in lines that stand above the table: model, texts and tokens, versions and machine."""
    ridge = "" if task.ridge is None else f", ridge {task.ridge:g}"
    start = _start_token(section)
    lines = [
        f"model: {task.source}" + ("" if start is None else f", every window starts with its BOS (token {start})"),
        f"calibration: {part_of_text(task.calibration, 'calibration')}, {task.samples} x {task.seqlen} = "
        f"{task.samples * task.seqlen:,} tokens, and {task.heldout_samples * task.seqlen:,} held out; "
        f"seed {task.seed}{ridge}",
        f"evaluation: {part_of_text(task.evaluation, 'evaluation')}, {task.windows} x {task.evaluation_seqlen} = "
        f"{task.windows * task.evaluation_seqlen:,} tokens",
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
        "seconds: of the solver alone; of the whole pruning, with compiling and forward passes",
        "peak memory: of the process in that cell; outside Linux, in that cell and those run before it",
    ]


def _grouped(section: Section, figures: tuple[str, ...], name: Callable[[Row], str]) -> dict[tuple[str, ...], str]:
    """The names of the rows that have these figures, by them."""
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for row in section.rows:
        if all(figure in row.figures for figure in figures):
            found.setdefault(tuple(row.figures[figure] for figure in figures), {})[name(row)] = None
    return {key: ", ".join(names) for key, names in found.items()}


def _start_token(section: Section) -> int | None:
    """The BOS in front of every window, the same in all cells, of one model by one setting; None for none."""
    return next((record["bos"] for run in section.runs for record in run.records), None)


def _row_name(row: Row) -> str:
    return " ".join(f"{value:.4g}" if isinstance(value, float) else value for value in row.labels.values() if value)


def write(section: Section, task: Prune, output: Path) -> list[Path]:
    """Write `comparison.csv`, `comparison.md` and, with matplotlib, `comparison.png`; what was there is replaced.

    Args:
        section: from `tabulate`.
        task: of one cell, for what all have in common.
        output: the comparison's folder.
    """
    table, text = output / "comparison.csv", output / "comparison.md"
    common = {
        "model": task.source,
        "calibration": task.calibration,
        "calibration_tokens": task.samples * task.seqlen,
        "heldout_tokens": task.heldout_samples * task.seqlen,
        "bos": _start_token(section),
        "seed": task.seed,
        "ridge": task.ridge,
        "evaluation": task.evaluation,
        "evaluation_tokens": task.windows * task.evaluation_seqlen,
    }
    with table.open("w", newline="", encoding="utf-8") as stream:
        names = [*section.labels(), *COLUMNS, "errors", *common, "machine", "versions", "folder"]
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        for row in section.rows:
            writer.writerow(
                {**row.labels, **row.figures, **common, "folder": row.folder.relative_to(output).as_posix()}
            )
    pictures = _draw(section, task.title, output / "comparison.png")
    lines = "\n".join(f"* {line}" for line in head(section, task))
    text.write_text(f"# {task.title}\n\n{lines}\n\n{markdown(section, pictures)}\n", encoding="utf-8")
    return [table, text, *pictures]


def _draw(section: Section, title: str, file: Path) -> list[Path]:
    """The picture; none without matplotlib, or without a pruned cell that is finished."""
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
    if not curves:
        return []
    try:
        import matplotlib
    except ModuleNotFoundError:
        return []
    matplotlib.use("Agg", force=False)
    from sparseopt.experiments import plots

    lines = {label: tuple(np.array(sorted(points)).T) for label, points in curves.items()}
    return [plots.save_figure(plots.plot_comparison(lines, dense=dense), file, title)]
