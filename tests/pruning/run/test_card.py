"""The model card: metadata that parse, facts of the run, nothing of the machine, and never over another card."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

import sparseopt as so
from sparseopt.models import open_source
from sparseopt.pruning import LayerRecord, Recipe, ShrinkRecipe, Wanda, prune_model, shrink_model
from sparseopt.pruning.base.records import Score
from sparseopt.pruning.base.reports import ModuleReport
from sparseopt.pruning.run.card import CARD, metadata_of, model_card, without_folders
from sparseopt.pruning.run.facts import model_facts, run_facts
from sparseopt.pruning.train.reconstruction import Reconstruction

pytestmark = pytest.mark.usefixtures("several_batches")
OWN = "language: [en]\nlicense: apache-2.0\nbase_model: lab/base\ntags: [chat]\nextra: 3"


@pytest.fixture(scope="module")
def described(tmp_path_factory, source):
    folder = shutil.copytree(source, tmp_path_factory.mktemp("described") / "tiny")
    (folder / CARD).write_text(f"---\n{OWN}\n---\n\n# The dense model\n")
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, described, tokens):
    folder = tmp_path_factory.mktemp("pruned") / "out"
    return prune_model(described, folder, Recipe(method="wanda", pattern="2:4", calibration=tokens, heldout_windows=2))


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


@pytest.mark.parametrize(
    ("budget", "words"), [(2**20, "asked for 1.0 MiB: MORE than asked for"), (2**40, "1024.00 GiB")]
)
def test_a_peak_above_the_budget_is_told(pruned, budget, words):
    seen = replace(pruned, footprint=replace(pruned.footprint, budget_bytes=budget))
    assert dict(run_facts(seen))["peak memory"].endswith(words)


def test_the_card_of_a_model_pruned_further_names_the_same_base_and_a_licence_file_alone_is_pointed_at(
    tmp_path, pruned, source
):
    head = metadata_of(model_card(pruned, open_source(pruned.output).sidecars()).encode())
    assert (head["base_model"], head["license"]) == ("lab/base", "apache-2.0")
    folder = shutil.copytree(source, tmp_path / "licensed")
    (folder / "LICENSE.txt").write_text("terms")
    head = metadata_of(model_card(pruned, open_source(folder).sidecars()).encode())
    assert (head["license"], head["license_link"]) == ("other", "LICENSE.txt")


def test_the_tokens_that_a_model_was_calibrated_on_are_told(pruned):
    recipe = pruned.recipe | {"calibration": "file:/home/someone/notes.txt"}
    calibration = replace(pruned.calibration, windows=16, seqlen=512)
    scored = (Score("the second half of file:/home/someone/notes.txt", 4, 512, 20.0, 25.0),)
    seen = replace(pruned, recipe=recipe, calibration=calibration, scores=scored)
    text = "16 windows of 512 tokens of the first half of file:{}notes.txt"
    facts, card = dict(model_facts(seen)), model_card(seen, {})
    assert facts["calibration"].startswith(text.format("/home/someone/"))
    assert f"- calibration: {text.format('')}" in card
    assert "- perplexity on the second half of file:notes.txt: 20.00 before, 25.00 after (+25.0 %)" in card


def test_a_card_that_somebody_put_into_the_folder_stays(tmp_path, source, tokens):
    def observer(event, done, total):
        if isinstance(event, LayerRecord):
            (tmp_path / "out" / CARD).write_text("mine")

    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=2)
    prune_model(source, tmp_path / "out", recipe, observer=observer)
    assert (tmp_path / "out" / CARD).read_text() == "mine"
    assert prune_model(source, tmp_path / "out", recipe).kept
    assert (tmp_path / "out" / CARD).read_text() == "mine"


@pytest.mark.parametrize(
    "card",
    [
        b"", b"# no front matter", b"---\nlicense: mit\n", b"---\n- a list\n---\n", b"---\n{[\n---\n", b"\xff\xfe---\n",
        b"---\nlicense: !!python/object:os.system x\n---\n", b"---\nlicense: 2024-99-99\n---\n",
        b"---\nlicense: {a: b}\n---\n",
    ],
)  # fmt: skip
def test_a_damaged_card_has_no_metadata(card):
    assert "license" not in metadata_of(card)


@pytest.mark.parametrize(
    ("made", "recipe"),
    [
        (prune_model, partial(Recipe, method="wanda", pattern="2:4", targets={"down_proj": 0, "re:.*self_attn": 0.5})),
        (shrink_model, partial(ShrinkRecipe, method="magnitude", channels=0.5, multiple=8)),
    ],
)
def test_the_recipe_in_a_card_makes_the_identical_model(tmp_path, source, text, monkeypatch, made, recipe):
    made(source, tmp_path / "one", recipe(calibration=text, windows=5, seqlen=24, heldout_windows=2, score="none"))
    head, body = parts_of(tmp_path / "one")
    assert {"sparseopt", "pruned"} <= set(head["tags"])
    assert "license" not in head
    assert "The source names no licence." in body
    if made is shrink_model:
        assert "- size: keeps 16 of 32 channels; " in body
        assert f"`sparseopt shrink {source.name} --output FOLDER --recipe RECIPE`" in body
    (tmp_path / "recipe.yaml").write_text(recipe_in(body))
    monkeypatch.chdir(Path(text.removeprefix("file:")).parent)
    made(source, tmp_path / "two", recipe.func.from_yaml(tmp_path / "recipe.yaml"))
    shards, again = (
        {f.name: f.read_bytes() for f in (tmp_path / name).glob("*.safetensors")} for name in ("one", "two")
    )
    assert shards == again
    assert shards


OPEN = {"calibration": "hf:lab/text", "score": "pydoc"}


@pytest.mark.parametrize(
    ("given", "only_in_python"),
    [
        (OPEN | {"effort": "most"}, None),
        (OPEN | {"effort": "fast"}, None),
        (OPEN | {"penalty": "mcp", "seqlen": 64}, None),
        (OPEN | {"keep_zeros": True, "targets": {"re:.*self_attn": 0.7, "down_proj": 0.0}}, None),
        ({"calibration": ["a", "b"]}, "calibration"),
        ({"method": Wanda()}, "method"),
        ({"penalty": so.MCP(2.0)}, "penalty"),
        ({"train_epochs": Reconstruction(2)}, "train_epochs"),
    ],
)
def test_the_yaml_of_a_recipe_is_the_recipe_and_what_only_python_can_give_a_comment(
    pruned, tmp_path, given, only_in_python
):
    recipe = Recipe(**given)
    found = recipe_in(model_card(replace(pruned, recipe=recipe.as_dict()), {}))
    if only_in_python:
        assert f"# {only_in_python}, in Python: " in found
        assert only_in_python not in yaml.safe_load(found)
    else:
        (tmp_path / "recipe.yaml").write_text(found)
        assert Recipe.from_yaml(tmp_path / "recipe.yaml").as_dict() == recipe.as_dict()


def test_only_last_parts_of_paths_are_told(pruned, tmp_path):
    (tmp_path / "pruned-before").mkdir()
    for masks in ("lab/pruned-before", str(tmp_path / "pruned-before")):
        found = recipe_in(model_card(replace(pruned, recipe=pruned.recipe | {"masks": masks}), {}))
        assert yaml.safe_load(found)["masks"] == masks.removeprefix(f"{tmp_path}/")
    assert without_folders("wikitext2:/home/someone/wikitext") == "wikitext2:wikitext"
    assert without_folders("the first half of file:~/notes.txt") == "the first half of file:notes.txt"
    assert without_folders("jsonl:customers/of/a:b/x.jsonl") == "jsonl:x.jsonl"
    for text in ("hf:lab/data/config", "token ids of shape [7, 24]", "0.5", "2:4", "block:4x4"):
        assert without_folders(text) == text
