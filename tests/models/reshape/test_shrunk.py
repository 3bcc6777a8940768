"""Smaller models without torch: their folders and configurations, slices that change no output, and what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import (
    OUTER_TAG,
    Block,
    Kept,
    ModelError,
    ShardedWriter,
    Sizes,
    StreamedModel,
    block_tag,
    open_model,
    possible_kv_heads,
    sizes_of,
    sliced_block,
    smaller_model,
    unread,
)
from sparseopt.models.families.family import build_part, part_shapes
from tests.fuzz.damage import refused
from tests.models.tiny import random_tensors, tiny_config, write_folder
from tests.oracle.make_golden import CASES
from tests.tiers import often

# Their configurations cannot say fewer heads of the same size.
WHOLE_HEADS = ("stablelm", "stablelm_parallel", "opt", "gpt2", "gpt_neox", "gpt_neox_serial", "olmo2", "phi3_longrope")


def reduced(model, blocks=(0, 2)):
    """Fewer of everything, as far as the family allows."""
    whole = sizes_of(model)
    experts = None if whole.experts is None else whole.experts - 1
    channels = 8 * ((whole.channels - 1) // 8)
    return Sizes(channels, possible_kv_heads(model)[0], blocks, experts)


def chosen(rng, count, kept):
    return np.sort(rng.permutation(count)[:kept])


def kept_of(config, kind, sizes, rng):
    """Random indices for a block."""
    groups = chosen(rng, config.num_kv_heads, sizes.kv_heads)
    if not kind.experts:
        width = config.intermediate_size
        return Kept(chosen(rng, width, width if sizes.experts else sizes.channels), groups)
    width = config.experts.intermediate_size
    channels = np.stack([chosen(rng, width, sizes.channels) for _ in range(sizes.experts)])
    return Kept(channels, groups, chosen(rng, config.experts.count, sizes.experts))


def block_tensors(model, index):
    return {path: model.stored(key) for path, key in model.block_keys(index).items()}


def write_smaller(model, sizes, folder, seed=0):
    """A smaller model with random choices of what is kept, as a folder."""
    rng, small = np.random.default_rng(seed), smaller_model(model, sizes)
    writer = ShardedWriter(folder, small.source)
    writer.write(OUTER_TAG, unread(small.source, small.outer_keys()))
    for new, old in enumerate(sizes.blocks):
        kind = model.config.kinds[old]
        sliced = sliced_block(model.config, kind, block_tensors(model, old), kept_of(model.config, kind, sizes, rng))
        keys = small.block_keys(new)
        writer.write(block_tag(new), {keys[path]: small.as_stored(keys[path], v) for path, v in sliced.items()})
    writer.finish()
    return folder


# In which of its fields a family's configuration says its sizes.
SIZES = {"num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size", "head_dim", "n_layer"}
SIZES |= {"layer_types", "max_window_layers", "no_rope_layers", "ffn_dim", "n_inner", "mlp_only_layers"}
SIZES |= {"num_local_experts", "moe_intermediate_size", "num_experts"}


@pytest.mark.parametrize("name", list(CASES))
def test_a_smaller_folder_opens_with_the_sizes_asked_for_and_all_else(name, golden, tmp_path):
    model = golden(name).model
    sizes = reduced(model)
    small = open_model(write_smaller(model, sizes, tmp_path))
    dense, got = model.config, small.config
    assert sizes_of(small) == replace(sizes, blocks=(0, 1))
    assert got.kinds == (dense.kinds[0], dense.kinds[2])
    assert (got.num_heads, got.head_dim) == (dense.num_heads // dense.num_kv_heads * sizes.kv_heads, dense.head_dim)
    resized = ("kinds", "num_heads", "num_kv_heads", "intermediate_size", "experts")
    assert got == replace(dense, **{name: getattr(got, name) for name in resized})
    for key in small.outer_keys():
        np.testing.assert_array_equal(small.stored(key), model.stored(key), err_msg=key)
    assert (tmp_path / "NOTICE").read_text() == "goes along"
    old, new = model.source.config, smaller_model(model, sizes).source.config
    table = model.family.sizes.table
    if table is not None:
        assert {k: v for k, v in new.items() if k != table} == {k: v for k, v in old.items() if k != table}
        old, new = old[table], new[table]
    assert {field for field in {*old, *new} if field not in old or old[field] != new[field]} <= SIZES
    assert smaller_model(model, sizes_of(model)).source.config == model.source.config


@pytest.mark.parametrize("name", ["qwen2_window", "smollm3", "gemma2", "gemma3_text", "qwen3_moe"])
def test_block_kinds_follow_the_blocks_where_a_pattern_made_them(name, golden, tmp_path):
    given, lists = golden(name).model.source.config, ("layer_types", "no_rope_layers", "mlp_only_layers")
    config = {k: v for k, v in given.items() if k not in lists} | {"no_rope_layer_interval": 2}
    sliding = {"use_sliding_window": True, "sliding_window": 5}
    config |= {"decoder_sparse_step": 2} if name == "qwen3_moe" else sliding
    model = open_model(write_folder(tmp_path, config, random_tensors(config, np.random.default_rng(0))))
    assert len(set(model.config.kinds)) > 1
    for blocks in ((1,), (0, 2), (1, 2)):
        small = smaller_model(model, replace(sizes_of(model), blocks=blocks))
        assert small.config.kinds == tuple(model.config.kinds[index] for index in blocks)


def built(config, kind, values):
    return build_part(Block, config, kind, read=lambda path: jnp.asarray(values[path]))


def silenced(config, tensors, kept):
    """Tensors with which nothing that is not kept has an effect: no output reads it, and no token reaches it."""
    size = config.num_heads // config.num_kv_heads * config.head_dim
    experts = {} if kept.experts is None else dict(zip(kept.experts.tolist(), kept.channels, strict=True))
    found = {path: np.array(value) for path, value in tensors.items()}
    for path, value in found.items():
        if path == "self_attn.o_proj.weight":
            value[:, ~np.isin(np.arange(value.shape[1]) // size, kept.groups)] = 0
        elif path == "mlp.down_proj.weight":
            value[:, ~np.isin(np.arange(value.shape[1]), kept.channels)] = 0
        elif path.endswith("down_proj.weight"):
            # Those of experts that are not kept stay: the router must not choose them.
            channels = experts.get(int(path.split(".")[2]), np.arange(value.shape[1]))
            value[:, ~np.isin(np.arange(value.shape[1]), channels)] = 0
        elif path == "mlp.router.weight":
            value[~np.isin(np.arange(len(value)), kept.experts)] = -50 * np.eye(value.shape[1])[0]
        elif path == "mlp_norm.weight":
            value[0] = 1
    return found


# Biases, norms of heads and behind, matrices in one, heads in one, experts.
SLICED = ("untied_biases", "gemma2", "phi3", "gpt_neox", "qwen3_moe")


@jax.jit
def outputs(dense, small, x):
    return dense(x), small(x)


@pytest.mark.parametrize("name", often((*SLICED, "gpt2", "mixtral", "olmo2", "cohere", "opt", "glm4"), *SLICED))
def test_slicing_out_what_has_no_effect_does_not_change_a_block(name, golden, rng):
    model = golden(name).model
    config, whole = model.config, sizes_of(model)
    # Also where the configuration of a whole model could not say it; a norm over all heads sees every group.
    groups = whole.kv_heads if config.qk_norm == "width" else max(1, whole.kv_heads // 2)
    experts = None if whole.experts is None else whole.experts - 1
    sizes = Sizes(whole.channels - 5, groups, (0,), experts)
    small = replace(config, num_heads=config.num_heads // whole.kv_heads * groups, num_kv_heads=groups)
    if config.experts is None:
        small = replace(small, intermediate_size=sizes.channels)
    else:
        small = replace(small, experts=replace(config.experts, count=experts, intermediate_size=sizes.channels))
    x = rng.normal(size=(2, 12, config.hidden_size)).astype(np.float32)
    x[..., 0] = 10  # what the router's silenced rows read
    for index in range(2 if config.experts else 1):
        kind = config.kinds[index]
        kept = kept_of(config, kind, sizes, rng)
        dense = silenced(config, block_tensors(model, index), kept)
        sliced = sliced_block(config, kind, dense, kept)
        assert {path: value.shape for path, value in sliced.items()} == part_shapes(Block, small, kind)
        before, after = outputs(built(config, kind, dense), built(small, kind, sliced), jnp.asarray(x))
        np.testing.assert_allclose(after, before, atol=2e-5)


def test_an_outline_reads_what_lies_outside_the_blocks_alone(golden):
    model = golden("gemma3_images").model
    small = smaller_model(model, reduced(model))
    images = [key for key in model.source.tensors if "vision" in key]
    assert images
    for key in (*images, "language_model.model.embed_tokens.weight"):
        np.testing.assert_array_equal(small.source.read(key), model.source.read(key))
    refused(ModelError, r"belongs to a block of a smaller model .* not written yet", small.block, 0)
    assert (small.source.path, small.source.name) == (model.source.path, model.source.name)


def test_buffers_that_hold_no_weights_and_a_second_copy_of_a_tied_head_are_left_out(tmp_path):
    config = tiny_config()
    tensors = random_tensors(config, np.random.default_rng(0), np.float16)
    spare = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
        "model.layers.2.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    model = open_model(write_folder(tmp_path / "source", config, tensors | spare))
    small = smaller_model(model, Sizes(64, 2, (0, 1)))
    assert not set(spare) & set(small.source.tensors)
    assert {info.dtype.name for info in small.source.tensors.values()} == {"float16"}
    assert isinstance(open_model(write_smaller(model, Sizes(40, 1, (0, 2)), tmp_path / "out")), StreamedModel)


WRONG_SIZES = [
    ("tied_grouped", {"channels": 0}, "channels=0, expected a whole number from 1 to 24"),
    ("tied_grouped", {"channels": 0.5}, "channels=0.5, expected a whole number from 1 to 24"),
    ("tied_grouped", {"channels": 25, "kv_heads": 3}, "channels=25, .*; kv_heads=3, .* from 1 to 2"),
    ("tied_grouped", {"blocks": ()}, r"blocks=\(\), expected at least one, ascending, of 0 to 2"),
    ("tied_grouped", {"blocks": (1, 0)}, "ascending"),
    ("tied_grouped", {"blocks": (0, 3)}, "of 0 to 2"),
    ("tied_grouped", {"experts": 2}, "experts=2, expected None"),
    ("mixtral", {"experts": 1}, "experts=1, expected a whole number from 2 to 4"),
    ("mixtral", {"experts": None}, "experts=None, expected a whole number from 2 to 4"),
    ("mixtral", {"channels": 12}, "channels=12, expected a multiple of 8 in experts"),
    ("gpt2", {"kv_heads": 2}, "head_dim=8 for 4.*; possible for kv_heads: 4"),
    ("gpt2", {"kv_heads": 3}, "num_attention_heads=3 must divide hidden_size=16"),
    ("opt", {"kv_heads": 2}, "head_dim=8 for 4"),
    ("gpt_neox", {"kv_heads": 2}, "head_dim=8 for 4"),
    ("stablelm", {"kv_heads": 1}, "head_dim=4 .supported: None, 8.*possible for kv_heads: 2"),
    ("olmo2", {"kv_heads": 1}, "norms of queries and keys run over all heads together"),
    ("phi3_longrope", {"kv_heads": 1}, "transformers expects rope factors for heads of 8 features"),
    ("legacy_rope", {"kv_heads": 3}, "=3 divides hidden_size=16; possible for kv_heads: 1, 2, 4"),
]


@pytest.mark.parametrize(("name", "changes", "named"), WRONG_SIZES)
def test_sizes_that_cannot_be_are_refused(name, changes, named, golden):
    model = golden(name).model
    refused(ModelError, named, smaller_model, model, replace(sizes_of(model), **changes))


@pytest.mark.parametrize("name", list(CASES))
def test_the_possible_numbers_of_groups_are_those_that_are_not_refused(name, golden):
    model = golden(name).model
    whole, possible = sizes_of(model), possible_kv_heads(model)
    assert (possible == (whole.kv_heads,)) == (name in WHOLE_HEADS or whole.kv_heads == 1)
    for count in range(1, whole.kv_heads + 1):
        sizes = replace(whole, kv_heads=count)
        if count in possible:
            assert smaller_model(model, sizes).config.num_kv_heads == count
        else:
            refused(ModelError, f"with kv_heads={count}: ", smaller_model, model, sizes)


ALL, TWO = np.arange(24), np.arange(2)
NOT_KEPT = [
    ("tied_grouped", Kept(np.array([1, 0]), TWO), "kept channels must be ascending .* 0 to 23"),
    ("tied_grouped", Kept(np.array([-1, 3]), TWO), "kept channels"),
    ("tied_grouped", Kept(np.ones(24, bool), TWO), "kept channels"),
    ("tied_grouped", Kept(ALL, np.array([2])), "kept groups must be ascending numbers from 0 to 1"),
    ("tied_grouped", Kept(ALL, np.array([], int)), "kept groups"),
    ("mixtral", Kept(ALL[None], TWO, np.array([4])), "kept experts .* from 0 to 3"),
    ("mixtral", Kept(ALL[None] + 1, TWO, np.array([3])), "kept channels of expert 3 .* to 23"),
    ("mixtral", Kept(ALL[None], TWO), "channels of 1 experts were given for 4"),
]


@pytest.mark.parametrize(("name", "kept", "named"), NOT_KEPT)
def test_indices_that_are_not_ascending_or_outside_are_refused(name, kept, named, golden):
    model = golden(name).model
    refused(ModelError, named, sliced_block, model.config, model.config.kinds[0], {}, kept)


def test_keeping_everything_returns_the_tensors_themselves(golden):
    model = golden("mixtral").model
    tensors = block_tensors(model, 1)
    sliced = sliced_block(model.config, model.config.kinds[1], tensors, Kept(np.tile(ALL, (4, 1)), TWO))
    assert set(sliced) == set(tensors)
    assert all(sliced[path] is value for path, value in tensors.items())
