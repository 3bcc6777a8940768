"""Which linears are pruned: names and expressions, other sparsities, and a file of settings."""

import numpy as np

from sparseopt.pruning import Recipe, audit_pattern, dry_run, prune_model
from sparseopt.pruning.recipe.targets import chosen_linears, read_patterns, read_targets
from tests.pruning.whole_runs import stored

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


def test_commas_in_brackets_belong_to_an_expression():
    text = r"down_proj, re:model\.layers\.\d{1,2}\.(mlp|a,b)[,.],re:x"
    assert read_patterns(text) == ("down_proj", r"re:model\.layers\.\d{1,2}\.(mlp|a,b)[,.]", "re:x")
    assert read_targets(r"re:.*\.\d{1,2}\.mlp=0.6,q_proj=0") == ((r"re:.*\.\d{1,2}\.mlp", 0.6), ("q_proj", 0.0))
    assert Recipe(ignore="a,b") == Recipe(ignore=["a", "b"])
    Recipe(targets={"q_proj": 0, "k_proj": 0.5}, pattern="2:4")


def test_a_pattern_holds_in_the_linears_that_have_it(tmp_path, source, tokens):
    recipe = Recipe(method="magnitude", calibration=tokens, pattern="2:4", ignore=["o_proj"])
    prune_model(source, tmp_path / "out", recipe)
    audits = audit_pattern(tmp_path / "out", "2:4")
    assert {audit.layer for audit in audits if not audit.fits} == {
        f"model.layers.{index}.self_attn.o_proj" for index in range(3)
    }


def test_the_plan_is_shown_before(tmp_path, source, tokens):
    recipe = Recipe(ignore=[r"re:model.layers.[02].*o_proj"], targets={"0.mlp.up_proj": 0.25}, calibration=tokens)
    found = dry_run(source, tmp_path / "out", recipe)
    rows = [(kind.name, kind.blocks, kind.zeros) for kind in found.layers]
    assert ("self_attn.q_proj", (0, 1, 2), 0.5) in rows
    assert [row[1:] for row in rows if row[0] == "self_attn.o_proj"] == [((0, 2), None), ((1,), 0.5)]
    assert [row[1:] for row in rows if row[0] == "mlp.up_proj"] == [((0,), 0.25), ((1, 2), 0.5)]
    # Zeros are those of what is pruned.
    assert found.zeros == (found.weights - 2 * 32 * 32) / 2 - 32 * 64 / 4


def test_a_recipe_file_gives_what_is_not_typed(tmp_path, source, text, command):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "method: magnitude\npattern: 2:4\nignore: ['re:.*self_attn', lm_head]\n"
        "targets: {up_proj: 0, gate_proj: 0.5}\nwindows: 4\nseqlen: 32\npenalty:\n"
    )
    chosen = "--pattern unstructured --sparsity 0.25,0.5 --targets down_proj=0.5"
    part = "--windows 2 --seqlen 32 --targets mlp.down_proj --pattern unstructured --sparsity 0.5"
    for call, words in [
        (
            f"prune {source} --output {tmp_path / 'dry'} --recipe {file} --calibration {text} --windows 3 --dry-run",
            (
                "3 windows of 32 tokens, 96 in all, and 4 held out",
                "6,144 zeros, 22.22% of the linear layers",
                "│ mlp.up_proj │ 0-2 │ 64x32 │ 3 │ │",
            ),
        ),
        (
            f"prune {source} --output {tmp_path / 'dry'} --method best --pattern 2:4 --sparsity 0.3 --allocation curves"
            f" --calibration {text} --windows 3 --seqlen 32 --dry-run",
            ("allocation curves: measured losses distribute", "3 windows of 32 tokens, 96 in all, 3 variants of each"),
        ),
        (
            f"prune {source} --output {tmp_path / 'out'} --recipe {file} --calibration {text} {chosen}",
            ("linear layers are zero, 22.22% of the weights of all linear layers",),
        ),
        (
            f"eval {tmp_path / 'out' / '0.5'} --text {text} {part}",
            ("pattern unstructured holds in all 3 linear layers, exact in 3",),
        ),
    ]:
        status, out, err = command(*call.split())
        assert status == 0, err
        for said in words:
            assert said in out
    gates = {key: value for key, value in stored(tmp_path / "out" / "0.25").items() if "gate_proj" in key}
    assert all(np.count_nonzero(value) == 0.75 * value.size for value in gates.values())
    assert len(gates) == 3
