"""Descriptions of a finished run: README.md, its model card for the Hugging Face hub, and report.html."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from sparseopt.pruning.base.reports import PruneReport
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
# How a recipe's record describes what only Python code can give: tokens, documents, objects, settings of training.
_OBJECT = re.compile(rf"{TOKEN_IDS}|\d+ documents$|[\w.]+\(|<|{{'epochs'")
PACKAGES = ("sparseopt", "jax", "transformers")
LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""
LOADING_FILE = "```shell\nllama-cli --model FILE.gguf\n```"


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
    tags = {"pruned": report.layers or smaller, "quantized": report.grids, pattern: pattern != "unstructured"}
    name, found, file = source_name(report), versions(), is_file(report.output)
    shown = _published(report)
    head = {
        **({} if base is None else {"base_model": base}), **kept,
        "library_name": "gguf" if file else "transformers", "pipeline_tag": "text-generation",
        "tags": ["sparseopt", *(tag for tag, applies in tags.items() if applies)],
    }  # fmt: skip
    output = "FILE.gguf" if file else "FOLDER"
    commit = f" (commit {report.revision})" if report.revision else ""
    terms = "The licence of the source applies." if "license" in kept else "The source names no licence."
    used = ", ".join(f"{package} {found[package]}" for package in PACKAGES if package in found)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# {title_of(report)}\n\n"
        f"Made from {name}{commit}. {terms}\n\n"
        f"## What was done\n\n{bullets(model_facts(shown), '-')}\n\n"
        f"`sparseopt {'shrink' if smaller else 'prune'} {name} --output {output} --recipe RECIPE` makes it again, "
        f"with this recipe in the file RECIPE:\n\n```yaml\n{recipe_text(shown)}```\n\n"
        f"## How to load it\n\n{LOADING_FILE if file else LOADING}\n\n`sparseopt eval {output}` measures its "
        f"perplexity.\n\n## Versions\n\n{used}, on {report.platform}.\n"
    )


def recipe_text(report: PruneReport) -> str:
    """The recipe as YAML that `--recipe` reads; what only Python code can give stays out, as a comment."""
    fields = (Recipe if report.shape is None else ShrinkRecipe).model_fields
    given = {name: value for name, value in report.recipe.items() if value != fields[name].default}
    objects = {name: given.pop(name) for name in list(given) if _OBJECT.match(str(given[name]))}
    comments = "".join(f"# {name}, in Python: {' '.join(str(value).split())}\n" for name, value in objects.items())
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=2**16) + comments


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
    drawn = bars({name: sum(values) / len(values) for name, values in errors.items()})
    figures = [Figure(drawn, "Mean relative squared error of the layers' outputs in each block")] if errors else []
    first = Report(Table("What was done"), [*model_facts(report), *run_facts(report)], figures)
    output = shlex.quote(str(report.output))
    steps = [Fact(f"sparseopt eval {output} --text file:TEXT", "measures the perplexity on a text of yours")]
    if is_file(report.output):
        steps.append(Fact(f"llama-cli --model {output}", "runs it"))
    else:
        steps.append(Fact(f"AutoModelForCausalLM.from_pretrained({str(report.output)!r})", "loads it in transformers"))
    if report.layers and report.recipe["effort"] != "most":
        steps.append(Fact("--effort most", "takes longer and usually loses less; it needs another --output"))
    return html_page(title_of(report), [first, *map(Report, tables)], command, environment, steps)


def _published(report: PruneReport) -> PruneReport:
    """The report with only the last component of each local folder."""
    scores, recipe = tuple(replace(each, text=without_folders(each.text)) for each in report.scores), report.recipe
    recipe = recipe | {name: _without_folders(recipe[name]) for name in ("calibration", "score") if recipe[name]}
    for name in ("vocabulary",) if recipe.get("vocabulary") else ():
        recipe[name] = without_folders(recipe[name])
    if (masks := recipe.get("masks")) and Path(masks).expanduser().exists():
        recipe["masks"] = Path(masks).name
    return replace(report, scores=scores, recipe=recipe)


def _without_folders(text: str | dict[str, int]) -> str | dict[str, int]:
    """A text or a mix; texts that then have one name are shown as one."""
    if isinstance(text, str):
        return without_folders(text)
    found = Counter[str]()
    for name, count in text.items():
        found[without_folders(name)] += count
    return dict(found)


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
    try:
        found: Any = yaml.safe_load(text) if end and not start.strip("\ufeff") else None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        # A card is written by hand and decides nothing.
        return {}
    return {key: value for key, value in found.items() if _is_text(key, value)} if isinstance(found, dict) else {}


def _is_text(key: Any, value: Any) -> bool:
    texts = [key, *value] if isinstance(value, list) and 0 < len(value) <= 100 else [key, value]
    return all(isinstance(each, str) for each in texts)
