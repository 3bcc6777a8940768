"""Smaller dense models end to end: sizes, the solver's answers, blocks and experts that go, resuming, refusals."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import ModelError, TorchModel, load_decoder, open_model, sizes_of
from sparseopt.pruning import (
    Recipe,
    ShrinkRecipe,
    audit_sparsity,
    perplexity,
    prune_layer,
    prune_model,
    prune_models,
    shrink_model,
)
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.base.records import (
    BlockRecord,
    DistillationRecord,
    LayerRecord,
    Passed,
    RemovalRecord,
    ShapeRecord,
)
from sparseopt.pruning.recipe.shrink_recipe import parameters_of
from sparseopt.pruning.run.plan import make_plan
from sparseopt.pruning.run.resumption import recipe_identity
from sparseopt.pruning.train.distillation import Distillation
from sparseopt.pruning.train.reconstruction import Reconstruction
from sparseopt.system.run_folder import RECORDS, FolderError
from tests.models.tiny import GOLDEN, random_tensors, tiny_config, write_folder, write_golden
from tests.pruning.test_experts import EXPERTS, routed_inputs
from tests.pruning.test_resumption import Broken, breaking_at, model_bytes
from tests.tiers import often

# Of the tiny model: 48 of 64 channels, 1 of 2 key-value groups, 2 of 3 blocks.
CHANNELS, HEADS, LAYERS = 0.75, 0.5, 0.67


def recipe(tokens, **fields):
    """Only what a test is about: blocks are not trained, and channels need not be multiples of 64."""
    return ShrinkRecipe(calibration=tokens, **{"heldout_windows": 2, "multiple": 8, "train_epochs": 0} | fields)


def ended_by(kind, count=1):
    """An observer that ends the run at its `count`-th event of a kind."""
    seen = []

    def observer(event, done, total):
        seen.extend([event] if isinstance(event, kind) else [])
        if len(seen) == count:
            raise Broken

    return observer


def ended_in_distillation(event, done, total):
    if isinstance(event, str) and event.startswith("distillation") and done == 2:
        raise Broken


def stored(folder):
    model = open_model(folder)
    return {key: model.stored(key) for key in model.exported_keys()}


FAMILIES = {
    "tied_grouped": ({"channels": 0.667, "heads": 0.5, "layers": LAYERS}, (16, 1, 2, None)),
    "phi3": ({"channels": 0.333, "heads": 0.5}, (8, 1, 3, None)),
    "gpt2": ({"channels": 0.5, "layers": LAYERS, "block_score": "cosine"}, (32, 4, 2, None)),
    "mixtral": ({"channels": 0.667, "heads": 0.5, "experts": 0.75}, (16, 1, 3, 3)),
}


@pytest.mark.parametrize("name", often(FAMILIES, "gpt2"))
def test_a_folder_of_the_sizes_asked_for_is_written_and_runs(tmp_path, tokens, name):
    shares, wanted = FAMILIES[name]
    write_golden(GOLDEN / f"{name}.npz", tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    tokens, source = tokens % 40, open_model(tmp_path / "source")
    # Few tokens reach an expert of the tiny mixture.
    made = recipe(tokens, method="wanda", min_expert_tokens=1, **shares)
    report = shrink_model(tmp_path / "source", tmp_path / "out", made)
    small = open_model(tmp_path / "out")
    sizes = sizes_of(small)
    assert (sizes.channels, sizes.kv_heads, len(sizes.blocks), sizes.experts) == wanted
    assert np.isfinite(perplexity(small, tokens))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    shape, values = report.shape, stored(tmp_path / "out")
    assert shape.sizes == dataclasses.replace(sizes, blocks=shape.blocks)
    assert set(shape.blocks) | set(shape.removed) == set(range(3))
    assert shape.parameters == sum(value.size for value in values.values()) < shape.dense_parameters
    assert shape.dense_parameters == parameters_of(source)
    assert report.stored_bytes == sum(value.nbytes for value in values.values()) < shape.dense_bytes
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["shape"]["channels"] == wanted[0]


def test_what_stays_is_the_answer_of_the_layer_s_solver_and_its_rows_follow(tmp_path, source, tokens):
    """In the first block, whose inputs are the dense model's."""
    shrink_model(source, tmp_path / "out", recipe(tokens, channels=CHANNELS, heads=HEADS))
    model, small = open_model(source), open_model(tmp_path / "out")
    dense, made = ({path: m.stored(key) for path, key in m.block_keys(0).items()} for m in (model, small))
    block = model.block(0)
    grams = BlockRunner().grams(block, make_batches(model.embedding()(jnp.asarray(tokens[:5]))))
    for name, pattern, share in (("mlp.down_proj", "group:1", CHANNELS), ("self_attn.o_proj", "group:16", HEADS)):
        weight, gram = dense[f"{name}.weight"], np.asarray(grams[block.linears[name]].gram)
        solved = prune_layer(weight, gram, 1 - share, pattern, method="best").weight
        kept = np.flatnonzero(solved.any(axis=0))
        assert len(kept) == share * weight.shape[1]
        np.testing.assert_allclose(made[f"{name}.weight"], solved[:, kept], rtol=1e-3, atol=1e-5)
        if name == "mlp.down_proj":
            for rows in ("mlp.gate_proj", "mlp.up_proj"):
                np.testing.assert_array_equal(made[f"{rows}.weight"], dense[f"{rows}.weight"][kept])
        else:
            # A group has two query heads of 8 features, and one head of keys and values.
            np.testing.assert_array_equal(made["self_attn.q_proj.weight"], dense["self_attn.q_proj.weight"][kept])
            pair = slice(8 * (kept[0] // 16), 8 * (kept[0] // 16) + 8)
            for rows in ("self_attn.k_proj", "self_attn.v_proj"):
                np.testing.assert_array_equal(made[f"{rows}.weight"], dense[f"{rows}.weight"][pair])


def test_blocks_go_and_the_others_stay_as_they_are(tmp_path, source, tokens):
    told = []
    report = shrink_model(
        source, tmp_path / "out", recipe(tokens, layers=LAYERS), observer=lambda *event: told.append(event)
    )
    removals = [event for event in told if isinstance(event[0], RemovalRecord)]
    (shape,) = [event for event, *_ in told if isinstance(event, ShapeRecord)]
    assert [(event.block, *count) for event, *count in removals] == [(*shape.removed, 1, 1)]
    assert shape.rises == (removals[0][0].rise,)
    # No linear is pruned: the blocks tell how far the pass is.
    assert [event for event, *_ in told if isinstance(event, Passed)] == [Passed(index, 3) for index in range(3)]
    assert report.layers == []
    dense, made = open_model(source), open_model(tmp_path / "out")
    for place, index in enumerate(shape.blocks):
        for path, key in made.block_keys(place).items():
            assert made.stored(key).tobytes() == dense.stored(dense.block_keys(index)[path]).tobytes(), key


def test_blocks_see_the_smaller_model_before_them_also_across_a_gap(tmp_path, source, tokens):
    """The recorded error of the last block is the one on activations of the smaller model, recomputed here."""
    report = shrink_model(source, tmp_path / "out", recipe(tokens, channels=CHANNELS, layers=LAYERS))
    last = report.shape.blocks[-1]
    dense, small = open_model(source).block(last), load_decoder(tmp_path / "out")
    x = jax.jit(lambda embedding, block, ids: block(embedding(ids)))(
        small.embed_tokens, small.layers[0], jnp.asarray(tokens[:5])
    )
    gram = np.asarray(BlockRunner().grams(dense, make_batches(x))[dense.linears["mlp.down_proj"]].gram, np.float64)
    read = {path: np.asarray(dense.read(path), np.float64) for path in ("mlp.up_proj.weight", "mlp.down_proj.weight")}
    ours = {path: np.asarray(small.layers[1].read(path), np.float64) for path in read}
    kept = [
        int(np.flatnonzero((read["mlp.up_proj.weight"] == row).all(axis=1))[0]) for row in ours["mlp.up_proj.weight"]
    ]
    weight = read["mlp.down_proj.weight"]
    change = -weight
    change[:, kept] += ours["mlp.down_proj.weight"]
    (record,) = [r for r in report.layers if r.block == last]
    assert record.relative_error == pytest.approx(
        np.sum(change @ gram * change) / np.sum(weight @ gram * weight), rel=1e-3
    )
    assert record.layer == f"model.layers.{last}.mlp.down_proj"


def test_the_experts_that_do_least_for_their_tokens_go(tmp_path, rng, tokens):
    config = tiny_config(
        model_type="mixtral", architectures=["MixtralForCausalLM"], num_hidden_layers=1, num_local_experts=EXPERTS,
        num_experts_per_tok=2, intermediate_size=24, tie_word_embeddings=False,
    )  # fmt: skip
    source = write_folder(tmp_path / "source", config, random_tensors(config, rng))
    shrink_model(source, tmp_path / "out", recipe(tokens, method="magnitude", experts=0.5, heldout_windows=0))
    model = open_model(source)
    dense = {path: np.asarray(model.stored(key), np.float64) for path, key in model.block_keys(0).items()}
    energy = []
    for expert, inputs in enumerate(routed_inputs(model, tokens)):
        gate, up, down = (dense[f"mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        opened = inputs @ gate.T
        energy.append(np.sum(((opened / (1 + np.exp(-opened)) * (inputs @ up.T)) @ down.T) ** 2))
    kept = np.sort(np.argsort(energy)[-2:])
    small = open_model(tmp_path / "out")
    made = {path: small.stored(key) for path, key in small.block_keys(0).items()}
    np.testing.assert_array_equal(made["mlp.router.weight"], dense["mlp.router.weight"].astype(np.float32)[kept])
    for new, old in enumerate(kept):
        path = "mlp.experts.{}.down_proj.weight"
        np.testing.assert_array_equal(made[path.format(new)], dense[path.format(old)].astype(np.float32))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, source, tokens):
    """A run with everything that can be interrupted, and its folder."""
    made = recipe(tokens, channels=CHANNELS, layers=LAYERS, train_epochs=1, distil_epochs=1)
    return made, shrink_model(source, tmp_path_factory.mktemp("trained") / "whole", made)


ENDS = {
    "while blocks are chosen": ended_by(RemovalRecord),
    "in a block": ended_by(LayerRecord),
    "before the last block is written": ended_by(BlockRecord, 2),
    "in the distillation": ended_in_distillation,
    "after the distillation": ended_by(DistillationRecord),
}


def test_a_run_interrupted_anywhere_gives_the_same_folder(tmp_path, source, trained):
    made, whole = trained
    told = []
    for name, observer in ENDS.items():
        with pytest.raises(Broken):
            shrink_model(source, tmp_path / "broken", made, observer=observer)
        if name == "in the distillation":
            # The pass is finished and stays.
            shards = {file.name for file in (tmp_path / "broken").glob("*block*.safetensors")}
            assert shards == {f"model-block-{index:04d}.safetensors" for index in whole.shape.blocks}
    report = shrink_model(source, tmp_path / "broken", made, observer=lambda event, *_: told.append(event))
    assert model_bytes(tmp_path / "broken") == model_bytes(whole.output)
    assert not [event for event in told if isinstance(event, str | RemovalRecord)]
    assert report.resumed_blocks == 3
    assert (report.shape.sizes, report.shape.removed) == (whole.shape.sizes, whole.shape.removed)
    assert dataclasses.replace(report.distilled, seconds=0, compile_seconds=0) == dataclasses.replace(
        whole.distilled, seconds=0, compile_seconds=0
    )
    lines = [json.loads(line)["kind"] for line in (tmp_path / "broken" / RECORDS).read_text().splitlines()]
    assert sorted(lines) == ["block", "block", "distillation", "layer", "layer", "shape"]


def test_training_helps_and_a_finished_run_is_kept(source, trained):
    made, whole = trained
    assert len(whole.blocks) == 2
    assert whole.distilled.heldout_best < whole.distilled.heldout_first
    before = {file.name: file.stat().st_mtime_ns for file in whole.output.iterdir()}
    again = shrink_model(source, whole.output, made)
    assert again.kept
    assert dataclasses.replace(again, kept=False).summary() == whole.summary()
    assert {file.name: file.stat().st_mtime_ns for file in whole.output.iterdir()} == before
    with pytest.raises(FolderError, match=r"recipe.channels: 0.75 there, 0.5 here"):
        shrink_model(source, whole.output, made.model_copy(update={"channels": 0.5}))


@pytest.mark.parametrize("pack", [False, True])
def test_a_pruned_model_is_trained_whole_and_keeps_its_zeros(tmp_path, source, tokens, pack):
    made = Recipe(method="wanda", sparsity=0.5, calibration=tokens, heldout_windows=2, pack=pack, distil_epochs=1)
    report = prune_model(source, tmp_path / "out", made)
    assert report.distilled.heldout_best < report.distilled.heldout_first
    audits = {audit.layer: audit.zeros for audit in audit_sparsity(open_model(tmp_path / "out"))}
    assert audits == {record.layer: record.zeros for record in report.layers}
    assert all(record.zeros == record.size // 2 for record in report.layers)
    prune_model(source, tmp_path / "untrained", made.model_copy(update={"distil_epochs": 0}))
    before, after = stored(tmp_path / "untrained"), stored(tmp_path / "out")
    weights = {f"{layer}.weight" for layer in audits}
    # The embedding and the head stay as they are, and all else moves.
    assert {key for key in before if not np.array_equal(before[key], after[key])} >= weights
    assert all(np.array_equal(before[key] == 0, after[key] == 0) for key in weights)
    with pytest.raises(Broken):
        prune_model(source, tmp_path / "broken", made, observer=ended_in_distillation)
    prune_model(source, tmp_path / "broken", made)
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "out")


def test_models_of_several_sizes_and_zeros_share_a_pass(tmp_path, source, tokens):
    common = {"calibration": tokens, "heldout_windows": 2}
    recipes = [
        recipe(tokens, channels=CHANNELS, method="wanda"),
        recipe(tokens, channels=CHANNELS, layers=LAYERS, method="wanda"),
        Recipe(method="wanda", **common),
    ]
    told = []
    plans = [(each, tmp_path / f"{number}") for number, each in enumerate(recipes)]
    reports = prune_models(source, plans, observer=lambda *event: told.append(event))
    assert [(done, total) for event, done, total in told if isinstance(event, LayerRecord)] == [
        (done, 3 + 2 + 21) for done in range(1, 27)
    ]
    assert [report.shape is None for report in reports] == [False, False, True]
    for (each, folder), call in zip(plans, (shrink_model, shrink_model, prune_model), strict=True):
        call(source, tmp_path / "alone" / folder.name, each)
        assert model_bytes(tmp_path / "alone" / folder.name) == model_bytes(folder)


def test_an_interrupted_pass_of_two_sizes_resumes_each(tmp_path, source, tokens):
    recipes = [recipe(tokens, channels=share, layers=LAYERS, method="wanda") for share in (CHANNELS, 0.5)]
    whole = [(each, tmp_path / f"whole-{each.channels}") for each in recipes]
    plans = [(each, tmp_path / f"broken-{each.channels}") for each in recipes]
    prune_models(source, whole)
    # One of the two has finished one more block.
    with pytest.raises(Broken):
        prune_models(source, plans, observer=breaking_at(4))
    assert [report.shape.removed for report in prune_models(source, plans)] == [
        report.shape.removed for report in prune_models(source, whole)
    ]
    for (_, one), (_, other) in zip(plans, whole, strict=True):
        assert model_bytes(one) == model_bytes(other)


def test_settings_of_both_trainings_are_recorded_as_plain_values(tokens):
    made = recipe(
        tokens, channels=CHANNELS, train_epochs=Reconstruction(epochs=2), distil_epochs=Distillation(clip=0.1)
    )
    values = json.loads(json.dumps(recipe_identity(made)))
    assert (values["train_epochs"]["epochs"], values["distil_epochs"]["clip"]) == (2, 0.1)


REFUSED = {
    "nothing": ({}, "nothing would go: give channels, heads, layers or experts below 1"),
    "all": ({"channels": 0.0, "layers": 0.0}, "channels and layers 0 leave nothing: give a share above 0"),
    "above": ({"heads": 1.2}, r"heads must lie in \[0, 1\], given 1.2"),
    "method": ({"channels": 0.5, "method": "wunda"}, "unknown method 'wunda'"),
    "groups": ({"channels": 0.5, "method": "sparsegpt"}, "unknown method .sparsegpt."),
    "epochs": ({"channels": 0.5, "distil_epochs": -1}, "distil_epochs must be at least 0, given -1"),
    "distillation": (
        {"channels": 0.5, "distil_epochs": Distillation(epochs=0, clip=0)},
        "the distillation cannot be used:\n  epochs must be .*\n  clip must be positive",
    ),
    "multiple": (
        {"channels": 0.5, "multiple": 48},
        "channels 0.5 would keep 32 of 64 MLP channels, multiples of 48; give 0.75 for 48",
    ),
    "small": ({"channels": 0.03}, "channels 0.03 would keep 1.92 of 64 MLP channels, .*; give 0.125 for 8"),
    "heads": ({"heads": 0.7}, "heads 0.7 would keep 1.4 of 2 key-value groups; give 0.5 for 1 or 1 for 2"),
    "layers": ({"layers": 0.5}, "layers 0.5 would keep 1.5 of 3 blocks; give 0.3333 for 1 or 0.6667 for 2"),
    "experts": ({"experts": 0.5}, "experts 0.5 is for mixtures of experts, and this model has none; leave it out"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused_before_any_work(tmp_path, source, tokens, fields, message):
    with pytest.raises(ValueError, match=message):
        shrink_model(source, tmp_path / "out", recipe(tokens, **fields))
    assert not (tmp_path / "out").exists()


def test_blocks_without_experts_keep_their_width_also_where_it_is_that_of_an_expert(tmp_path, rng, tokens):
    config = tiny_config(
        model_type="qwen3_moe", num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        intermediate_size=64, mlp_only_layers=[0], decoder_sparse_step=1, norm_topk_prob=True, head_dim=8,
    )  # fmt: skip
    model = open_model(write_folder(tmp_path, config, random_tensors(config, rng)))
    plan = make_plan(model, recipe(tokens, channels=0.5), Path("out"))
    assert {key.split(".")[2] for key in plan.patterns} == {"1"}
    assert plan.target.weight_shape("model.layers.0.mlp.down_proj.weight") == (32, 64)


def test_shares_that_a_family_or_torch_cannot_have_are_refused(tmp_path, source, tokens):
    write_golden(GOLDEN / "olmo2.npz", tmp_path / "olmo2")
    with pytest.raises(ModelError, match=r"heads 0.5 would keep 1 of 2 key-value groups; give 1 for 2"):
        shrink_model(tmp_path / "olmo2", tmp_path / "out", recipe(tokens % 40, heads=0.5))
    write_golden(GOLDEN / "mixtral.npz", tmp_path / "mixtral")
    with pytest.raises(ModelError, match="experts=1, expected a whole number from 2 to 4"):
        shrink_model(tmp_path / "mixtral", tmp_path / "out", recipe(tokens % 40, experts=0.25))

    class Foreign(TorchModel):
        def __init__(self) -> None:
            self.source = open_model(source).source

    with pytest.raises(ModelError, match="which runs in torch: smaller models are made of the families"):
        make_plan(Foreign(), recipe(tokens, channels=0.5), Path("out"))
    assert not (tmp_path / "out").exists()
