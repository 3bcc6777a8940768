"""What cannot be done is refused before any work: the message names the field and what was given, nothing is written.

One table for each entry point.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest

import sparseopt as so
from sparseopt.models import LoadedModel, ModelError, open_source
from sparseopt.pruning import (
    Recipe,
    ShrinkRecipe,
    Wanda,
    dry_run,
    masks,
    pipeline,
    prune_layer,
    prune_model,
)
from sparseopt.pruning.recipe.options import RecipeError, choices_of, shell_type
from sparseopt.pruning.train.distillation import Distillation
from sparseopt.pruning.train.reconstruction import Reconstruction
from sparseopt.system.run_folder import FolderError
from sparseopt.system.yaml_file import ConfigError
from tests.layers.layers import make_layer
from tests.pruning.whole_runs import tensors_of, write_model

pytestmark = pytest.mark.usefixtures("several_batches")
NINE = {"calibration": np.ones((9, 9), int)}
CURVES, PYDOC, SELF = {"allocation": "curves"}, {"calibration": "pydoc"}, {"calibration": "self"}
NUMBERS = [name for name, field in Recipe.model_fields.items() if shell_type(field) in (int, float)]
WORDS = [name for name, field in Recipe.model_fields.items() if choices_of(field)]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_none_or_out_of_range_is_refused_by_name(name):
    for given in (-1, 1.5 if name in ("sparsity", "propagate") else -3, math.nan, math.inf, "2", True, [3]):
        with pytest.raises(RecipeError) as caught:
            Recipe(**{name: given})
        ((field, text),) = caught.value.found
        assert field == name
        assert str(given) in text


@pytest.mark.parametrize("name", WORDS)
def test_an_unknown_word_is_refused_with_those_that_are_known(name):
    with pytest.raises(RecipeError, match=f"unknown {name} 'wunda'; known are"):
        Recipe(**{name: "wunda"})


# Fields of a `Recipe`, the one that is refused, and what is said of it.
RECIPES = [
    ({"sparsity": 50}, "sparsity", "given 50; 50 % is 0.5"),
    ({"sparsity": 1.0}, "sparsity", "given 1.0"),
    ({"method": "obs"}, "method", "known are best, maiht, admm"),
    ({"method": Wanda}, "method", "given <class"),
    ({"method": "wanda", "ridge": 0.1}, "method", "given 0.1"),
    ({"method": "wanda", "preset": "paper"}, "method", "given preset 'paper'"),
    ({"method": "wanda", "penalty": "mcp"}, "method", "accepts a penalty"),
    ({"train_epochs": Reconstruction(learning_rate=-1.0)}, "train_epochs", "given -1.0"),
    ({"seqlen": 1}, "seqlen", "given 1"),
    ({"seed": 3} | PYDOC, "seed", "'spread'"),
    ({"windows": 1} | NINE, "windows", "given 1"),
    ({"bos": "yes"} | NINE, "bos", "put BOS in front"),
    ({"documents": "separate"} | NINE, "documents", "as they are"),
    ({"window_choice": "random"} | SELF, "window_choice", "'self'"),
    ({"split": "train"} | SELF, "split", "'self'"),
    ({"split": "train"} | PYDOC, "calibration", "split 'train'"),
    ({"column": "body"} | PYDOC, "calibration", "column 'body'"),
    ({"calibration": None}, "calibration", "given None"),
    ({"calibration": "json:x"}, "calibration", "'json:x'; known are pydoc"),
    ({"score": "self"}, "score", "'self'"),
    ({"pattern": 124}, "pattern", "given 124"),
    ({"pattern": "sideways"}, "pattern", "'sideways'; known are"),
    ({"pattern": "1:4", "sparsity": 0.5}, "pattern", "0.75, which contradicts"),
    ({"pattern": "per-row", "penalty": so.L1(1.0)}, "penalty", "'per-row'"),
    ({"pattern": "unstructured", "permute": True}, "permute", "'unstructured'"),
    ({"pattern": "4:4", "permute": True}, "permute", "'4:4'"),
    ({"pattern": "2:4", "permute": True, "ignore": ["q_proj"]}, "permute", "ignore"),
    ({"masks": "pruned", "pattern": "2:4", "sparsity": 0.2} | CURVES, "masks", "'2:4'"),
    ({"bounds": (0.6, 0.3)} | CURVES, "bounds", "given (0.6, 0.3)"),
    ({"bounds": (0.3, 0.6), "allocation": "uniform"}, "allocation", "'uniform'"),
    ({"bounds": (0.1, 0.5), "pattern": "2:4", "sparsity": 0.3} | CURVES, "allocation", "'2:4'"),
    ({"bounds": (0.3, 0.6), "sparsity": 0.7} | CURVES, "allocation", "0.3 and 0.6"),
    ({"bounds": (0.6, 0.8), "sparsity": 0.5} | CURVES, "allocation", "0.6 and 0.8"),
    ({"pattern": "2:4", "sparsity": 0.5} | CURVES, "allocation", "given 0.5"),
    ({"pattern": "2:4", "sparsity": 0.0} | CURVES, "allocation", "given 0;"),
    ({"ignore": ["re:("]}, "ignore", "'re:('"),
    ({"targets": ["re:"]}, "targets", "given 're:'"),
    ({"targets": 3}, "targets", "given 3"),
    ({"targets": "q_proj=0.6,k_proj"}, "targets", "'q_proj=0.6,k_proj'"),
    ({"targets": "q_proj=0.6,q_proj=0.5"}, "targets", "'q_proj=0.6,q_proj=0.5'"),
    ({"targets": ["q_proj", ["k_proj", 0.5]]}, "targets", "'k_proj'"),
    ({"targets": {"q_proj": 1.0}}, "targets", "'q_proj': sparsity must lie in [0, 1), given 1.0"),
    ({"targets": {"q_proj": "half"}}, "targets", "given 'half'"),
    ({"targets": {"q_proj": 0.6}, "pattern": "2:4"}, "targets", "'2:4'"),
    ({"targets": {"q_proj": 0.6}} | CURVES, "targets", "'curves'"),
    # What went with version 0.3 or before says what to give instead.
    ({"allocation": "owl"}, "allocation", "has ended"),
    ({"pack": True}, "pack", "`bits`"),
]


@pytest.mark.parametrize(("fields", "field", "words"), RECIPES)
def test_a_recipe_that_cannot_be_is_refused(fields, field, words):
    with pytest.raises(RecipeError) as caught:
        Recipe(**{"method": "maiht"} | fields)
    ((refused, text),) = caught.value.found
    assert refused == field
    assert words in text


def test_all_that_is_wrong_is_listed():
    with pytest.raises(RecipeError) as caught:
        Recipe(method="x", sparsity=2, windows=0, pattern="1:4", seed=-1)
    assert {field for field, _ in caught.value.found} == {"method", "sparsity", "windows", "seed"}


# What the tiny Llama cannot have, and tokens that it cannot see; a dry run says so too.
MODEL = [
    ({"pattern": "block:32x8", "sparsity": 0.6}, r"layers.0.self_attn.k_proj: .*leaves 16 outputs"),
    ({"pattern": "2:5"}, r"model.layers.0.self_attn.q_proj: .*divisible by 5"),
    ({"pattern": "group:5", "sparsity": 0.6}, r"layers.0.self_attn.q_proj: .*leaves 2 over"),
    ({"pattern": "block:4x8", "method": "sparsegpt"}, "q_proj: sparsegpt"),
    ({"expert_tokens": "all"}, "expert_tokens 'all' .* this llama model is none"),
    ({"targets": ["mlp.down_porj"]}, "'mlp.down_porj' matches no layer; did you mean 'mlp.down_proj'"),
    ({"ignore": ["xyz"]}, "ignore: 'xyz' matches no layer; names end in .*q_proj"),
    ({"targets": ["re:layers"]}, "'re:layers' matches no layer; .* such as model.layers.0"),
    ({"targets": ["lm_head"]}, "'lm_head' matches lm_head, but only layers of the blocks"),
    ({"targets": {"norm": 0.5}}, "'norm' matches model.norm, but only layers of the blocks"),
    ({"ignore": ["re:.*"]}, r"none of 21 is left with ignore \('re:.\*',\)"),
    ({"targets": {"re:.*": 0.0}}, "none of 21 is left with targets {'re:.*': 0.0}"),
    ({"targets": []}, r"none of 21 is left with targets \(\)"),
    ({"ignore": ["mlp.down_proj"], "targets": {"down_proj": 0.5}}, r"'down_proj' is given 0.5, but ignore"),
    ({"keep_zeros": True}, "no zero in any layer: leave keep_zeros out"),
    ({"masks": "wider"}, r"9 of 21 layers differ; .*gate_proj.* \[96, 32\].*expected \[64, 32\]"),
    ({"masks": "planted"}, r"7 of 21 layers differ; model.layers.2.* is not there"),
    ({"heldout_windows": 12}, "leave none for calibration"),
    ({"calibration": np.full((6, 8), 999)}, "999.*another tokenizer"),
    ({"calibration": np.ones((6, 8))}, r"integers of shape \[windows, seqlen\]"),
    ({"calibration": ["the " * 99], "seqlen": 2, "bos": "yes", "windows": 1}, "windows of 2 tokens .* BOS"),
]


SHRINKS = [
    ({}, "nothing would go"),
    ({"channels": 0.0, "layers": 0.0}, "channels and layers 0"),
    ({"channels": 0.5, "method": "sparsegpt"}, "unknown method 'sparsegpt'"),
    ({"channels": 0.5, "distil_epochs": Distillation(epochs=0, clip=0)}, "epochs .*given 0\n  clip .*given 0"),
    ({"channels": 0.5, "multiple": 48}, "channels 0.5 would keep 32 of 64 .*, multiples of 48; give 0.75 for 48"),
    ({"channels": 0.03}, "channels 0.03 would keep 1.92 of 64 .*; give 0.125 for 8"),
    ({"heads": 0.7}, "heads 0.7 would keep 1.4 of 2 .*; give 0.5 for 1 or 1 for 2"),
    ({"layers": 0.5}, "layers 0.5 would keep 1.5 of 3 blocks; give 0.3333 for 1 or 0.6667 for 2"),
    ({"experts": 0.5}, "experts 0.5 is for mixtures"),
    ({"experts": 0.5, "expert_tokens": "all"}, "expert_tokens 'all'"),
    ({"parameters": 1.0}, r"parameters .*given 1"),
    ({"parameters": 0.0}, "parameters 0"),
    ({"parameters": 0.5, "channels": 0.5, "layers": 0.5}, "leave channels and layers out"),
    ({"parameters": 0.1}, r"parameters 0.1 is too little: .* the model has 0\.\d+ of its parameters"),
    ({"latency": 0.8}, "latency has ended: `parameters`"),
    ({"heads": 0.5, "model": "olmo2"}, "heads 0.5 would keep 1 of 2 .*; give 1 for 2"),
    ({"experts": 0.25, "model": "mixtral"}, "experts=1, expected a whole number from 2 to 4"),
]


@pytest.mark.parametrize(
    ("kind", "fields", "words"), [*((Recipe, *row) for row in MODEL), *((ShrinkRecipe, *row) for row in SHRINKS)]
)
def test_what_a_model_cannot_have_is_refused_before_any_work(tmp_path, models, tokens, kind, fields, words):
    small = {"heldout_windows": 2, "multiple": 8, "train_epochs": 0}
    given = {"calibration": tokens % 40} | ({"method": "maiht"} if kind is Recipe else small) | fields
    source = models(given.pop("model", "llama"))
    if "masks" in given:
        given["masks"] = str(models(given["masks"]))
    for call in (prune_model, dry_run):
        with pytest.raises(ValueError, match=f"(?m){words}"):
            call(source, tmp_path / "out", kind(**given))
    assert not (tmp_path / "out").exists()


GROUPS = {"pattern": "group:4", "method": "osscar"}
LAYERS = [
    ({"output_weights": np.ones(3)}, r"output_weights .*\[48\], given \[3\]"),
    ({"output_weights": np.zeros(48)}, "output_weights .*given is 0"),
    ({"output_weights": np.full(48, np.nan)}, "output_weights has 48 NaN"),
    ({"support": np.ones((64, 48), bool)}, r"support .*\[48, 64\] .*given bool \[64, 48\]"),
    ({"support": np.ones((48, 64), bool)} | GROUPS, "osscar .*methods 'admm'"),
]


@pytest.mark.parametrize(("given", "words"), LAYERS)
def test_what_a_layer_cannot_have_is_refused(rng, given, words):
    weight, gram, _ = make_layer(rng)
    with pytest.raises(ValueError, match=words):
        prune_layer(weight, gram, 0.5, **given)


@pytest.mark.parametrize(
    ("scale", "entry", "dtype", "words"),
    [
        (1, np.nan, None, "holds 1 NaN"),
        (1, 7e4, "float16", "up to 70000, which float16 cannot hold"),
        (1e-7, 0.3, "float16", r"9\d\d values .*float16 makes 0"),
    ],
)
def test_weights_that_cannot_be_stored_are_named(tmp_path, tokens, scale, entry, dtype, words):
    key, tensors = "model.layers.1.mlp.down_proj.weight", tensors_of("square")
    tensors[key] *= np.float32(scale)
    tensors[key][3, 4] = entry
    source = write_model(tmp_path / "source", "square", tensors)
    with pytest.raises(ModelError, match=f"{key} .*{words}"):
        prune_model(
            source, tmp_path / "out", Recipe(method="wanda", calibration=tokens, heldout_windows=2, dtype=dtype)
        )
    # What a dtype cannot hold is found when it is stored.
    assert (tmp_path / "out").exists() == (dtype is not None)


def test_folders_that_hold_something_else_are_left_alone(tmp_path, source, tokens):
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    before, recipe = sorted(source.rglob("*")), Recipe(method="magnitude", calibration=tokens)
    for output in (source / "out", tmp_path / "link" / "deep" / "out"):
        with pytest.raises(ModelError, match="out lies in the model's folder"):
            prune_model(source, output, recipe)
    with pytest.raises(FolderError, match=r"not empty \(it holds thesis.tex\)"):
        prune_model(source, tmp_path / "full", recipe)
    assert sorted(source.rglob("*")) == before
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(ModelError, match=r"no model at .*nothing"):
        masks(tmp_path / "nothing")


@pytest.mark.parametrize(("option", "given"), [("devices", 64), ("memory", "8")])
def test_devices_and_memory_that_are_not_there_are_refused(tmp_path, source, tokens, option, given):
    with pytest.raises(ValueError, match=f"given {given!r}"):
        prune_model(source, tmp_path / "out", Recipe(calibration=tokens), **{option: given})
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_loaded_whole_refuses_what_is_for_known_families(tmp_path, source, tokens, monkeypatch):
    foreign = object.__new__(LoadedModel)
    foreign.config, foreign.source = SimpleNamespace(model_type="foreign"), open_source(source)
    monkeypatch.setattr(pipeline, "open_any", lambda _: foreign)
    smaller = ShrinkRecipe(calibration=tokens, channels=0.5, multiple=8)
    for recipe, words in (
        (Recipe(bits="int8", masks="x"), r"foreign model.* bits, masks"),
        (Recipe(output_weights="gradient", expert_tokens="all"), r"output_weights='gradient'.*\n  expert_tokens='all'"),
        (smaller, "smaller models are made of known families"),
    ):
        with pytest.raises(ValueError, match=words):
            prune_model("any", tmp_path / "out", recipe)
    monkeypatch.setattr(pipeline, "device_line", lambda _: SimpleNamespace(size=2))
    with pytest.raises(ValueError, match=r"a foreign model.* one device; given 2"):
        prune_model("any", tmp_path / "out", devices=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: magnitude\nwindow: 4", "line 2: window: .*'windows'"),
        ("method: wanda\nseqlen: half", "line 2: seqlen .*given 'half'"),
        ("sparsity_stage: {}", "llm-compressor"),
        ("- a", "mapping"),
        (None, "there is no file"),
    ],
)
def test_mistakes_in_a_recipe_file_are_named_with_their_line(tmp_path, text, words):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        Recipe.from_yaml(tmp_path / "recipe.yaml")
