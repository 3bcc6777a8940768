"""What cannot be done is refused before any work, in words that say what to change, and nothing is written.

One table for each entry point: what is asked for, and the words of the refusal.
"""

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
    shrink_model,
)
from sparseopt.pruning.train.distillation import Distillation
from sparseopt.pruning.train.reconstruction import Reconstruction
from sparseopt.system.run_folder import FolderError
from tests.layers.layers import make_layer
from tests.models.tiny import GOLDEN, tiny_config, write_folder, write_golden
from tests.pruning.whole_runs import tensors_of

NINE = np.ones((9, 9), int)
CURVES = {"allocation": "curves"}
PYDOC, SELF = {"calibration": "pydoc"}, {"calibration": "self"}
# Fields of a `Recipe` that cannot be, whatever the model.
RECIPES = [
    ({"sparsity": 1.2}, r"sparsity must lie in \[0, 1\), given 1.2"),
    ({"sparsity": 50}, r"sparsity must lie in \[0, 1\), given 50; 50 % is 0.5"),
    ({"sparsity": "0.5"}, "sparsity must be a number, given '0.5'"),
    ({"method": "alps"}, "unknown method 'alps'; known are best, maiht, admm"),
    ({"method": "obs"}, "unknown method"),
    ({"method": Wanda}, r"must be an object of a frozen dataclass .* such as Wanda\(\), given <class"),
    ({"method": 3.5}, "must be an object of a frozen dataclass .* given 3.5"),
    ({"method": "x", "sparsity": 2, "windows": 0, "seed": -1}, r"(?s)unknown method.*windows.*seed.*sparsity"),
    ({"preset": "quick"}, "unknown preset 'quick'"),
    ({"effort": "best"}, "unknown effort 'best'"),
    ({"dtype": "int8"}, "unknown dtype 'int8'; known are float32, float16, bfloat16"),
    ({"precision": "float8"}, "unknown precision 'float8'; known are highest, high, default"),
    ({"weighting": "heavy"}, r"unknown weighting 'heavy'; known are uniform, residual"),
    ({"output_weights": "hessian"}, "unknown output_weights 'hessian'; known are uniform, gradient"),
    ({"ridge": -1}, "ridge must be at least 0, given -1"),
    ({"method": "wanda", "ridge": 0.1}, r"Wanda has no ridge, given 0.1; leave the ridge out"),
    ({"propagate": 1.5}, r"propagate must lie in \[0, 1\], given 1.5"),
    ({"train_epochs": Reconstruction(learning_rate=-1.0)}, r"learning_rate must be positive and finite, given -1\.0"),
    ({"windows": 0}, "windows must be at least 1"),
    ({"method": "best", "windows": "8"}, "windows must be a whole number, given '8'"),
    ({"windows": 1}, r"windows is for text; .* there are 3 besides the held-out ones, given 1"),
    ({"heldout_windows": "4"}, "heldout_windows must be a whole number, given '4'"),
    ({"seqlen": 1}, "seqlen must be at least 2, given 1"),
    ({"seqlen": 2.5}, "seqlen must be a whole number, given 2.5"),
    ({"bos": "always"}, "unknown bos 'always'; known are auto, yes, no"),
    ({"bos": "yes"}, "token ids are taken as they are: put BOS in front of them"),
    ({"calibration": None}, "calibration must be a text, given None"),
    ({"calibration": "json:x"}, "unknown text 'json:x'; known are pydoc, file:PATH, jsonl:PATH"),
    ({"column": "body"} | PYDOC, "column 'body' is for jsonl:, csv:, parquet:, hf:, not for pydoc"),
    ({"split": "train"} | PYDOC, r"split 'train' is for data sets of the hub .*not for pydoc"),
    ({"split": "train", "calibration": ["a"]}, "not for a list of texts"),
    ({"split": "train"} | SELF, "split is for a text"),
    ({"pack": True}, "pack has ended: `bits` int8 or int4, or an output that ends in .gguf, makes a model small"),
    ({"documents": "apart"}, "unknown documents 'apart'; known are packed, separate"),
    ({"documents": "separate", "calibration": NINE}, "taken as they are: leave documents out"),
    ({"documents": "separate"} | SELF, "documents is for a text"),
    ({"window_choice": "random"} | SELF, "window_choice is for a text, and calibration 'self' has none"),
    ({"score": "self"} | SELF, "text 'self' is drawn by the model"),
    ({"pattern": 124}, "pattern must be a text, given 124"),
    (
        {"pattern": "1:4", "sparsity": 0.5, "windows": 0},
        r"(?s)windows.*'1:4' has sparsity 0.75, which con.* 0.5",
    ),
    ({"pattern": "per-row", "penalty": so.L1(1.0)}, "which contradicts the pattern 'per-row'"),
    ({"pattern": "unstructured", "permute": True}, "permute is for n:m patterns with zeros.*'unstructured'; leave it"),
    ({"pattern": "4:4", "permute": True}, "permute is for n:m patterns with zeros.*'4:4'; leave it out"),
    (
        {"masks": "pruned", "pattern": "2:4", "sparsity": 0.2} | CURVES,
        "masks has zeros for every layer, and with pattern '2:4' allocation 'curves' leaves some dense",
    ),
    ({"bounds": 0.5} | CURVES, "bounds must be two fractions of zeros, .* given 0.5"),
    ({"bounds": (0.6, 0.3)} | CURVES, "0 <= low <= high < 1, as in .* given"),
    (
        {"bounds": (0.3, 0.6), "allocation": "uniform"},
        "allocation 'uniform' fixes .* which contradicts bounds",
    ),
    ({"allocation": "even"}, "unknown allocation 'even'; known are uniform, curves"),
    ({"allocation": "owl"}, "allocation owl has ended: `curves` distributes the sparsity by measured losses"),
    (
        {"pattern": "2:4", "sparsity": 0.3, "bounds": (0.1, 0.5)} | CURVES,
        "pattern '2:4' fixes the fraction of zeros .* contradicts bounds; leave them",
    ),
    (
        {"pattern": "2:4", "sparsity": 0.5} | CURVES,
        "some layers dense, so the sparsity must lie between 0 and 0.5, given 0.5",
    ),
    (
        {"pattern": "2:4", "sparsity": 0.0} | CURVES,
        "must lie between 0 and 0.5, given 0; leave the allocation out",
    ),
    (
        {"sparsity": 0.7, "bounds": (0.3, 0.6)} | CURVES,
        "the bounds 0.3 and 0.6 cannot meet the total, a sparsity of 0.7; widen them",
    ),
    (
        {"sparsity": 0.5, "bounds": (0.6, 0.8)} | CURVES,
        "the bounds 0.6 and 0.8 cannot meet the total, a sparsity of 0.5; widen them",
    ),
    ({"ignore": ["re:("]}, r"ignore: 're:\(' is not a regular expression: missing \)"),
    ({"targets": ["re:"]}, "targets must be names of layers, or expressions after 're:'.*given 're:'"),
    ({"targets": 3}, "targets must be names of layers.*given 3"),
    ({"targets": "q_proj=0.6,k_proj"}, "targets must be patterns, or different patterns with a sparsity each"),
    ({"targets": "q_proj=0.6,q_proj=0.5"}, "different patterns with a sparsity each.*'q_proj=0.6,q_proj=0.5'"),
    ({"targets": ["q_proj", ["k_proj", 0.5]]}, r"patterns, or a table as in \{'down_proj': 0.6\}, given"),
    ({"sparsities": {"q_proj": 0.5}}, "sparsities is a table in `targets` since 0.3"),
    ({"targets": {"q_proj": 1.0}}, r"targets: 'q_proj': sparsity must lie in \[0, 1\), given 1.0"),
    ({"targets": {"q_proj": "half"}}, r"targets: 'q_proj' must have a number in \[0, 1\), given 'half'"),
    ({"targets": {"q_proj": 0.6}, "pattern": "2:4"}, "'q_proj': pattern '2:4' has sparsity 0.5, which"),
    ({"targets": {"q_proj": 0.6}} | CURVES, "which allocation 'curves' is to choose: leave one of"),
]
# What the tiny Llama cannot have; a dry run says so too.
MODEL = [
    ({"pattern": "block:32x8", "sparsity": 0.6}, r"layers.0.self_attn.k_proj: .*out=16, in=32\] leaves 16 outputs"),
    ({"pattern": "2:5"}, r"model.layers.0.self_attn.q_proj: .*divisible by 5"),
    ({"pattern": "3:5"}, r"self_attn\.q_proj: .*3:5"),
    ({"pattern": "group:5", "sparsity": 0.6}, r"layers.0.self_attn.q_proj: .*divisible by 5; .* leaves 2 over"),
    ({"pattern": "block:4x8", "method": "sparsegpt"}, r"q_proj: sparsegpt decides input by input"),
    ({"expert_tokens": "all"}, r"'all' is for mixtures .* this llama model is none; leave it out"),
    ({"targets": ["mlp.down_porj"]}, "'mlp.down_porj' matches no layer; did you mean 'mlp.down_proj'"),
    ({"ignore": ["up_porj"]}, "the layers to prune cannot be chosen:\n  ignore: 'up_porj'"),
    ({"ignore": ["xyz"]}, "ignore: 'xyz' matches no layer; names end in .*q_proj, .*down_proj$"),
    ({"targets": ["re:layers"]}, "from the start of names such as model.layers.0.*leave targets out"),
    ({"targets": ["lm_head"]}, "'lm_head' matches lm_head, but only layers of the blocks are pruned"),
    ({"targets": ["re:.*embed"]}, "matches model.embed_tokens, but only layers of the blocks"),
    ({"targets": {"norm": 0.5}}, "targets: 'norm' matches model.norm, but only layers"),
    ({"ignore": ["re:.*"]}, r"none of 21 is left with ignore \('re:.\*',\); change one"),
    ({"targets": {"re:.*": 0.0}}, "none of 21 is left with targets {'re:.*': 0.0}"),
    ({"targets": []}, r"none of 21 is left with targets \(\)"),
    (
        {"ignore": ["mlp.down_proj"], "targets": {"down_proj": 0.5}},
        r"'down_proj' is given 0.5, but ignore leaves none of its layers \(model.layers.0.mlp.down_proj",
    ),
]
# Tokens and texts that it cannot see.
TOKENS = [
    ({"heldout_windows": 12}, "leave none for calibration"),
    ({"calibration": np.full((6, 8), 999)}, "made with another tokenizer"),
    ({"calibration": [[1, 2, 3], [1, 2]]}, "must have the same number of tokens"),
    ({"calibration": np.ones((6, 8))}, r"integers of shape \[windows, seqlen\]"),
    ({"calibration": "wiki", "seqlen": 24}, "unknown text 'wiki'"),
    (
        {"calibration": ["the " * 99], "seqlen": 2, "bos": "yes", "windows": 1},
        "windows of 2 tokens predict nothing after BOS; give a longer seqlen",
    ),
]


@pytest.mark.parametrize(("fields", "words"), RECIPES + MODEL + TOKENS)
def test_a_recipe_that_cannot_be_is_refused_before_any_work(tmp_path, source, tokens, fields, words):
    given = {"method": "maiht", "calibration": tokens} | fields
    with pytest.raises(ValueError, match=f"(?m){words}"):
        prune_model(source, tmp_path / "out", Recipe(**given))
    assert not (tmp_path / "out").exists()
    if (fields, words) in MODEL:
        with pytest.raises(ValueError, match=f"(?m){words}"):
            dry_run(source, tmp_path / "out", Recipe(**given))


SHRINKS = [
    ({}, "nothing would go: give channels, heads, layers or experts below 1, or a budget"),
    ({"channels": 0.0, "layers": 0.0}, "channels and layers 0 leave nothing: give a fraction above 0"),
    ({"heads": 1.2}, r"heads must lie in \[0, 1\], given 1.2"),
    ({"channels": 0.5, "method": "wunda"}, "unknown method 'wunda'"),
    ({"channels": 0.5, "method": "sparsegpt"}, "unknown method .sparsegpt."),
    ({"channels": 0.5, "distil_epochs": -1}, "distil_epochs must be at least 0, given -1"),
    (
        {"channels": 0.5, "distil_epochs": Distillation(epochs=0, clip=0)},
        "the distillation cannot be used:\n  epochs must be .*\n  clip must be positive",
    ),
    (
        {"channels": 0.5, "multiple": 48},
        "channels 0.5 would keep 32 of 64 MLP channels, multiples of 48; give 0.75 for 48",
    ),
    ({"channels": 0.03}, "channels 0.03 would keep 1.92 of 64 MLP channels, .*; give 0.125 for 8"),
    ({"heads": 0.7}, "heads 0.7 would keep 1.4 of 2 key-value groups; give 0.5 for 1 or 1 for 2"),
    ({"layers": 0.5}, "layers 0.5 would keep 1.5 of 3 blocks; give 0.3333 for 1 or 0.6667 for 2"),
    ({"experts": 0.5}, "experts 0.5 is for mixtures of experts, and this model has none; leave it out"),
    ({"experts": 0.5, "expert_tokens": "all"}, "removed by what they add to the tokens routed to them"),
    ({"parameters": 1.0}, r"parameters must lie in \[0, 1\), given 1"),
    ({"parameters": 0.0}, "parameters 0 leave nothing"),
    ({"parameters": 0.5, "channels": 0.5, "layers": 0.5}, "leave channels and layers out"),
    ({"parameters": 0.1}, r"parameters 0.1 is too little: .* the model has 0\.\d+ of its parameters"),
    ({"latency": 0.8}, "latency has ended: `parameters` is the budget"),
    ({"layers": 0.67, "block_score": "cosine"}, "block_score has ended: blocks are always removed by the loss"),
    ({"heads": 0.5, "model": "olmo2"}, r"heads 0.5 would keep 1 of 2 key-value groups; give 1 for 2"),
    ({"experts": 0.25, "model": "mixtral"}, "experts=1, expected a whole number from 2 to 4"),
]


@pytest.mark.parametrize(("fields", "words"), SHRINKS)
def test_sizes_that_cannot_be_are_refused_before_any_work(tmp_path, source, tokens, fields, words):
    fields = {"calibration": tokens % 40, "heldout_windows": 2, "multiple": 8, "train_epochs": 0} | fields
    if golden := fields.pop("model", None):
        source = tmp_path / golden
        write_golden(GOLDEN / f"{golden}.npz", source)
    with pytest.raises(ValueError, match=words):
        shrink_model(source, tmp_path / "out", ShrinkRecipe(**fields))
    assert not (tmp_path / "out").exists()


LAYERS = [
    ({"output_weights": np.ones(3)}, r"output_weights must be \[out\] = \[48\], given \[3\]"),
    ({"output_weights": np.zeros(48)}, "output_weights must be above 0, the smallest given is 0"),
    ({"output_weights": np.full(48, np.nan)}, "output_weights has 48 NaN or infinite entries"),
    ({"support": np.ones((64, 48), bool)}, r"support must be bool \[out, in\] = \[48, 64\] .*given bool \[64, 48\]"),
    (
        {"support": np.ones((48, 64), bool), "pattern": "group:4", "method": "osscar"},
        r"osscar .* cannot keep single weights at zero; methods 'admm'",
    ),
]


@pytest.mark.parametrize(("given", "words"), LAYERS)
def test_what_a_layer_cannot_have_is_refused(rng, given, words):
    weight, gram, _ = make_layer(rng)
    with pytest.raises(ValueError, match=words):
        prune_layer(weight, gram, 0.5, **given)


@pytest.mark.parametrize(
    ("part", "scale", "entry", "dtype", "words"),
    [
        ("2.mlp.up", 1, np.nan, None, r"holds 1 NaN or infinite"),
        ("1.mlp.down", 1, 7e4, "float16", r"values up to 70000, which float16 cannot hold: choose dtype bfloat16"),
        (
            "1.mlp.down",
            1e-7,
            0.3,
            "float16",
            r"2,0\d\d values as small as .*e-.*, which float16 makes 0: choose",
        ),
    ],
)
def test_weights_that_cannot_be_stored_are_named(tmp_path, tokens, part, scale, entry, dtype, words):
    key, tensors = f"model.layers.{part}_proj.weight", tensors_of("llama")
    tensors[key] *= np.float32(scale)
    tensors[key][3, 4] = entry
    source = write_folder(tmp_path / "source", tiny_config(), tensors)
    with pytest.raises(ModelError, match=f"{key} .*{words}"):
        prune_model(source, tmp_path / "out", Recipe(method="magnitude", calibration=tokens, dtype=dtype))
    # What a dtype cannot hold is found when it is stored.
    assert (tmp_path / "out").exists() == (dtype is not None)


def test_masks_that_cannot_be_kept_are_refused_before_any_work(tmp_path, source, models, tokens):
    wider, deeper = models("wider"), models("deeper")
    groups = {"pattern": "group:4", "sparsity": 0.5, "method": "best"}
    for model, fields, words in [
        (source, {"keep_zeros": True}, "has no zero in any layer: leave keep_zeros out"),
        (source, {"masks": str(source)} | groups, r"q_proj: osscar"),
        (source, {"masks": str(wider)}, r"9 of 21 layers differ; .*gate_proj.* \[96, 32\].*expected \[64, 32\]"),
        (deeper, {"masks": str(source)}, r"7 of 28 layers differ; model.layers.3.*is not there"),
    ]:
        with pytest.raises(ValueError, match=words):
            prune_model(model, tmp_path / "out", Recipe(calibration=tokens, **fields))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="no model at"):
        masks(tmp_path / "nothing")


def test_folders_that_hold_something_else_are_left_alone(tmp_path, source, tokens):
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    before, recipe = sorted(source.rglob("*")), Recipe(method="magnitude", calibration=tokens)
    for output in (source / "out", tmp_path / "link" / "deep" / "out"):
        with pytest.raises(ModelError, match=r"the output folder .*out lies in the model's folder .*; choose another"):
            prune_model(source, output, recipe)
    with pytest.raises(FolderError, match=r"not empty \(it holds thesis.tex\)"):
        prune_model(source, tmp_path / "full", recipe)
    assert sorted(source.rglob("*")) == before
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": 64}, r"devices must be a number from 1 to 1.*given 64"),
        ({"memory": "8"}, "given '8'"),
        ({"memory": "100MiB"}, r"a budget of 100\.0 MiB is too little: .*(libraries 300\.0 MiB).*at least"),
        ({"memory": "100MiB"}, r"in phase Grams .*less to do: heldout_windows=0 .* one set of Grams only"),
    ],
)
def test_devices_and_memory_that_are_not_there_are_refused(tmp_path, source, tokens, options, words):
    recipe = Recipe(calibration=tokens, heldout_windows=2, preset="paper")
    with pytest.raises(ValueError, match=words):
        prune_model(source, tmp_path / "out", recipe, **options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_loaded_whole_refuses_what_is_for_known_families(tmp_path, source, tokens, monkeypatch):
    class Foreign(LoadedModel):
        def __init__(self):
            self.config = SimpleNamespace(model_type="foreign")
            self.source = open_source(source)

    monkeypatch.setattr(pipeline, "open_any", lambda _: Foreign())
    for recipe, words in (
        (Recipe(bits="int8", variants=2), "foreign model, whose family is not known here, and bits, variants cannot"),
        (Recipe(output_weights="gradient", expert_tokens="all"), r"output_weights='gradient'.*\n  expert_tokens='all'"),
        (ShrinkRecipe(calibration=tokens, channels=0.5, multiple=8), "smaller models are made of known families"),
    ):
        with pytest.raises(ValueError, match=words):
            prune_model("any", tmp_path / "out", recipe)
    monkeypatch.setattr(pipeline, "device_line", lambda _: SimpleNamespace(size=2))
    with pytest.raises(ValueError, match=r"a foreign model.*is loaded whole on one device; given 2: leave devices out"):
        prune_model("any", tmp_path / "out", devices=2)
    assert not (tmp_path / "out").exists()


FILES = [
    ("method: magnitude\nwindow: 4", "line 2: window: no such key; did you mean 'windows'?"),
    ("sparsity_stage: {}", "it is one of llm-compressor's recipes; the documentation has a page on coming from it"),
    ("method: wanda\nseqlen: half", "line 2: seqlen must be a whole number, given 'half'"),
    ("ignore: ['re:(']", "ignore: 're:(' is not a regular expression"),
    ("- a", "must hold a mapping of settings"),
    (None, "there is no file"),
]


@pytest.mark.parametrize(("text", "words"), FILES)
def test_mistakes_in_a_recipe_file_are_named_with_their_line(tmp_path, command, text, words):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    status, _, err = command("prune", "nowhere", "--output", tmp_path / "out", "--recipe", file)
    assert (status, words in err) == (2, True), err


COMMANDS = [
    *((f"--devices={n}", f"--devices must be a whole number from 1, or all, given '{n}'") for n in ("0", "some", "-1")),
    ("--pattern=sideways", "unknown pattern 'sideways'; known are 'unstructured', 'per-row'"),
    ("--memory=1MiB", "a budget of 1.0 MiB is too little"),
]


@pytest.mark.parametrize(("option", "words"), COMMANDS)
def test_the_command_refuses_with_status_2(tmp_path, source, text, command, option, words):
    few = ("--calibration", text, "--windows", 4, "--seqlen", 24, "--method", "wanda")
    status, _, err = command("prune", source, "--output", tmp_path / "out", *few, option)
    assert (status, words in err) == (2, True), err
    assert not (tmp_path / "out").exists()
