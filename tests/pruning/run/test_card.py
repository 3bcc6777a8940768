"""The model card: metadata that parse, facts of the run, nothing of the machine, and never over another card."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from sparseopt.models import open_source
from sparseopt.models.files.source import FolderSource
from sparseopt.pruning import LayerRecord, Recipe, ShrinkRecipe, prune_model, shrink_model
from sparseopt.pruning.base.records import Score
from sparseopt.pruning.base.reports import ModuleReport
from sparseopt.pruning.run.card import CARD, command_of, metadata_of, model_card, without_folders
from sparseopt.pruning.run.facts import model_facts

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
    return prune_model(described, folder, Recipe(method="wanda", pattern="2:4", calibration=tokens, pack=True))


def parts_of(folder):
    _, head, body = (folder / CARD).read_text().split("---\n", 2)
    return yaml.safe_load(head), body


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
    command = next(line for line in body.splitlines() if line.startswith("sparseopt prune tiny --output FOLDER "))
    assert "--calibration" not in command
    assert all(part in command for part in ("--method wanda", "--sparsity 0.5", "--pattern 2:4"))
    assert f"50.00% of the {sum(r.size for r in pruned.layers):,} weights of 21 linear layers are zero" in body
    assert "token ids of shape [7, 24]" in body
    assert "`sparseopt unpack PACKED --output FOLDER`" in body
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
    assert "--keep-zeros" in body
    assert "--targets 're:.*self_attn=0.7,down_proj=0.0'" in body


def test_without_a_licence_the_card_says_so_and_a_smaller_model_tells_its_sizes(tmp_path, source, tokens):
    shrink_model(
        source, tmp_path / "out", ShrinkRecipe(method="magnitude", channels=0.5, multiple=8, calibration=tokens)
    )
    head, body = parts_of(tmp_path / "out")
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sparseopt", "pruned"]}
    assert "The source names no licence." in body
    assert "- size: keeps 32 of 64 channels; " in body
    assert f"sparseopt shrink {source.name} " in body
    assert "--channels 0.5" in body


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


@pytest.mark.parametrize("given", [{"effort": "most"}, {"effort": "fast"}, {"method": "maiht"}, {"effort": "good"}, {}])
def test_the_command_says_the_effort_or_the_method(pruned, given):
    command = command_of(replace(pruned, recipe=Recipe(**given, calibration="pydoc").as_dict()))
    for name in ("effort", "method"):
        value = given.get(name)
        assert (f"--{name} {value}" in command) == (value not in (None, "good")), command


def test_the_command_leaves_out_what_no_command_can_hold(pruned):
    recipe = pruned.recipe | {"calibration": "3 documents"}
    assert "--calibration" not in command_of(replace(pruned, recipe=recipe))


def test_only_last_parts_of_paths_are_told(pruned, tmp_path):
    assert "--masks pruned-before" not in command_of(
        replace(pruned, recipe=pruned.recipe | {"masks": "lab/pruned-before"})
    )
    (tmp_path / "pruned-before").mkdir()
    recipe = pruned.recipe | {"masks": str(tmp_path / "pruned-before")}
    assert "--masks pruned-before" in command_of(replace(pruned, recipe=recipe))
    assert without_folders("wikitext2:/home/someone/wikitext") == "wikitext2:wikitext"
    assert without_folders("the first half of file:~/notes.txt") == "the first half of file:notes.txt"
    assert without_folders("jsonl:customers/of/a:b/x.jsonl") == "jsonl:x.jsonl"
    assert without_folders("hf:lab/data/config") == "hf:lab/data/config"
    assert without_folders("token ids of shape [7, 24]") == "token ids of shape [7, 24]"
    assert np.all([without_folders(text) == text for text in ("0.5", "2:4", "block:4x4")])
