"""Which linears are pruned: names and expressions, other sparsities, and a file of settings."""

import json
from pathlib import Path

import numpy as np
import pytest

from sparseopt.pruning import Recipe
from sparseopt.pruning.recipe.targets import chosen_linears, read_patterns, read_targets
from tests.pruning.whole_runs import stored

TINY = "llama"
pytestmark = pytest.mark.usefixtures("several_batches")
PARTS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{index}.{part}" for index in range(11) for part in PARTS]
OTHERS = ["model.embed_tokens", "model.norm", "model.layers.0.mlp.gate", "model.layers.0.input_layernorm"]


def chosen(targets=None, ignore=None):
    return chosen_linears(NAMES, OTHERS, targets, ignore)


def test_a_name_an_ending_and_an_expression_match_what_they_say():
    assert list(chosen(("model.layers.1.mlp.down_proj",))) == ["model.layers.1.mlp.down_proj"]
    assert list(chosen(("1.mlp.down_proj",))) == ["model.layers.1.mlp.down_proj"]  # and not that of block 10
    assert list(chosen(("down_proj",))) == [name for name in NAMES if name.endswith(".down_proj")]
    assert list(chosen((r"re:model\.layers\.1\.",))) == NAMES[3:6]
    assert list(chosen(("re:.*q_proj", "o_proj"), (r"re:model\.layers\.\d\.",))) == NAMES[30:32]
    assert list(chosen()) == NAMES
    assert list(chosen(("re:.*",), ("lm_head", "re:.*embed", "re:.*mlp.gate$"))) == NAMES


def test_of_several_sparsities_that_of_the_nearest_pattern_counts():
    first, second = NAMES[0], NAMES[3]
    found = chosen((
        ("re:.*q_proj", 0.1), ("q_proj", 0.2), ("self_attn.q_proj", 0.3), (first, 0.0), ("re:.*", 0.4), (second, 0.5),
    ), ("o_proj",))  # fmt: skip
    assert first not in found
    assert (found[second], found[NAMES[6]], found[NAMES[2]]) == (0.5, 0.3, 0.4)
    # Of expressions the first.
    assert set(chosen((("re:.*q_proj", 0.1), ("re:.*", 0.4))).values()) == {0.1, 0.4}
    assert set(chosen((("re:.*", 0.4), ("re:.*q_proj", 0.1))).values()) == {0.4}


def test_commas_in_brackets_belong_to_an_expression_and_numbers_of_numpy_are_numbers():
    text = r"down_proj, re:model\.layers\.\d{1,2}\.(mlp|a,b)[,.],re:x"
    assert read_patterns(text) == ("down_proj", r"re:model\.layers\.\d{1,2}\.(mlp|a,b)[,.]", "re:x")
    assert read_targets(r"re:.*\.\d{1,2}\.mlp=0.6,q_proj=0") == ((r"re:.*\.\d{1,2}\.mlp", 0.6), ("q_proj", 0.0))
    assert Recipe(ignore="a,b") == Recipe(ignore=["a", "b"])
    assert Recipe(targets={"q_proj": 0, "k_proj": 0.5}, pattern="2:4").targets == (("q_proj", 0), ("k_proj", 0.5))
    given = Recipe(sparsity=np.float32(0.5), seqlen=np.int64(8), targets={"o_proj": np.float64(0.25)}, masks=Path("a"))
    plain = Recipe(sparsity=0.5, seqlen=8, targets={"o_proj": 0.25}, masks="a")
    assert json.dumps(given.as_dict()) == json.dumps(plain.as_dict())


def test_a_recipe_file_gives_what_is_not_typed(tmp_path, source, text, command):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "method: wanda\npattern: 2:4\nignore: ['re:.*self_attn', lm_head]\n"
        "targets: {up_proj: 0, gate_proj: 0.5}\nwindows: 5\nseqlen: 24\nheldout_windows: 2\npenalty:\n"
    )
    common = ("prune", source, "--recipe", file, "--calibration", text)
    status, out, _ = command(*common, "--output", tmp_path / "dry", "--windows", 3, "--dry-run")
    assert status == 0
    for said in (
        "3 windows of 24 tokens, 72 in all, and 2 held out",
        "6,144 zeros, 22.22% of the linear layers",
        "│ mlp.up_proj │ 0-2 │ 64x32 │ 3 │ │",
    ):
        assert said in out
    typed = ("--pattern", "unstructured", "--sparsity", "0.25", "--targets", "down_proj=0.5")
    assert command(*common, "--output", tmp_path / "out", *typed)[0] == 0
    weights = {key.split(".")[-2]: value for key, value in stored(tmp_path / "out").items() if ".layers.1." in key}
    for name, share in {"gate_proj": 0.25, "up_proj": 0.25, "down_proj": 0.5, "q_proj": 0}.items():
        assert np.count_nonzero(weights[name] == 0) == share * weights[name].size
    audit = ("eval", tmp_path / "out", "--text", text, "--windows", 2, "--seqlen", 24, "--sparsity", 0.25)
    part = ("--targets", "gate_proj,up_proj")
    status, out, _ = command(*audit, "--pattern", "unstructured", *part)
    assert status == 0
    assert "pattern unstructured holds in all 6 linear layers, exact in 6" in out
    status, out, _ = command(*audit, "--pattern", "unstructured", *part, "--json")
    assert (status, json.loads(out)["exact"]) == (0, 6)
    status, _, err = command(*audit, "--pattern", "unstructured")
    assert status == 1
    assert "12 of 21 linear layers break the pattern 'unstructured'" in err
