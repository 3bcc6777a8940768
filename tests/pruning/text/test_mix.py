"""Mixes of calibration texts: how they are named, which windows they give, and what a run reports of each text."""

import numpy as np
import pytest
import yaml

from sparseopt.models import open_model, open_source
from sparseopt.pruning import Recipe, ShrinkRecipe, dry_run, perplexity, prune_model, text_windows, token_digest
from sparseopt.pruning.recipe.options import RecipeError
from sparseopt.pruning.run.card import CARD, recipe_text
from sparseopt.pruning.run.facts import model_facts
from sparseopt.pruning.text.chats import TextError
from sparseopt.pruning.text.mix import divided, read_mix
from sparseopt.system.run_folder import FolderError

SMALL = {"method": "magnitude", "seqlen": 24, "heldout_windows": 3}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A text whose name has a colon and a comma, in a folder of the same name as the other's."""
    file = tmp_path_factory.mktemp("text") / "a:1b,c.txt"
    file.write_text("a lazy fox tells the dogs of all that it jumped over.\n" * 90)
    return f"file:{file}"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("pydoc", "pydoc"),
        # One text is a name and nothing else.
        ("file:notes:64", "file:notes:64"),
        ("file:a,b.txt", "file:a,b.txt"),
        ("pydoc:64, file:notes.txt:32", {"pydoc": 64, "file:notes.txt": 32}),
        (r"file:C:\a.txt:3,file:D:\b,c.txt:4", {r"file:C:\a.txt": 3, r"file:D:\b,c.txt": 4}),
        ("hf:O/N/C@v1:6,jsonl:d/*.json:3", {"hf:O/N/C@v1": 6, "jsonl:d/*.json": 3}),
        ({"file:a:1,pydoc:2": np.int64(5)}, {"file:a:1,pydoc:2": 5}),
    ],
)
def test_a_mix_is_read_as_windows_by_name(given, read):
    if "pydoc" in str(read) or isinstance(read, dict):
        recipe = Recipe(calibration=given)
        assert recipe.calibration == read
        assert recipe.model_copy().windows == (sum(read.values()) if isinstance(read, dict) else None)
    else:
        assert read_mix(given) == read


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        (
            {"calibration": "pydoc,file:a:3"},
            "calibration",
            "'pydoc' has no number of windows .*write NAME:WINDOWS,NAME",
        ),
        ({"calibration": "pydoc:4,file:a:x"}, "calibration", "'file:a:x' has no number"),
        ({"calibration": "pydoc:0,file:a:3"}, "calibration", "'pydoc' has no number of windows from 1 on"),
        ({"calibration": "file:a:1,b.txt"}, "calibration", "'b.txt' has no number.* give a mapping"),
        ({"calibration": {"pydoc": "4"}}, "calibration", "'pydoc' has no number"),
        ({"calibration": {}}, "calibration", "each text of a mix once"),
        ({"calibration": "pydoc:4,pydoc:3"}, "calibration", "each text of a mix once"),
        ({"calibration": "pydoc:4,fil:b:3"}, "calibration", "unknown text 'fil:b'"),
        ({"calibration": "pydoc:4,self:3"}, "calibration", "'self' is drawn by the model"),
        ({"calibration": "pydoc:4"}, "calibration", "'pydoc:4' has no name"),
        ({"calibration": "pydoc:4,file:a:3", "windows": 8}, "windows", "windows is 8, .* have 7 in all"),
        ({"calibration": "pydoc:4,file:a:3", "split": "train"}, "calibration", "split 'train'"),
    ],
)
def test_a_wrong_mix_is_refused_with_the_form_of_a_right_one(fields, field, words):
    with pytest.raises(RecipeError, match=f"(?s){words}") as caught:
        Recipe(**fields)
    assert {name for name, _ in caught.value.found} == {field}


def test_a_vocabulary_counts_one_text():
    with pytest.raises(RecipeError, match="calibration is a mix: give text:TEXT"):
        ShrinkRecipe(vocabulary="32", calibration="pydoc:4,file:a:3")


def test_held_out_windows_are_divided_in_proportion(rng):
    for _ in range(50):
        counts, windows = rng.integers(1, 100, rng.integers(1, 6)), int(rng.integers(0, 30))
        parts = divided(windows, [("a", int(count)) for count in counts])
        assert sum(parts) == windows
        assert np.abs(parts - windows * counts / counts.sum()).max() <= 1


def test_each_text_of_a_mix_gives_the_windows_that_it_gives_alone(tmp_path, source, text, other):
    mix, opened = {text: 4, other: 2}, open_source(source)
    chosen = {"window_choice": "random", "seed": 5}
    report = prune_model(source, tmp_path / "out", Recipe(calibration=f"{text}:4,{other}:2", **chosen, **SMALL))
    drawn = [
        text_windows(opened, name, "calibration", count + rest, 24, choice="random", seed=5).ids
        for (name, count), rest in zip(mix.items(), (2, 1), strict=True)
    ]
    ids = np.concatenate([drawn[0][:4], drawn[1][:2], drawn[0][4:], drawn[1][2:]])
    assert report.calibration.digest == token_digest(ids)
    assert (report.calibration.windows, report.calibration.heldout_windows) == (6, 3)

    # What the mix costs on each text.
    assert [score.text for score in report.scores] == [f"the second half of {name}" for name in mix]
    for score, name in zip(report.scores, mix, strict=True):
        rest = text_windows(opened, name, "evaluation", 2, 24).ids
        for model, value in ((source, score.before), (report.output, score.after)):
            np.testing.assert_allclose(value, perplexity(open_model(model), rest), rtol=1e-5)
    facts = dict(model_facts(report))
    assert facts["calibration"].startswith(
        f"6 windows of 24 tokens of the first half of {text} (4) and the first half of {other} (2); the rest"
    )
    # The card names no folder, and its recipe is the mix.
    card = (report.output / CARD).read_text()
    assert str(tmp_path.parent) not in card
    assert yaml.safe_load(recipe_text(report))["calibration"] == mix

    # The mapping is the same run, another mix another one.
    again = Recipe(calibration=mix, **chosen, **SMALL)
    assert prune_model(source, tmp_path / "out", again).kept
    with pytest.raises(FolderError, match="calibration"):
        prune_model(source, tmp_path / "out", again.model_copy(update={"calibration": {text: 2, other: 4}}))


def test_a_text_of_a_mix_that_is_too_short_ends_the_run_before_any_work(tmp_path, source, text, other):
    for call in (prune_model, dry_run):
        with pytest.raises(TextError, match=r"a:1b,c\.txt: 1003 windows of 24 tokens need"):
            call(source, tmp_path / "out", Recipe(calibration={text: 2, other: 1000}, **SMALL))
    assert not (tmp_path / "out").exists()
