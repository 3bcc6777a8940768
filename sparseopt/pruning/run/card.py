"""Descriptions of a finished run: README.md, its model card for the Hugging Face hub, and report.html."""

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from sparseopt.pruning.base.reports import PruneReport
from sparseopt.pruning.recipe.effort import prune_defaults, shrink_defaults
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.shrink_recipe import ShrinkRecipe
from sparseopt.pruning.run.facts import TOKEN_IDS, layer_table, linear_table, model_facts, run_facts
from sparseopt.pruning.run.output_form import is_file
from sparseopt.system.machine import versions
from sparseopt.system.report import Fact, Figure, Report, Table, bars, bullets, html_page

CARD = "README.md"
# Metadata of the source's card that also apply to the new model.
CARRIED = ("language", "license", "license_name", "license_link")
# Metadata are read up to this size; published cards have a hundredth of it.
MOST = 64 * 1024
# A text on this machine, as a recipe or a report names it.
_LOCAL_TEXT = re.compile(r"\b(?:file|jsonl|csv|parquet|wikitext2):(.+)$")
_OBJECTS = re.compile(rf"{TOKEN_IDS}|\d+ documents$")
PACKAGES = ("sparseopt", "jax", "transformers")

# The same for dense and packed folders, which `sparseopt pack` and `unpack` convert into each other.
LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

If its files are called `packed-*.safetensors`, write the dense model first: `sparseopt unpack PACKED --output FOLDER`.
`sparseopt eval FOLDER` measures its perplexity."""
LOADING_FILE = """```shell
llama-cli --model FILE.gguf
```

`sparseopt eval FILE.gguf` measures its perplexity."""


def model_card(report: PruneReport, files: Mapping[str, bytes]) -> str:
    """The text of the card, from the run's report and the card and licence among the source's files.

    Cards are published with their models, so only the last component of a local path is shown.
    """
    front = metadata_of(files.get(CARD, b""))
    kept = {name: front[name] for name in CARRIED if name in front}
    base = report.source.partition("@")[0] if report.revision else front.get("base_model")
    licence = next((name for name in sorted(files) if name.upper().startswith(("LICENSE", "LICENCE"))), None)
    if "license" not in kept and licence is not None:
        kept |= {"license": "other", "license_link": licence}
    smaller, pattern = report.shape is not None, report.recipe.get("pattern", "unstructured")
    pruned = bool(report.layers) or smaller
    tags = [
        "sparseopt",
        *["pruned"] * pruned,
        *["quantized"] * bool(report.grids),
        *([] if smaller or pattern == "unstructured" else [pattern]),
    ]
    name, found, file = source_name(report), versions(), is_file(report.output)
    head = {
        **({} if base is None else {"base_model": base}), **kept,
        "library_name": "gguf" if file else "transformers", "pipeline_tag": "text-generation", "tags": tags,
    }  # fmt: skip
    loading = LOADING_FILE if file else LOADING
    commit = f" (commit {report.revision})" if report.revision else ""
    terms = "The licence of the source applies." if "license" in kept else "The source names no licence."
    used = ", ".join(f"{package} {found[package]}" for package in PACKAGES if package in found)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {title_of(report)}\n\n"
        f"Made from {name}{commit}. {terms}\n\n## What was done\n\n```shell\n{command_of(report)}\n```\n\n"
        f"{bullets(model_facts(_published(report)), '-')}\n\n"
        f"## How to load it\n\n{loading}\n\n## Versions\n\n{used}, on {report.platform}.\n"
    )


def title_of(report: PruneReport) -> str:
    """The model's name, and what it became."""
    made = "smaller" if report.shape is not None else "pruned" if report.layers else "in few bits"
    return f"{source_name(report).rpartition('/')[2].partition('@')[0].removesuffix('.gguf')}, {made}"


def run_page(report: PruneReport, command: str, environment: Mapping[str, Any]) -> str:
    """The text of report.html: the contents of the card, the cost of the run, and every layer."""
    tables = [layer_table(report), linear_table("Every pruned layer", report.layers)] if report.layers else []
    tables += [linear_table("Every layer in few bits", report.grids)] if report.grids else []
    errors = dict[str, list[float]]()
    for record in report.layers or report.grids:
        errors.setdefault(f"block {record.block}", []).append(record.relative_error)
    drawn = bars({name: math.fsum(values) / len(values) for name, values in errors.items()})
    figures = [Figure(drawn, "Mean relative squared error of the layers' outputs in each block")] if errors else []
    first = Report(Table("What was done"), [*model_facts(report), *run_facts(report)], figures)
    return html_page(title_of(report), [first, *map(Report, tables)], command, environment, _steps(report))


def _steps(report: PruneReport) -> list[Fact]:
    output = shlex.quote(str(report.output))
    steps = [Fact(f"sparseopt eval {output} --text file:TEXT", "measures the perplexity on a text of yours")]
    if is_file(report.output):
        steps.append(Fact(f"llama-cli --model {output}", "runs it"))
    elif not report.recipe.get("pack"):
        steps.append(Fact(f"AutoModelForCausalLM.from_pretrained({str(report.output)!r})", "loads it in transformers"))
    if report.layers and report.recipe["effort"] != "most":
        steps.append(Fact("--effort most", "takes longer and usually loses less; it needs another --output"))
    return steps


def _published(report: PruneReport) -> PruneReport:
    """The report with only the last component of each local folder."""
    scores = tuple(replace(score, text=without_folders(score.text)) for score in report.scores)
    recipe = report.recipe | {"calibration": without_folders(str(report.recipe["calibration"]))}
    return replace(report, scores=scores, recipe=recipe)


def command_of(report: PruneReport) -> str:
    """The command of the run, with all options that differ from the defaults; objects as Python shows them."""
    smaller = report.shape is not None
    parts = ["sparseopt", "shrink" if smaller else "prune", source_name(report), "--output"]
    parts.append("FILE.gguf" if is_file(report.output) else "FOLDER")
    recipe, effort = report.recipe, report.recipe["effort"]
    kind, defaults = (ShrinkRecipe, shrink_defaults) if smaller else (Recipe, prune_defaults)
    usual = {name: field.default for name, field in kind.model_fields.items()}
    # Fields that were left open are recorded with the values of the effort, or of the method alone.
    usual |= defaults(recipe) | {"effort": "good" if effort else None}
    if effort is None:
        usual["method"] = None
    for name in kind.model_fields:
        value = recipe[name]
        if value == usual[name] or name == "pack" or _OBJECTS.match(str(value)):
            continue
        parts.append(f"--{name.replace('_', '-')}")
        if isinstance(value, tuple | list):
            # Sparsities are pairs.
            parts.append(",".join("=".join(map(str, e)) if isinstance(e, tuple | list) else str(e) for e in value))
        elif value is not True:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            local = name == "masks" and Path(text).expanduser().exists()
            parts.append(Path(text).name if local else without_folders(text))
    return shlex.join(parts)


def source_name(report: PruneReport) -> str:
    """The model that was pruned: its name on the hub, or the last component of its path."""
    return report.source if report.revision else Path(report.source).name


def without_folders(text: str) -> str:
    """A text such as `wikitext2:/data/text` with only the last part of its path; names and `file:a.txt` unchanged."""
    if found := _LOCAL_TEXT.search(text):
        return text[: found.start(1)] + Path(found[1]).name
    return Path(text).name if text.startswith(("/", "~", ".")) else text


def metadata_of(card: bytes) -> Mapping[str, str | list[str]]:
    """The texts and lists of texts in the YAML front matter of a model card; none if it is missing or damaged."""
    start, _, rest = card[:MOST].decode(errors="replace").replace("\r\n", "\n").partition("---\n")
    text, end, _ = rest.partition("\n---")
    if start.strip("\ufeff") or not end:
        return {}
    try:
        found: Any = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        # A card is written by hand and decides nothing.
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(key, str) and _is_text(value)}


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 100 and all(isinstance(each, str) for each in value)
    return isinstance(value, str)
