"""The model card: metadata that parse, facts of the run, nothing of the machine, and never over another card."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import sparseopt as so
from sparseopt.models import open_source
from sparseopt.models.files.source import FolderSource
from sparseopt.pruning import LayerRecord, Recipe, ShrinkRecipe, Wanda, prune_model, shrink_model
from sparseopt.pruning.base.records import Score
from sparseopt.pruning.base.reports import ModuleReport
from sparseopt.pruning.run.card import CARD, metadata_of, model_card, without_folders
from sparseopt.pruning.run.facts import model_facts
from sparseopt.pruning.train.reconstruction import Reconstruction

OWN = """---
language:
- en
license: apache-2.0
base_model: lab/base
tags: [chat]
extra: 3
---

# The dense model
"""


@pytest.fixture(scope="module")
def described(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("described") / "tiny"
    shutil.copytree(source, folder)
    (folder / CARD).write_text(OWN)
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, described, tokens):
    folder = tmp_path_factory.mktemp("pruned") / "out"
    return prune_model(described, folder, Recipe(method="wanda", pattern="2:4", calibration=tokens))


def parts_of(folder):
    _, head, body = (folder / CARD).read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def recipe_in(card):
    """The YAML of a card's recipe."""
    return card.partition("```yaml\n")[2].partition("```\n")[0]


def test_a_card_carries_the_licence_and_says_what_was_done(pruned, described):
    head, body = parts_of(pruned.output)
    assert head == {
        "base_model": "lab/base",
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparseopt", "pruned", "2:4"],
    }
    assert "# tiny, pruned" in body
    assert "The dense model" not in body
    assert "`sparseopt prune tiny --output FOLDER --recipe RECIPE` makes it again" in body
    given = yaml.safe_load(recipe_in(body))
    assert [given.get(name) for name in ("method", "sparsity", "pattern", "calibration")] == ["wanda", 0.5, "2:4", None]
    assert "# calibration, in Python: token ids of shape [7, 24]\n" in recipe_in(body)
    assert f"50.00% of the {sum(r.size for r in pruned.layers):,} weights of 21 linear layers are zero" in body
    assert "token ids of shape [7, 24]" in body
    assert 'AutoTokenizer.from_pretrained("FOLDER")' in body
    # In a notebook, names are text.
    shown = replace(pruned, source="<b>", scores=(Score("a<i>", 2, 8, 10.0, 11.0),))._repr_html_()
    for text in ("&lt;b&gt;", "perplexity on a&lt;i&gt;</th><td>10.00 before, 11.00 after", "<td>0.5</td>"):
        assert text in shown
    module = ModuleReport(pruned.layers, [], {})._repr_html_()
    zeros, size = sum(r.zeros for r in pruned.layers), sum(r.size for r in pruned.layers)
    assert f"<td>21 pruned, {zeros:,} of {size:,} weights are zero; 0 in few bits</td>" in module
    # Folders of this machine are nobody's business.
    assert str(described.parent) not in body
    assert (pruned.output / "LICENSE").read_text() == "terms"


@pytest.mark.thorough
def test_the_card_of_a_model_pruned_further_names_the_same_base(tmp_path, pruned, tokens):
    table = {"re:.*self_attn": 0.7, "down_proj": 0.0}
    recipe = Recipe(method="wanda", sparsity=0.6, targets=table, keep_zeros=True, calibration=tokens)
    prune_model(pruned.output, tmp_path / "out", recipe)
    head, body = parts_of(tmp_path / "out")
    assert (head["base_model"], head["license"]) == ("lab/base", "apache-2.0")
    given = yaml.safe_load(recipe_in(body))
    assert (given["keep_zeros"], given["targets"]) == (True, [["re:.*self_attn", 0.7], ["down_proj", 0.0]])


def test_without_a_licence_the_card_says_so_and_a_smaller_model_tells_its_sizes(tmp_path, source, tokens):
    shrink_model(
        source, tmp_path / "out", ShrinkRecipe(method="magnitude", channels=0.5, multiple=8, calibration=tokens)
    )
    head, body = parts_of(tmp_path / "out")
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sparseopt", "pruned"]}
    assert "The source names no licence." in body
    assert "- size: keeps 32 of 64 channels; " in body
    assert f"`sparseopt shrink {source.name} --output FOLDER --recipe RECIPE`" in body
    assert yaml.safe_load(recipe_in(body))["channels"] == 0.5


def test_a_licence_file_alone_is_pointed_at(tmp_path, pruned, source):
    folder = tmp_path / "licensed"
    shutil.copytree(source, folder)
    (folder / "LICENSE.txt").write_text("terms")
    head = metadata_of(model_card(pruned, open_source(folder).sidecars()).encode())
    assert (head["license"], head["license_link"]) == ("other", "LICENSE.txt")


def test_the_tokens_that_a_model_was_calibrated_on_are_told_with_their_variants(pruned):
    recipe = pruned.recipe | {"calibration": "file:/home/someone/notes.txt"}
    calibration = replace(pruned.calibration, windows=16, seqlen=512, variants=3)
    scored = (Score("the second half of file:/home/someone/notes.txt", 4, 512, 20.0, 25.0),)
    seen = replace(pruned, recipe=recipe, calibration=calibration, scores=scored)
    text = "16 windows of 512 tokens of the first half of file:{}notes.txt, and 3 variants of each that the dense model"
    facts, card = dict(model_facts(seen)), model_card(seen, {})
    assert facts["calibration"].startswith(text.format("/home/someone/"))
    assert f"- calibration: {text.format('')} drew" in card
    assert "- perplexity on the second half of file:notes.txt: 20.00 before, 25.00 after (+25.0 %)" in card


def test_the_files_besides_the_weights_are_read_once(tmp_path, source, tokens, monkeypatch):
    read, calls = FolderSource.sidecars, []
    monkeypatch.setattr(FolderSource, "sidecars", lambda source: calls.append(source) or read(source))
    prune_model(source, tmp_path / "out", Recipe(method="magnitude", calibration=tokens))
    assert len(calls) == 1


def test_a_card_that_somebody_put_into_the_folder_stays(tmp_path, source, tokens):
    def observer(event, done, total):
        if isinstance(event, LayerRecord):
            (tmp_path / "out" / CARD).write_text("mine")

    recipe = Recipe(method="wanda", calibration=tokens)
    prune_model(source, tmp_path / "out", recipe, observer=observer)
    assert (tmp_path / "out" / CARD).read_text() == "mine"
    assert prune_model(source, tmp_path / "out", recipe).kept
    assert (tmp_path / "out" / CARD).read_text() == "mine"


@pytest.mark.parametrize(
    "card",
    [
        b"", b"# no front matter", b"---\nlicense: mit\n", b"---\n- a list\n---\n", b"---\n{[\n---\n", b"\xff\xfe---\n",
        b"---\nlicense: !!python/object:os.system x\n---\n", b"---\nlicense: 2024-99-99\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n", b"---\nlicense: {a: b}\n---\n",
    ],
)  # fmt: skip
def test_a_damaged_card_has_no_metadata(card):
    assert "license" not in metadata_of(card)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Recipe, {"method": "wanda", "pattern": "2:4", "targets": {"down_proj": 0, "re:.*self_attn": 0.5}}),
        (ShrinkRecipe, {"method": "magnitude", "channels": 0.5, "multiple": 8}),
    ],
)
def test_the_recipe_in_a_card_makes_the_identical_model(tmp_path, source, text, monkeypatch, kind, given):
    made = {Recipe: prune_model, ShrinkRecipe: shrink_model}[kind]
    made(source, tmp_path / "one", kind(calibration=text, windows=3, seqlen=16, score="none", **given))
    (tmp_path / "recipe.yaml").write_text(recipe_in((tmp_path / "one" / CARD).read_text()))
    monkeypatch.chdir(Path(text.removeprefix("file:")).parent)
    made(source, tmp_path / "two", kind.from_yaml(tmp_path / "recipe.yaml"))
    shards, again = (
        {f.name: f.read_bytes() for f in (tmp_path / name).glob("*.safetensors")} for name in ("one", "two")
    )
    assert shards == again
    assert shards


@pytest.mark.parametrize("given", [{"effort": "most"}, {"effort": "fast"}, {"penalty": "mcp"}, {"seqlen": 64}])
def test_the_yaml_of_a_recipe_is_the_recipe(pruned, tmp_path, given):
    recipe = Recipe(**given, calibration="hf:lab/text", score="pydoc")
    (tmp_path / "recipe.yaml").write_text(recipe_in(model_card(replace(pruned, recipe=recipe.as_dict()), {})))
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").as_dict() == recipe.as_dict()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"calibration": ["a", "b"]}, "calibration"),
        ({"method": Wanda()}, "method"),
        ({"penalty": so.MCP(2.0)}, "penalty"),
        ({"train_epochs": Reconstruction(2)}, "train_epochs"),
    ],
)
def test_what_only_python_can_give_is_a_comment(pruned, given, name):
    found = recipe_in(model_card(replace(pruned, recipe=Recipe(**given).as_dict()), {}))
    assert f"# {name}, in Python: " in found
    assert name not in yaml.safe_load(found)


def test_only_last_parts_of_paths_are_told(pruned, tmp_path):
    (tmp_path / "pruned-before").mkdir()
    for masks in ("lab/pruned-before", str(tmp_path / "pruned-before")):
        found = recipe_in(model_card(replace(pruned, recipe=pruned.recipe | {"masks": masks}), {}))
        assert yaml.safe_load(found)["masks"] == masks.removeprefix(f"{tmp_path}/")
    assert without_folders("wikitext2:/home/someone/wikitext") == "wikitext2:wikitext"
    assert without_folders("the first half of file:~/notes.txt") == "the first half of file:notes.txt"
    assert without_folders("jsonl:customers/of/a:b/x.jsonl") == "jsonl:x.jsonl"
    assert without_folders("hf:lab/data/config") == "hf:lab/data/config"
    assert without_folders("token ids of shape [7, 24]") == "token ids of shape [7, 24]"
    assert np.all([without_folders(text) == text for text in ("0.5", "2:4", "block:4x4")])
