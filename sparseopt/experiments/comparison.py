"""A comparison of pruning methods: a sweep of the task `prune` over method, pattern and sparsity, and its table.

    OUTPUT/run.json                            what all cells share: settings, code and texts
    OUTPUT/cells/method=dense/                 the dense model, always measured, first
    OUTPUT/cells/method=wanda,pattern=2_4/     one run folder for each cell, see `runs`
    OUTPUT/comparison.csv, .md, .png           the table and the figure of all finished cells
    OUTPUT/report.html                         the same as one page

The cells of a folder differ only in method, pattern and sparsity, so their figures can be compared; later calls add
cells.
"""

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from sparseopt.experiments import plots
from sparseopt.experiments.config import Run, expand
from sparseopt.experiments.names import AllowCode, worded
from sparseopt.experiments.report import ERROR, Row, Section, page_of, with_errors
from sparseopt.experiments.runs import Outcome, Planned, can_draw, check_all, fingerprint, load_run, plan
from sparseopt.experiments.task import FinishedRun
from sparseopt.experiments.tasks.model import TIMES, model_path
from sparseopt.experiments.tasks.prune import Prune
from sparseopt.layers.patterns import implied_sparsity
from sparseopt.models import open_any
from sparseopt.pruning import METHODS
from sparseopt.pruning.recipe.effort import PRUNE
from sparseopt.pruning.text.documents import part_of_text
from sparseopt.pruning.text.mix import read_mix
from sparseopt.pruning.text.windows import default_windows
from sparseopt.system.machine import environment_texts
from sparseopt.system.report import Fact, Figure, markdown
from sparseopt.system.run_folder import RUN, SUMMARY, State, contents, differences, read_start, write_start

CELLS, COMPARISON = "cells", "comparison"
CAPTION = "Perplexity, and the time of solver, survey and training, by sparsity"
# Settings that may differ between the cells of one folder.
OWN_SETTINGS = {"effort", "method", "preset", "pattern", "sparsity"}
# What all pruned cells read, besides the model.
TEXTS = {"calibration", "masks"}
COLUMNS = (
    "perplexity", "mean_relative_error", "mean_heldout_error", *TIMES, "whole_seconds", "peak_memory_GiB", "error",
)  # fmt: skip
COSTS = (
    Fact("seconds", "of the solver, and of the whole run with compilation and forward passes"),
    Fact("peak memory", "of the process in that run; outside Linux, in that run and the earlier ones"),
)


def read_lists(methods: str, sparsity: str, pattern: str) -> tuple[list[str], list[float], list[str]]:
    """Read the three comma-separated lists of a command line; `build` checks their contents.

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
    """The runs of a comparison: the dense model, then every method with every pattern and sparsity, in this order.

    A method is an effort, a name in `METHODS`, `maiht:paper` for a preset, or the path of your own method. An n:m
    pattern has its own sparsity and makes one cell, unless `allocation` is "curves". `common` has settings of the task
    `prune` that all cells share; a ridge is used by the methods that have one.

    Raises:
        ConfigError: listing all settings that cannot be used, with the nearest known name.
    """
    cells: list[dict[str, Any]] = [{"method": "dense"}]
    for method in methods:
        settings = _method_settings(method)
        if method == "most" and common.get("windows") is None:
            # As many as all others, where it would take more.
            model = open_any(model_path(source))
            settings["windows"] = default_windows(model, common.get("seqlen", Prune.model_fields["seqlen"].default))
        for pattern in patterns:
            # Curves choose the layers that get an n:m pattern, so a sparsity below the pattern's makes sense.
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


def _method_settings(word: str) -> dict[str, Any]:
    """The settings that an effort, `METHOD` or `METHOD:PRESET` names; the method's own preset is left out."""
    if word in PRUNE:
        return {"effort": word}
    method, colon, preset = word.partition(":")
    named = METHODS.get(method)
    if not colon or (named and named.presets.get(preset) == named.method):
        return {"method": method}
    return {"method": method, "preset": preset}


def method_name(task: Prune) -> str:
    """The effort or method as named on the command line."""
    return task.method_label if task.preset is None else f"{task.method_label}:{task.preset}"


def _takes_ridge(method: Any) -> bool:
    """False for methods of ours without a ridge; in a comparison they run without one."""
    return not isinstance(method, str) or method not in METHODS or hasattr(METHODS[method].method, "ridge")


def prepare(runs: Sequence[Run], output: Path) -> list[Planned]:
    """The plan of a comparison, checked by `check_all`; the folder is new or holds one with the same settings.

    Raises:
        ValueError: listing how the comparison in the folder differs, or what the model or the texts do not support.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give --output a folder that is new or holds this comparison")
    begun = read_start(output) if (output / RUN).is_file() else {}
    if contents(output) and begun.get("task") != COMPARISON:
        raise ValueError(f"{output} holds no comparison and is not empty; give another --output or empty it")
    # The dense model, which comes first, has the common ridge, and the others the calibration.
    shared, pruned = fingerprint(runs[0].task), fingerprint(runs[-1].task)["inputs"]
    wanted = {name: value for name, value in shared["settings"].items() if name not in OWN_SETTINGS}
    wanted |= {"code": shared["code"], "inputs": {name: value for name, value in pruned.items() if name in TEXTS}}
    if different := differences(begun.get("fingerprint", wanted), wanted):
        raise ValueError(
            "\n  ".join((
                f"{output} holds a comparison with other settings:", *different,
                "give another --output, or use the settings and the version of this one",
            ))
        )  # fmt: skip
    planned = plan(runs, output)
    if others := [p.why for p in planned if p.state is State.OTHER]:
        raise ValueError("\n  ".join((*others, "remove these folders or give another --output")))
    check_all(planned, again=False)
    if not begun:
        output.mkdir(parents=True, exist_ok=True)
        write_start(output, wanted, task=COMPARISON)
    return planned


def tabulate(
    planned: Sequence[Planned], outcomes: Sequence[Outcome], output: Path, allow_code: AllowCode = False
) -> Section:
    """The table: the planned cells in their order, failed ones with their reason, then the folder's other cells."""
    rows, runs = [], []
    errors = {outcome.folder: outcome.error for outcome in outcomes if outcome.error}
    tasks = {p.folder: cast(Prune, p.run.task) for p in planned}
    ended = sorted((output / CELLS).glob(f"*/{SUMMARY}"), key=lambda file: (file.stat().st_mtime, file.parent.name))
    for folder in dict.fromkeys([*tasks, *(file.parent for file in ended)]):
        labels: dict[str, Any] = {"method": folder.name, "pattern": None, "sparsity": None}
        try:
            if folder in errors:
                labels = _labels(tasks[folder], tasks[folder].recipe().sparsity)
                raise ValueError(errors[folder])
            finished = load_run(folder, allow_code)
        except ValueError as error:
            # A cell of an earlier call may be unreadable: the results of this call are reported all the same.
            figures: dict[str, Any] = {"error": " ".join(str(error).split())}
        else:
            runs.append(finished)
            labels = _labels(finished.task, finished.records[0]["sparsity"])
            figures = _figures(finished)
        rows.append(Row(labels, figures, {}, 1, folder))
    task = next(iter(tasks.values()))
    common = _common(task, runs)
    for row in rows:
        row.figures.update(common)
    columns = (COLUMNS[0], *dict.fromkeys(name for row in rows for name in with_errors(row.figures)), *COLUMNS[1:])
    return Section(COMPARISON, task.title, columns, rows, facts_of(task, common, rows), runs)


def _labels(task: Prune, sparsity: float) -> dict[str, Any]:
    pattern = None if task.is_dense else task.pattern
    return {"method": method_name(task), "pattern": pattern, "sparsity": sparsity}


def _figures(finished: FinishedRun) -> dict[str, Any]:
    """The figures of a finished row, and what they were measured with; the dense model has only scores."""
    (record,) = finished.records
    start = read_start(finished.folder)
    # In a record, null is a non-finite figure.
    judged = [name + end for name in with_errors(record) for end in ("", ERROR)]
    figures = {name: record[name] for name in (*COLUMNS, *judged) if name in record}
    figures["perplexity"] = "not finite" if record["perplexity"] is None else record["perplexity"]
    figures["machine"], figures["versions"] = environment_texts(start)
    if "layers" in record:
        recipe = finished.task.recipe()
        moved = f", {recipe.propagate:g} of the upstream error corrected" if recipe.propagate else ""
        # What the layer errors are relative to.
        figures["errors"] = f"{recipe.weighting} tokens{moved}"
        figures["whole_seconds"], figures["peak_memory_GiB"] = record["seconds"], record["peak_memory_bytes"] / 2**30
    return figures


def _common(task: Prune, runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """What all cells have in common, by its column."""
    records = [record for run in runs for record in run.records]
    # If the number of windows was not given, a finished cell has it.
    found = (record["windows"] for record in records if "windows" in record)
    windows = task.windows or next(found, task.recipe().window_count)
    return {
        "model": task.source,
        "calibration": task.calibration,
        "calibration_tokens": windows * task.seqlen,
        "heldout_tokens": task.heldout_windows * task.seqlen,
        "bos": next((record["bos"] for record in records), None),
        "window_choice": task.recipe().chosen_window_choice,
        "seed": task.seed,
        "ridge": task.ridge,
        "evaluation": task.evaluation,
        "evaluation_tokens": task.evaluation_windows * task.evaluation_seqlen,
    }


def facts_of(task: Prune, common: Mapping[str, Any], rows: Sequence[Row]) -> list[Fact]:
    """What was run: model, texts and tokens, versions and machine. `task` may be the task of any cell."""
    from pandas import DataFrame

    calibrated, split = common["calibration_tokens"], task.reading("evaluation").get("split")
    bos = "" if common["bos"] is None else f", every window starts with its BOS (token {common['bos']})"
    seed = "" if task.seed is None else f", seed {task.seed}"
    ridge = "" if task.ridge is None else f", ridge {task.ridge:g}"
    facts = [
        Fact("model", f"{task.source}{bos}"),
        Fact(
            "calibration",
            f"{part_of_text(read_mix(task.calibration), 'calibration', task.split)}, {calibrated // task.seqlen} x "
            f"{task.seqlen} = {calibrated:,} tokens, and {common['heldout_tokens']:,} held out; "
            f"{common['window_choice']} windows{seed}{ridge}",
        ),
        Fact(
            "evaluation",
            f"{part_of_text(task.evaluation, 'evaluation', split)}, {task.evaluation_windows} x "
            f"{task.evaluation_seqlen} = {common['evaluation_tokens']:,} tokens",
        ),
    ]
    if task.zero_shot:
        most = "all" if task.zero_shot_limit is None else f"the first {task.zero_shot_limit}"
        facts.append(Fact("tasks", f"{most} examples of {', '.join(task.zero_shot)}, with standard errors"))
    columns = ["method", "row", "errors", "machine", "versions"]
    named = [{"row": _row_name(row), "method": row.labels["method"], **row.figures} for row in rows]
    table = DataFrame(named, columns=columns)
    kinds = table.groupby("errors", sort=False)["method"].unique()
    if len(kinds) > 1:
        each = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
        facts.append(Fact("layer errors", f"compare only within one kind ({each})"))
    else:
        facts += [Fact("layer errors", kind) for kind in kinds.index]
    machines = table.groupby(["machine", "versions"], sort=False)["row"].agg(", ".join)
    for (machine, packages), names in machines.items():
        which = f" ({names})" if len(machines) > 1 else ""
        facts.append(Fact("measured on", f"{machine}, with {packages}{which}"))
    return [*facts, *COSTS]


def _row_name(row: Row) -> str:
    return " ".join(worded(value) for value in row.labels.values() if value)


def write(section: Section, output: Path) -> list[Path]:
    """Write `comparison.csv`, `comparison.md` and, with matplotlib, `comparison.png`, replacing earlier ones."""
    from pandas import DataFrame

    table, text, picture = (output / f"{COMPARISON}.{ending}" for ending in ("csv", "md", "png"))
    rows = [{**r.labels, **r.figures, "folder": r.folder.relative_to(output).as_posix()} for r in section.rows]
    columns = list(dict.fromkeys([*section.labels(), *COLUMNS, *(name for row in rows for name in row)]))
    DataFrame(rows, columns=columns, dtype=object).to_csv(table, index=False)
    axes = Prune.draw_perplexity([record for run in section.runs for record in run.records]) if can_draw() else None
    pictures = [] if axes is None else [plots.save_figure(axes, picture, section.title)]
    text.write_text(f"{markdown(section.report(_figures_in(pictures)))}\n", encoding="utf-8")
    return [table, text, *pictures]


def _figures_in(files: Sequence[Path]) -> list[Figure]:
    return [Figure(file, CAPTION) for file in files if file.suffix == ".png"]


def page(section: Section, files: Sequence[Path], source: str, command: str) -> str:
    """The text of report.html; `files` are the results of `write`."""
    steps = [
        Fact(f"sparseopt prune {shlex.quote(source)} --output FOLDER --method NAME", "makes the model of a row"),
        Fact("--methods NAME --sparsity SHARE", "in the same command adds rows; finished ones are kept"),
    ]
    return page_of(section.title, [section.report(_figures_in(files))], command, steps)
