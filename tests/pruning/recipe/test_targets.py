"""Which linears are pruned: names and expressions, other sparsities, and that the others keep every byte."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sparseopt.models import open_model
from sparseopt.pruning import Recipe, Stopped, audit_pattern, prune_model, prune_models
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.inspection import inspect_model
from sparseopt.pruning.recipe.targets import chosen_linears, read_patterns, read_targets
from sparseopt.system.run_folder import FolderError
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.test_inspection import MIXTRAL
from tests.pruning.test_pipeline import TOKENIZER
from tests.tiers import often

PARTS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{index}.{part}" for index in range(11) for part in PARTS]
OTHERS = ["model.embed_tokens", "model.norm", "model.layers.0.mlp.gate", "model.layers.0.input_layernorm"]


def chosen(targets=None, ignore=None):
    return chosen_linears(NAMES, OTHERS, targets, ignore)


def tensors_of(folder):
    source = open_model(folder).source
    return {key: source.read(key) for key in source.tensors}


def zeros(tensor):
    return int(tensor.size - np.count_nonzero(tensor))


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


UNCHOSEN = {
    "near": ({"targets": ("mlp.down_porj",)}, "'mlp.down_porj' matches no linear; did you mean 'mlp.down_proj'"),
    "far": ({"ignore": ("xyz",)}, "ignore: 'xyz' matches no linear; names end in q_proj, o_proj, down_proj$"),
    "expression": ({"targets": ("re:layers",)}, "from the start of names such as model.layers.0.*leave targets out"),
    "head": ({"targets": ("lm_head",)}, "'lm_head' matches lm_head, but only linears of the blocks are pruned"),
    "embedding": ({"targets": ("re:.*embed",)}, "matches model.embed_tokens, but only linears of the blocks"),
    "norm": ({"targets": (("norm", 0.5),)}, "targets: 'norm' matches model.norm, but only linears"),
    "everything": ({"ignore": ("re:.*",)}, r"none of 33 is left with ignore \('re:.\*',\); change one"),
    "zero": ({"targets": (("re:.*", 0.0),)}, "none of 33 is left with targets {'re:.*': 0.0}"),
    "no target": ({"targets": ()}, r"none of 33 is left with targets \(\)"),
    "contradiction": (
        {"ignore": ("mlp.down_proj",), "targets": (("down_proj", 0.5),)},
        r"'down_proj' is given 0.5, but ignore leaves none of its linears \(model.layers.0.mlp.down_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), UNCHOSEN.values(), ids=UNCHOSEN.keys())
def test_patterns_without_effect_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"(?m){message}"):
        chosen(**changes)


BAD = {
    "expression": ({"ignore": ["re:("]}, r"ignore: 're:\(' is not a regular expression: missing \)"),
    "empty": ({"targets": ["re:"]}, "targets must be names of linears, or expressions after 're:'.*given 're:'"),
    "number": ({"targets": 3}, "targets must be names of linears.*given 3"),
    "some": ({"targets": "q_proj=0.6,k_proj"}, "targets must be patterns, or different patterns with a sparsity each"),
    "twice": ({"targets": "q_proj=0.6,q_proj=0.5"}, "different patterns with a sparsity each.*'q_proj=0.6,q_proj=0.5'"),
    "mixed": ({"targets": ["q_proj", ["k_proj", 0.5]]}, r"patterns, or a table as in \{'down_proj': 0.6\}, given"),
    "ended": ({"sparsities": {"q_proj": 0.5}}, "sparsities is a table in `targets` since 0.3"),
    "range": ({"targets": {"q_proj": 1.0}}, r"targets: 'q_proj': sparsity must lie in \[0, 1\), given 1.0"),
    "text": ({"targets": {"q_proj": "half"}}, r"targets: 'q_proj' must have a number in \[0, 1\), given 'half'"),
    "n:m": ({"targets": {"q_proj": 0.6}, "pattern": "2:4"}, "'q_proj': pattern '2:4' has sparsity 0.5, which"),
    "owl": ({"targets": {"q_proj": 0.6}, "allocation": "owl"}, "which allocation 'owl' is to choose: leave one of"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_told_without_a_model(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)
    Recipe(targets={"q_proj": 0, "k_proj": 0.5}, pattern="2:4")


def test_no_folder_is_made_for_names_that_match_nothing(tmp_path, source, tokens):
    with pytest.raises(ValueError, match="the linears to prune cannot be chosen:\n  ignore: 'up_porj'"):
        prune_model(source, tmp_path / "out", Recipe(calibration=tokens, ignore=["up_porj"]))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    config = tiny_config(attention_bias=True, mlp_bias=True)
    tensors = random_tensors(config, np.random.default_rng(3))
    return write_folder(tmp_path_factory.mktemp("biased"), config, tensors)


def test_linears_left_out_keep_every_byte_through_all_training(tmp_path, biased, tokens):
    recipe = Recipe(
        method="wanda", calibration=tokens, train_epochs=1, distil_epochs=1, propagate=0.5, heldout_windows=2,
        targets={"re:.*layers.[01].self_attn.q_proj": 0.75, "layers.1.mlp.up_proj": 0, "re:.*layers.2": 0},
        ignore=["down_proj", "lm_head"],
    )  # fmt: skip
    report = prune_model(biased, tmp_path / "out", recipe)
    before, after = tensors_of(biased), tensors_of(tmp_path / "out")
    pruned = {record.layer for record in report.layers}
    assert len(pruned) == 2 * 7 - 2 - 1
    for key, tensor in before.items():
        layer = key.rpartition(".")[0]
        if layer in pruned:
            share = 0.75 if "q_proj" in key else 0.5
            assert key.endswith("bias") or zeros(after[key]) == share * tensor.size
        elif layer.endswith("_proj"):
            np.testing.assert_array_equal(after[key], tensor, err_msg=key)
    # Block 2 is not trained alone: nothing was pruned there.
    assert [record.block for record in report.blocks] == [0, 1]
    made = sum(record.zeros for record in report.layers)
    assert report.sparsity == made / sum(record.size for record in report.layers)
    assert report.total_sparsity == made / 27_648
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["total_sparsity"] == report.total_sparsity


@pytest.mark.thorough
def test_single_experts_can_be_left_out_of_pruning_and_training(tmp_path, tokens):
    config = tiny_config(**MIXTRAL | {"num_hidden_layers": 1})
    source = write_folder(tmp_path / "source", config, random_tensors(config, np.random.default_rng(4)))
    recipe = Recipe(method="wanda", calibration=tokens, min_expert_tokens=0, train_epochs=1, ignore=["re:.*experts.2"])
    report = prune_model(source, tmp_path / "out", recipe)
    assert len(report.layers) == 4 + 3 * 3
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert not any("experts.2." in key or "embed" in key or "head" in key for key in changed)
    assert sum("experts" in key for key in changed) == 3 * 3


@pytest.mark.parametrize("allocation", often(["owl", "curves"], "owl"))
def test_an_allocation_is_over_the_linears_that_are_pruned(tmp_path, source, tokens, allocation):
    recipe = Recipe(method="wanda", calibration=tokens, allocation=allocation, ignore=["re:.*layers.1", "down_proj"])
    report = prune_model(source, tmp_path / "out", recipe)
    size = sum(record.size for record in report.layers)
    assert sum(record.zeros for record in report.layers) == round(0.5 * size)
    assert {record.block for record in report.layers} == {0, 2}
    assert len({record.sparsity for record in report.layers}) > 1


def test_a_pattern_holds_in_the_linears_that_have_it(tmp_path, source, tokens):
    recipe = Recipe(method="magnitude", calibration=tokens, pattern="2:4", ignore=["o_proj"])
    prune_model(source, tmp_path / "out", recipe)
    audits = audit_pattern(tmp_path / "out", "2:4")
    assert {audit.layer for audit in audits if not audit.fits} == {
        f"model.layers.{index}.self_attn.o_proj" for index in range(3)
    }


@pytest.mark.thorough
def test_a_block_without_pruned_linears_needs_no_grams(tmp_path, source, tokens, monkeypatch):
    seen, grams = [], BlockRunner.grams
    monkeypatch.setattr(BlockRunner, "grams", lambda *arguments: seen.append(1) or grams(*arguments))
    recipe = Recipe(method="wanda", calibration=tokens, heldout_windows=0)
    whole = recipe.model_copy(update={"targets": ["re:.*"]})
    prune_models(source, [(recipe, tmp_path / "a"), (whole, tmp_path / "b")])
    assert tensors_of(tmp_path / "a").keys() == tensors_of(tmp_path / "b").keys()
    assert len(seen) == 2 * 3 - 1
    seen.clear()
    prune_model(source, tmp_path / "c", recipe.model_copy(update={"targets": ["re:.*layers.0", "re:.*layers.2"]}))
    assert len(seen) == 2


@pytest.mark.thorough
def test_an_interrupted_run_resumes_and_other_targets_are_another_run(tmp_path, biased, tokens):
    recipe = Recipe(
        method="wanda", calibration=tokens, dtype="bfloat16", train_epochs=1, ignore=["re:.*layers.0", "v_proj"]
    )
    for stops in range(1, 4):
        asked = []
        try:
            prune_model(
                biased,
                tmp_path / "broken",
                recipe,
                stop=lambda asked=asked, n=stops: len(asked.append(1) or asked) >= n,
            )
        except Stopped:
            continue
    prune_model(biased, tmp_path / "whole", recipe)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "broken" / file.name).read_bytes()
    before, after = tensors_of(biased), tensors_of(tmp_path / "whole")
    for key in before:
        if "layers.0." in key:
            np.testing.assert_array_equal(after[key], before[key].astype(ml_dtypes.bfloat16))
    with pytest.raises(FolderError, match=r"recipe.ignore: "):
        prune_model(biased, tmp_path / "whole", recipe.model_copy(update={"ignore": ["v_proj"]}))


def test_the_plan_is_shown_before(source, tokens):
    recipe = Recipe(ignore=[r"re:model.layers.[02].*o_proj"], targets={"0.mlp.up_proj": 0.25}, windows=4, seqlen=32)
    found = inspect_model(source, recipe)
    rows = [(kind.name, kind.blocks, kind.zeros and kind.zeros / kind.size) for kind in found.linears]
    assert ("self_attn.q_proj", (0, 1, 2), 0.5) in rows
    assert [row[1:] for row in rows if row[0] == "self_attn.o_proj"] == [((0, 2), None), ((1,), 0.5)]
    assert [row[1:] for row in rows if row[0] == "mlp.up_proj"] == [((0,), 0.25), ((1, 2), 0.5)]
    assert found.targeted_parameters == found.prunable_parameters - 2 * 32 * 32
    # Zeros are those of what is pruned.
    assert found.zeros == found.targeted_parameters / 2 - 32 * 64 / 4


def test_a_recipe_file_gives_what_is_not_typed(tmp_path, source, command):
    (source / "tokenizer.json").write_text(TOKENIZER)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "method: magnitude\npattern: 2:4\nignore: ['re:.*self_attn', lm_head]\n"
        "targets: {up_proj: 0, gate_proj: 0.5}\nwindows: 4\nseqlen: 32\npenalty:\n"
    )
    status, out, err = command("inspect", source, "--recipe", file, "--windows", 3)
    assert status == 0, err
    assert "with 3 + 4 windows of 32 tokens" in out
    assert "pruned by magnitude, pattern 2:4: 6,144 zeros" in out
    assert "15,360 weights of linears are not to be pruned and stay as they are" in out
    assert "│ mlp.up_proj │ 0-2 │ 64x32 │ 3 │ float32 │ 6,144 │ stay │" in out
    allocated = ("--method", "best", "--pattern", "2:4", "--sparsity", 0.3, "--allocation", "curves")
    status, out, err = command("inspect", source, *allocated, "--windows", 3)
    assert status == 0, err
    assert "allocation curves decides on the zeros of each linear during the run; some stay dense, and 30.00% or" in out
    assert "with 3 + 4 windows of 512 tokens and 3 variants: " in out
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and so on and so on.\n" * 60)
    text = f"file:{tmp_path / 'text.txt'}"
    arguments = (
        "--calibration",
        text,
        "--pattern",
        "unstructured",
        "--sparsity",
        "0.25,0.5",
        "--targets",
        "down_proj=0.5",
    )
    status, out, err = command("prune", source, "--output", tmp_path / "out", "--recipe", file, *arguments)
    assert status == 0, err
    assert "linears are zero, 22.22% of those of all linears" in out
    assert all(zeros(t) == t.size // 4 for k, t in tensors_of(tmp_path / "out" / "0.25").items() if "gate_proj" in k)
    status, out, err = command(
        "eval", tmp_path / "out" / "0.5", "--text", text, "--windows", 2, "--seqlen", 32, "--targets", "mlp.down_proj",
        "--pattern", "unstructured", "--sparsity", 0.5,
    )  # fmt: skip
    assert status == 0, err
    assert "pattern unstructured holds in all 3 linears, exact in 3" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: magnitude\nwindow: 4", "line 2: window: no such key; did you mean 'windows'?"),
        ("sparsity_stage: {}", "it is one of llm-compressor's recipes, see docs/how-to/coming-from-pruners.md"),
        ("method: wanda\nseqlen: half", "line 2: seqlen must be a whole number, given 'half'"),
        ("ignore: ['re:(']", "ignore: 're:(' is not a regular expression"),
        ("- a", "must hold a mapping of settings"),
        (None, "there is no file"),
    ],
)
def test_mistakes_in_a_recipe_file_are_named_with_their_line(tmp_path, command, text, message):
    file: Path = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    status, _, err = command("prune", "nowhere", "--output", tmp_path / "out", "--recipe", file)
    assert status == 2
    assert message in err
