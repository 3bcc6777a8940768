"""A whole tiny model through the pipeline and the command: what is written, reported and refused."""

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import sparseopt as so
from sparseopt.layers.compiled import Compiled
from sparseopt.models import ModelError, load_decoder, open_model, open_source
from sparseopt.models.files.safetensors import write_tensors
from sparseopt.pruning import PruningError, Recipe, Wanda, audit_sparsity, perplexity, prune_model
from sparseopt.pruning.base.activations import Batches, make_batches
from sparseopt.pruning.base.grams import BlockRunner, gather_grams
from sparseopt.pruning.base.records import Calibration, Footprint, Passed
from sparseopt.pruning.inspection import inspect_model
from sparseopt.pruning.run.facts import run_facts
from sparseopt.system.run_folder import FolderError
from tests.jitted import run
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder, write_gguf
from tests.tiers import often


def make_tokens(rng, windows, length=24):
    """Windows with repeated phrases, so that inputs are correlated as real text's are."""
    phrases = rng.integers(0, len(VOCAB), (6, length // 3))
    return phrases[rng.integers(0, 6, (windows, 3))].reshape(windows, length).astype(np.int32)


@pytest.fixture
def source(tmp_path, rng):
    return write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng), shards=2)


@pytest.fixture
def recipe(rng):
    return Recipe(method="maiht", calibration=make_tokens(rng, 12), heldout_windows=4)


@pytest.mark.parametrize(
    ("method", "preset"),
    often([("maiht", "paper"), ("maiht", "tuned"), ("wanda", None)], ("maiht", "tuned"), ("wanda", None)),
)
def test_every_linear_has_the_exact_count_and_nothing_else_changes(tmp_path, source, recipe, method, preset):
    recipe = Recipe(method=method, preset=preset, sparsity=0.6, calibration=recipe.calibration)
    report = prune_model(source, tmp_path / "out", recipe)
    before, after = open_model(source), open_model(tmp_path / "out")
    pruned = {f"{audit.layer}.weight" for audit in audit_sparsity(after)}
    assert len(pruned) == 3 * 7
    for audit in audit_sparsity(after):
        assert audit.zeros == audit.size - round(0.4 * audit.size), audit.layer
    for key in before.source.tensors.keys() - pruned:
        assert before.source.read(key).tobytes() == after.source.read(key).tobytes(), key
    assert after.source.config == before.source.config
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert report.layer_compilations <= len({r.shape for r in report.layers})


def test_blocks_see_the_pruned_blocks_before_them(tmp_path, source, recipe):
    """The recorded error of the last block is the one on activations of the pruned model, recomputed here."""
    report = prune_model(source, tmp_path / "out", recipe)
    dense, pruned = load_decoder(source), load_decoder(tmp_path / "out")
    tokens = jnp.asarray(recipe.calibration[:8])
    x = run(pruned.embed_tokens, tokens)
    for block in list(pruned.layers)[:-1]:
        x = run(block, x)
    last = len(pruned.layers) - 1
    grams = gather_grams(dense.layers[last], x)
    for name, tap in dense.layers[last].linears.items():
        weight = np.asarray(dense.layers[last].read(f"{name}.weight"), np.float64)
        change = np.asarray(pruned.layers[last].read(f"{name}.weight"), np.float64) - weight
        gram = np.asarray(grams[tap].gram, np.float64)
        error = np.sum(change @ gram * change) / np.sum(weight @ gram * weight)
        record = next(r for r in report.layers if r.layer == f"model.layers.{last}.{name}")
        assert record.relative_error == pytest.approx(error, rel=1e-3), name
        assert record.heldout_error > 0


def test_grams_are_those_of_the_linears_inputs(source, recipe):
    model = open_model(source)
    block = model.block(0)
    x = model.embedding()(jnp.asarray(recipe.calibration))
    runner = BlockRunner()
    grams = runner.grams(block, make_batches(x))
    normed = np.asarray(block.attention_norm(x), np.float64).reshape(-1, x.shape[-1])
    np.testing.assert_allclose(grams["attention_input"].gram, normed.T @ normed, rtol=1e-4, atol=1e-4)
    assert set(grams) == set(block.linears.values())
    assert grams["mlp_hidden"].gram.shape == (64, 64)
    for name in ("mlp_input", "attention_output"):
        assert np.linalg.eigvalsh(np.asarray(grams[name].gram, np.float64))[0] > -1e-3
    first = Compiled.seconds
    runner.grams(model.block(1), make_batches(x))
    assert Compiled.seconds == first
    runner.forward(model.block(1), make_batches(x))
    second = Compiled.seconds
    runner.forward(model.block(2), make_batches(x))
    assert Compiled.seconds == second
    assert runner.seconds > 0


def test_grams_of_many_batches_keep_their_precision(source):
    """Blocked sums in float32: relative to the inputs' norms an entry is off by some 1e-7 after 64 batches."""
    model, rng = open_model(source), np.random.default_rng(3)
    block = model.block(0)
    batches = [jnp.asarray(rng.normal(0.5, 1.0, (4, 32, 32)), jnp.float32) for _ in range(64)]
    found = np.asarray(BlockRunner().grams(block, Batches(batches))["attention_input"].gram, np.float64)
    x = np.concatenate([np.asarray(block.attention_norm(b), np.float64).reshape(-1, 32) for b in batches])
    norms = np.linalg.norm(x, axis=0)
    assert np.max(np.abs(found - x.T @ x) / np.outer(norms, norms)) < 1e-6


def test_batches_split_evenly_and_keep_the_order():
    x = jnp.arange(14 * 1024 * 2, dtype=jnp.float32).reshape(14, 1024, 2)
    batches = make_batches(x)
    assert {b.shape[0] for b in batches} == {2}
    np.testing.assert_array_equal(jnp.concatenate(list(batches)), x)


@pytest.mark.parametrize("dtype", often([np.float16, ml_dtypes.bfloat16], ml_dtypes.bfloat16))
def test_half_precision_models_keep_their_dtype(tmp_path, rng, recipe, dtype):
    config = tiny_config(dtype=np.dtype(dtype).name)
    (tmp_path / "source").mkdir()
    write_tensors(tmp_path / "source" / "model.safetensors", random_tensors(config, rng, dtype))
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    prune_model(tmp_path / "source", tmp_path / "out", recipe.model_copy(update={"method": "wanda"}))
    stored = open_model(tmp_path / "out").source
    assert {info.dtype for info in stored.tensors.values()} == {np.dtype(dtype)}
    assert all(audit.zeros == audit.size // 2 for audit in audit_sparsity(tmp_path / "out"))


def test_another_dtype_is_stored_when_asked_for(tmp_path, source, recipe):
    chosen = Recipe(method="wanda", calibration=recipe.calibration, dtype="bfloat16")
    prune_model(source, tmp_path / "out", chosen)
    model = open_model(tmp_path / "out")
    assert {str(info.dtype) for info in model.source.tensors.values()} == {"bfloat16"}
    assert model.source.config["dtype"] == "bfloat16"


def test_run_folder_tells_the_whole_story(tmp_path, source, recipe):
    seen = []
    report = prune_model(source, tmp_path / "out", recipe, observer=lambda *told: seen.append(told))
    assert [type(event) for event, _, _ in seen[:2]] == [Calibration, Footprint]
    seen = [told for told in seen if not isinstance(told[0], Passed)]
    assert [done for _, done, _ in seen[1:]] == list(range(22))
    seen = [(event.layer, total) for event, _, total in seen[2:]]
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [r["layer"] for r in records] == [layer for layer, _ in seen] == [r.layer for r in report.layers]
    assert {n for _, n in seen} == {21}
    assert all(r["sparsity"] == 0.5 and r["status"] == "CONVERGED" for r in records)
    assert summary["sparsity"] == 0.5
    assert summary["recipe"]["calibration"] == "token ids of shape [12, 24]"
    assert summary["calibration"] == {
        "windows": 8, "variants": 0, "heldout_windows": 4, "seqlen": 24, "inputs": 64, "why": None, "warning": None,
        "digest": hashlib.sha256(np.asarray(recipe.calibration, "<i4").tobytes()).hexdigest()[:16],
    }  # fmt: skip
    assert summary["versions"]["sparseopt"] == so.__version__
    assert summary["peak_memory_bytes"] > 0


def test_the_same_run_twice_gives_the_same_bytes(tmp_path, source, recipe):
    for name in ("a", "b"):
        prune_model(source, tmp_path / name, recipe)
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_maiht_hurts_less_than_wanda(tmp_path, source, rng, recipe):
    tokens = make_tokens(rng, 8)
    dense = run(load_decoder(source), tokens)
    loss = {}
    for method in ("maiht", "wanda"):
        prune_model(source, tmp_path / method, Recipe(method=method, calibration=recipe.calibration))
        loss[method] = np.mean((np.asarray(run(load_decoder(tmp_path / method), tokens)) - dense) ** 2)
    assert loss["maiht"] < loss["wanda"]


def test_perplexity_is_that_of_the_whole_models_logits(source, rng):
    tokens = make_tokens(rng, 5, length=30)
    logits = np.asarray(run(load_decoder(source), tokens), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=2)
    assert perplexity(source, tokens) == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)
    assert perplexity(load_decoder(source), tokens) == pytest.approx(perplexity(source, tokens), rel=1e-5)
    flat = np.concatenate([tokens.ravel(), tokens[0, :7]])
    assert perplexity(source, flat, seqlen=30) == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tmp_path, rng):
    config = tiny_config(max_position_embeddings=512)
    tensors = random_tensors(config, rng)
    tensors["model.norm.weight"][:] = 0
    folder = write_folder(tmp_path / "m", config, tensors)
    assert perplexity(folder, make_tokens(rng, 2, length=300)) == pytest.approx(len(VOCAB), rel=1e-5)


def test_bad_tokens_are_refused(source):
    with pytest.raises(ValueError, match="10 tokens are fewer than one window of 16"):
        perplexity(source, np.arange(10), seqlen=16)
    with pytest.raises(ValueError, match=f"must lie in 0..{len(VOCAB) - 1}, given 0..9999"):
        perplexity(source, np.array([[0, 9999]]))
    with pytest.raises(ValueError, match="must be integers"):
        perplexity(source, np.ones((2, 8)))
    with pytest.raises(ValueError, match="must have the same number of tokens"):
        perplexity(source, [[1, 2, 3], [1, 2]])
    with pytest.raises(ValueError, match="2 tokens or more to predict one, given seqlen 1"):
        perplexity(source, np.arange(10), seqlen=1)


BAD_RECIPES = {
    "sparsity": ({"sparsity": 1.2}, r"sparsity must lie in \[0, 1\), given 1.2"),
    "per cent": ({"sparsity": 50}, r"sparsity must lie in \[0, 1\), given 50; 50 % is 0.5"),
    "method": ({"method": "alps"}, "unknown method 'alps'; known are best, maiht, admm"),
    "preset": ({"preset": "quick"}, "unknown preset 'quick'"),
    "dtype": ({"dtype": "int8"}, "unknown dtype 'int8'; known are float32, float16, bfloat16"),
    "windows": ({"windows": 0}, "windows must be at least 1"),
    "bos": ({"bos": "always"}, "unknown bos 'always'; known are auto, yes, no"),
    "bos of ids": ({"bos": "yes"}, "token ids are taken as they are: put BOS in front of them"),
    "seqlen": ({"seqlen": 1}, "seqlen must be at least 2, given 1"),
    "too few windows": ({"heldout_windows": 12}, "leave none for calibration"),
    "vocabulary": ({"calibration": np.full((6, 8), 999)}, "made with another tokenizer"),
    "no number": ({"sparsity": "0.5"}, "sparsity must be a number, given '0.5'"),
    "no whole number": ({"seqlen": 2.5}, "seqlen must be a whole number, given 2.5"),
    "no text": ({"pattern": 124}, "pattern must be a text, given 124"),
    "bounds": ({"bounds": 0.5, "allocation": "owl"}, "bounds must be two shares of zeros, .* given 0.5"),
    "class": ({"method": Wanda}, r"must be an object of a frozen dataclass .* such as Wanda\(\), given <class"),
    "precision": ({"precision": "float8"}, "unknown precision 'float8'; known are highest, high, default"),
    "no method": ({"method": 3.5}, "must be an object of a frozen dataclass .* given 3.5"),
    "no calibration": ({"calibration": None}, "calibration must be a text, given None"),
    "text for windows": ({"method": "best", "windows": "8"}, "windows must be a whole number, given '8'"),
    "text for a split": ({"heldout_windows": "4"}, "heldout_windows must be a whole number, given '4'"),
    "masks": (
        {"masks": "pruned", "pattern": "2:4", "sparsity": 0.2, "allocation": "curves"},
        "masks has zeros for every linear, and with pattern '2:4' allocation 'curves' leaves some dense",
    ),
    "nothing after BOS": (
        {"calibration": ["the " * 99], "seqlen": 2, "bos": "yes", "windows": 1},
        "windows of 2 tokens predict nothing after BOS; give a longer seqlen",
    ),
    "ragged tokens": ({"calibration": [[1, 2, 3], [1, 2]]}, "must have the same number of tokens"),
    "float tokens": ({"calibration": np.ones((6, 8))}, r"integers of shape \[windows, seqlen\]"),
    "unknown text": ({"calibration": "wiki", "seqlen": 24}, "unknown text 'wiki'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES.keys())
def test_a_bad_recipe_ends_before_any_work(tmp_path, source, recipe, changes, message):
    (source / "tokenizer.json").write_text(TOKENIZER)
    with pytest.raises(ValueError, match=message):
        prune_model(source, tmp_path / "out", recipe.model_copy(update=changes))
    assert not (tmp_path / "out").exists()


def test_numbers_of_numpy_and_paths_are_as_good_as_pythons_own():
    given = Recipe(sparsity=np.float32(0.5), seqlen=np.int64(8), targets={"o_proj": np.float64(0.25)}, masks=Path("a"))
    plain = Recipe(sparsity=0.5, seqlen=8, targets={"o_proj": 0.25}, masks="a")
    assert json.dumps(given.as_dict()) == json.dumps(plain.as_dict())


def test_all_mistakes_of_a_recipe_are_listed_together():
    with pytest.raises(ValueError, match=r"(?s)unknown method.*windows.*seed.*sparsity"):
        Recipe(method="x", sparsity=2, windows=0, seed=-1)


def test_non_finite_weights_are_named_before_any_work(tmp_path, rng, recipe):
    tensors = random_tensors(tiny_config(), rng)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan
    folder = write_folder(tmp_path / "source", tiny_config(), tensors)
    with pytest.raises(ModelError, match=r"model.layers.2.mlp.up_proj.weight .*holds 1 NaN or infinite"):
        prune_model(folder, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_overflowing_activations_name_the_block(tmp_path, rng, recipe):
    tensors = random_tensors(tiny_config(), rng)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e30
    folder = write_folder(tmp_path / "source", tiny_config(), tensors)
    with pytest.raises(PruningError, match=r"non-finite activations in block 1, mlp_hidden"):
        prune_model(folder, tmp_path / "out", recipe)
    assert (tmp_path / "out" / "model-block-0000.safetensors").exists()


def test_an_output_folder_that_holds_something_is_left_alone(tmp_path, source, recipe):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(FolderError, match=r"not empty \(it holds thesis.tex\)"):
        prune_model(source, tmp_path / "out", recipe)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_dead_input_is_reported(tmp_path, rng, recipe):
    tensors = random_tensors(tiny_config(), rng)
    tensors["model.layers.0.input_layernorm.weight"][5] = 0
    folder = write_folder(tmp_path / "source", tiny_config(), tensors)
    report = prune_model(folder, tmp_path / "out", recipe)
    dead = {r.layer: r.dead_inputs for r in report.layers}
    assert dead["model.layers.0.self_attn.q_proj"] == 1
    assert dead["model.layers.0.mlp.up_proj"] == 0
    weight = open_model(tmp_path / "out").source.read("model.layers.0.self_attn.q_proj.weight")
    assert (weight[:, 5] == 0).all()


# A tokenizer of single letters, enough to turn any text into ids of the tiny vocabulary.
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(VOCAB)},
            "merges": [],
            "unk_token": "<|end|>",
        },
    }
)


def test_a_quantised_file_leaves_in_bfloat16_unless_a_dtype_is_given(tmp_path, rng):
    tensors, tokens = random_tensors(tiny_config(), rng), rng.integers(0, 40, (6, 16)).astype(np.int32)
    source = open_source(write_gguf(tmp_path / "m.gguf", tiny_config(), tensors, GGMLQuantizationType.Q8_0))
    key = "model.layers.0.mlp.up_proj.weight"
    recipe = Recipe(method="magnitude", calibration=tokens, ignore="up_proj")
    for dtype, stored in ((None, "bfloat16"), ("float32", "float32")):
        report = prune_model(source, tmp_path / stored, recipe.model_copy(update={"dtype": dtype}))
        found = open_source(tmp_path / stored)
        assert {info.dtype.name for info in found.tensors.values()} == {found.config["dtype"]} == {stored}
        assert report.recipe["dtype"] == stored
        assert any("rounds the file's quantised weights" in fact.text for fact in run_facts(report)) == (dtype is None)
        np.testing.assert_array_equal(found.read(key), source.read(key).astype(stored))
        assert inspect_model(source, recipe.model_copy(update={"dtype": dtype})).dense_bytes == report.dense_bytes
    # What is not quantised keeps its dtype.
    plain = open_source(write_gguf(tmp_path / "plain.gguf", tiny_config(), tensors))
    assert prune_model(plain, tmp_path / "plain", recipe).recipe["dtype"] is None


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (7e4, r"values up to 70000, which float16 cannot hold: choose dtype bfloat16"),
        (1e-7, r"2,019 values as small as .*e-.*, which float16 makes 0: choose dtype bfloat16"),
    ],
)
def test_weights_beyond_the_dtype_asked_for_are_told_as_that(tmp_path, rng, factor, message):
    tensors = random_tensors(tiny_config(), rng)
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    if factor < 1:
        weight *= factor
    else:
        weight[0, 0] = factor
    source = write_folder(tmp_path / "source", tiny_config(), tensors)
    tokens = rng.integers(0, 40, (6, 16)).astype(np.int32)
    with pytest.raises(ModelError, match=rf"layers.1.mlp.down_proj.* {message}"):
        prune_model(source, tmp_path / "out", Recipe(method="magnitude", calibration=tokens, dtype="float16"))
