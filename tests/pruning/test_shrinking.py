"""Smaller dense models: the solver's answers, and blocks and experts that go.

Sizes, training and interrupted runs are cases of `test_whole_runs`, refusals are in `test_refusals`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import load_decoder, open_model
from sparseopt.pruning import ShrinkRecipe, prune_layer, shrink_model
from sparseopt.pruning.base.activations import make_batches
from sparseopt.pruning.base.grams import BlockRunner
from sparseopt.pruning.base.records import Passed, RemovalRecord
from sparseopt.pruning.run.plan import make_plan
from sparseopt.pruning.run.resumption import recipe_identity
from sparseopt.pruning.train.distillation import Distillation
from sparseopt.pruning.train.reconstruction import Reconstruction
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.pruning.test_experts import routed_inputs

TINY = "llama"
# Of that model: 48 of 64 channels, 1 of 2 key-value groups, 2 of 3 blocks.
CHANNELS, HEADS, LAYERS = 0.75, 0.5, 0.67


@pytest.fixture(scope="module")
def shrink(tokens):
    """A recipe of what a test is about: blocks are not trained, and channels need not be multiples of 64."""
    common = {"heldout_windows": 2, "multiple": 8, "train_epochs": 0}
    return lambda **fields: ShrinkRecipe(calibration=tokens, **common | fields)


def test_what_stays_is_the_answer_of_the_layer_s_solver_and_its_rows_follow(tmp_path, source, tokens, shrink):
    """In the first block, whose inputs are the dense model's."""
    shrink_model(source, tmp_path / "out", shrink(channels=CHANNELS, heads=HEADS))
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
        followers = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), kept)
        if name == "self_attn.o_proj":
            # A group has two query heads of 8 features, and one head of keys and values.
            pair = slice(8 * (kept[0] // 16), 8 * (kept[0] // 16) + 8)
            followers = {"self_attn.q_proj": kept, "self_attn.k_proj": pair, "self_attn.v_proj": pair}
        for rows, chosen in followers.items():
            np.testing.assert_array_equal(made[f"{rows}.weight"], dense[f"{rows}.weight"][chosen])


def test_blocks_go_and_the_others_stay_as_they_are(tmp_path, source, shrink):
    told = []
    recipe = shrink(layers=LAYERS, repair=False)
    report = shrink_model(source, tmp_path / "out", recipe, observer=lambda *event: told.append(event))
    removals = [event for event in told if isinstance(event[0], RemovalRecord)]
    shape = report.shape
    assert [(event.block, *count) for event, *count in removals] == [(*shape.removed, 1, 1)]
    assert shape.rises == (removals[0][0].rise,)
    # No linear is pruned: the blocks tell how far the pass is.
    assert [event for event, *_ in told if isinstance(event, Passed)] == [Passed(index, 3) for index in range(3)]
    assert report.layers == []
    dense, made = open_model(source), open_model(tmp_path / "out")
    for place, index in enumerate(shape.blocks):
        for path, key in made.block_keys(place).items():
            assert made.stored(key).tobytes() == dense.stored(dense.block_keys(index)[path]).tobytes(), key


def test_blocks_see_the_smaller_model_before_them_also_across_a_gap(tmp_path, source, tokens, shrink):
    """The recorded error of the last block is the one on activations of the smaller model, recomputed here."""
    report = shrink_model(source, tmp_path / "out", shrink(channels=CHANNELS, layers=LAYERS))
    last = report.shape.blocks[-1]
    dense, small = open_model(source).block(last), load_decoder(tmp_path / "out")
    x = jax.jit(lambda embedding, block, ids: block(embedding(ids)))(
        small.embed_tokens, small.layers[0], jnp.asarray(tokens[:5])
    )
    gram = np.asarray(BlockRunner().grams(dense, make_batches(x))[dense.linears["mlp.down_proj"]].gram, np.float64)
    read = {path: np.asarray(dense.read(path), np.float64) for path in ("mlp.up_proj.weight", "mlp.down_proj.weight")}
    ours = {path: np.asarray(small.layers[1].read(path), np.float64) for path in read}
    up, weight = read["mlp.up_proj.weight"], read["mlp.down_proj.weight"]
    kept = [int(np.flatnonzero((up == row).all(axis=1))[0]) for row in ours["mlp.up_proj.weight"]]
    change = -weight
    change[:, kept] += ours["mlp.down_proj.weight"]
    (record,) = [r for r in report.layers if r.block == last]
    error = np.sum(change @ gram * change) / np.sum(weight @ gram * weight)
    assert record.relative_error == pytest.approx(error, rel=1e-3)
    assert record.layer == f"model.layers.{last}.mlp.down_proj"


def test_the_experts_that_add_least_to_their_tokens_go(tmp_path, models, tokens, shrink):
    """In the first block: the sum of gate times norm, from the router's softmax by hand."""
    source = models("experts")
    shrink_model(source, tmp_path / "out", shrink(method="magnitude", experts=0.5, heldout_windows=0))
    model, small = open_model(source), open_model(tmp_path / "out")
    dense, made = ({path: m.stored(key) for path, key in m.block_keys(0).items()} for m in (model, small))
    scores, router = [], dense["mlp.router.weight"].astype(np.float64)
    for expert, inputs in enumerate(routed_inputs(model, tokens)):
        # Mixtral's shares are those among the two chosen ones.
        two = np.sort(np.exp(inputs @ router.T), axis=1)[:, -2:].sum(axis=1)
        gate, up, down = (
            dense[f"mlp.experts.{expert}.{name}_proj.weight"].astype(np.float64) for name in ("gate", "up", "down")
        )
        opened = inputs @ gate.T
        added = (opened / (1 + np.exp(-opened)) * (inputs @ up.T)) @ down.T
        scores.append(np.sum(np.exp(inputs @ router[expert]) / two * np.linalg.norm(added, axis=1)))
    embedded = model.embedding()(jnp.asarray(tokens))
    found = BlockRunner().contributions(model.block(0), make_batches(embedded))
    np.testing.assert_allclose(found, scores, rtol=1e-4)
    kept = np.sort(np.argsort(scores)[-2:])
    np.testing.assert_array_equal(made["mlp.router.weight"], dense["mlp.router.weight"][kept])
    for new, old in enumerate(kept):
        path = "mlp.experts.{}.down_proj.weight"
        np.testing.assert_array_equal(made[path.format(new)], dense[path.format(old)])


def test_settings_of_both_trainings_are_recorded_as_plain_values(shrink):
    made = shrink(channels=CHANNELS, train_epochs=Reconstruction(epochs=2), distil_epochs=Distillation(clip=0.1))
    values = json.loads(json.dumps(recipe_identity(made)))
    assert (values["train_epochs"]["epochs"], values["distil_epochs"]["clip"]) == (2, 0.1)


def test_blocks_without_experts_keep_their_width_also_where_it_is_that_of_an_expert(tmp_path, rng, shrink):
    config = tiny_config(
        model_type="qwen3_moe", num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        intermediate_size=64, mlp_only_layers=[0], decoder_sparse_step=1, norm_topk_prob=True, head_dim=8,
    )  # fmt: skip
    model = open_model(write_folder(tmp_path, config, random_tensors(config, rng)))
    plan = make_plan(model, shrink(channels=0.5), tmp_path / "out")
    assert {key.split(".")[2] for key in plan.patterns} == {"1"}
    assert plan.target.weight_shape("model.layers.0.mlp.down_proj.weight") == (32, 64)
