"""`prune_module` on Flax modules: Gram matrices, the order of the work, and what it leaves alone, against NumPy."""

import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseopt.layers.prune_layer import prune_layer
from sparseopt.pruning import Recipe, prune_module
from sparseopt.pruning.base.grams import Grams
from sparseopt.pruning.modules.linen_module import LinenModule
from sparseopt.pruning.modules.module_pass import ModulePass
from sparseopt.pruning.modules.module_plan import module_recipe
from sparseopt.pruning.modules.nnx_module import NnxModule
from sparseopt.pruning.modules.watched import Sums, added
from sparseopt.pruning.run.part import PruningError

WIDTH, TOKENS = 8, 24
KEY = jax.random.key(0)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def hidden(self, x):
        return nnx.relu(self.up(self.norm(x)))

    def __call__(self, x):
        return x + self.down(self.hidden(x))


class Net(nnx.Module):
    def __init__(self, block=Block, count=3, seed=0):
        rngs = nnx.Rngs(seed)
        self.stem = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([block(rngs) for _ in range(count)])
        self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Mlp(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first, self.second, self.third = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3))

    def __call__(self, x):
        return self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(WIDTH, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(WIDTH, name="down")(y)


class LinenNet(nn.Module):
    count: int = 3

    def setup(self):
        self.stem, self.head = nn.Dense(WIDTH), nn.Dense(WIDTH)
        self.blocks = [LinenBlock() for _ in range(self.count)]

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def batches(rng):
    # Inputs that differ in size, so that they count.
    scales = np.geomspace(0.2, 3, WIDTH)
    return [jnp.asarray(rng.standard_normal((TOKENS, WIDTH)) * scales, jnp.float32) for _ in range(3)]


def wanda(**fields):
    return Recipe(method="wanda", **fields)


def weight(linear):
    return np.asarray(linear.kernel[...]).T


def params_of(net):
    """The parameters of `Net` as those of `LinenNet`."""
    found = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    blocks = found.pop("blocks")
    return found | {f"blocks_{index}": block for index, block in blocks.items()}


def gram_of(inputs):
    rows = np.concatenate([np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in inputs])
    return (rows.T @ rows).astype(np.float32)


def pruned(linear, inputs, **options):
    options = {"sparsity": 0.5, "method": "wanda"} | options
    return prune_layer(weight(linear), gram_of(inputs), **options).weight


def unfolded(x, size, *, strides=1, dilation=1, pads=0, mode="constant"):
    """The patches that a convolution reads, channel by channel, by loops."""
    axes = len(size)
    strides, dilation = (np.broadcast_to(each, axes) for each in (strides, dilation))
    x = np.asarray(x, np.float64).reshape(-1, *x.shape[-axes - 1 :])
    x = np.pad(x, [(0, 0), *np.broadcast_to(pads, (axes, 2)), (0, 0)], mode=mode)
    spans = (np.array(size) - 1) * dilation + 1
    counts = (np.array(x.shape[1:-1]) - spans) // strides + 1
    rows = []
    for image in x:
        for place in itertools.product(*map(range, counts)):
            starts = np.array(place) * strides
            window = image[tuple(slice(s, s + n, d) for s, n, d in zip(starts, spans, dilation, strict=True))]
            rows.append(np.moveaxis(window, -1, 0).ravel())
    return np.array(rows)


def conv(size, **options):
    return (
        lambda: nnx.Conv(3, 4, size, use_bias=False, rngs=nnx.Rngs(0), **options),
        lambda: nn.Conv(4, size, use_bias=False, **options),
    )


# Name: the linear in NNX and in Linen, the shape of its input, and its rows; by the axes of its output that come first.
LINEARS = {
    "dense": (
        lambda: nnx.Linear(5, 4, use_bias=False, rngs=nnx.Rngs(0)),
        lambda: nn.Dense(4, use_bias=False),
        (2, 3, 5),
        lambda x: x.reshape(-1, 5),
    ),
    "general": (
        lambda: nnx.LinearGeneral((3, 2), (2, 2), axis=(-2, -1), use_bias=False, rngs=nnx.Rngs(0)),
        lambda: nn.DenseGeneral((2, 2), axis=(-2, -1), use_bias=False),
        (5, 3, 2),
        lambda x: x.reshape(5, 6),
    ),
    "axes in another order": (
        lambda: nnx.LinearGeneral((3, 2), 4, axis=(-1, -3), use_bias=False, rngs=nnx.Rngs(0)),
        lambda: nn.DenseGeneral(4, axis=(-1, -3), use_bias=False),
        (3, 7, 2),
        lambda x: x.transpose(1, 0, 2).reshape(7, 6),
    ),
    "axes from the front": (
        lambda: nnx.LinearGeneral((3, 2), 4, axis=(1, 3), use_bias=False, rngs=nnx.Rngs(0)),
        lambda: nn.DenseGeneral(4, axis=(1, 3), use_bias=False),
        (2, 3, 4, 2),
        lambda x: x.transpose(0, 2, 1, 3).reshape(8, 6),
    ),
    "einsum": (
        lambda: nnx.Einsum("btd,dnh->btnh", (5, 2, 2), rngs=nnx.Rngs(0)),
        lambda: nn.Einsum((5, 2, 2), "btd,dnh->btnh", use_bias=False),
        (2, 3, 5),
        lambda x: x.reshape(6, 5),
    ),
    "einsum with an ellipsis": (
        lambda: nnx.Einsum("b...nh,hnd->b...d", (2, 3, 4), rngs=nnx.Rngs(0)),
        lambda: nn.Einsum((2, 3, 4), "b...nh,hnd->b...d", use_bias=False),
        (2, 5, 3, 2),
        lambda x: x.transpose(0, 1, 3, 2).reshape(10, 6),
    ),
    "same": (
        *conv((3, 2), strides=(2, 1)),
        (2, 6, 5, 3),
        lambda x: unfolded(x, (3, 2), strides=(2, 1), pads=[(0, 1), (0, 1)]),
    ),
    "valid, dilated": (
        *conv((2, 3), padding="VALID", kernel_dilation=(2, 1)),
        (2, 6, 5, 3),
        lambda x: unfolded(x, (2, 3), dilation=(2, 1)),
    ),
    "pairs": (
        *conv((3, 3), padding=((1, 2), (0, 1))),
        (2, 6, 5, 3),
        lambda x: unfolded(x, (3, 3), pads=[(1, 2), (0, 1)]),
    ),
    "circular, even": (
        *conv((4, 3), padding="CIRCULAR"),
        (2, 6, 5, 3),
        lambda x: unfolded(x, (4, 3), pads=[(1, 2), (1, 1)], mode="wrap"),
    ),
    "reflected": (
        *conv((3, 2), padding="REFLECT"),
        (2, 6, 5, 3),
        lambda x: unfolded(x, (3, 2), pads=[(1, 1), (0, 1)], mode="reflect"),
    ),
    "causal": (
        *conv((3,), padding="CAUSAL", kernel_dilation=2),
        (2, 6, 3),
        lambda x: unfolded(x, (3,), dilation=2, pads=[(4, 0)]),
    ),
    "without a batch axis": (*conv((2, 2), padding="VALID"), (6, 5, 3), lambda x: unfolded(x, (2, 2))),
    "of volumes": (*conv((2, 1, 2), padding="VALID"), (2, 3, 3, 4, 3), lambda x: unfolded(x, (2, 1, 2))),
}


class One(nnx.Module):
    def __init__(self, part):
        self.part = part

    def __call__(self, x):
        return self.part(x)


class LinenOne(nn.Module):
    part: nn.Module

    def __call__(self, x):
        return self.part(x)


@pytest.mark.parametrize("name", LINEARS)
def test_the_gram_of_a_linear_is_that_of_its_rows_and_these_with_its_matrix_give_its_output(name, rng):
    nnx_part, linen_part, shape, rows_of = LINEARS[name]
    x = rng.standard_normal(shape).astype(np.float32)
    module, linen = One(nnx_part()), LinenOne(linen_part())
    variables = {"params": nnx.to_pure_dict(nnx.state(module))}
    rows = rows_of(x).astype(np.float64)
    for opened, output in (
        (NnxModule(module), module(x)),
        (LinenModule(linen, variables, x), linen.apply(variables, x)),
    ):
        layout = opened.linears["part"].layout
        with opened.watching():
            found = opened.read_by(jnp.asarray(x), {"part": layout})["part"]
        np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.total, rows.sum(0), rtol=1e-5, atol=1e-5)
        assert int(found.tokens) == len(rows)
        matrix = opened.read("part")
        assert matrix.shape == opened.linears["part"].shape
        np.testing.assert_allclose(rows @ matrix.T, np.reshape(output, (len(rows), -1)), rtol=1e-4, atol=1e-5)
        kernel = opened.kernel("part")
        np.testing.assert_array_equal(layout.kernel(matrix, kernel.shape), kernel)


def test_outputs_that_an_einsum_moves_are_weighted_where_they_are(rng):
    y = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    layout = NnxModule(One(nnx.Einsum("btd,dnh->nbth", (7, 2, 5), rngs=nnx.Rngs(0)))).linears["part"].layout
    np.testing.assert_allclose(layout.by_output(jnp.asarray(y)), y.sum((1, 2)).ravel(), rtol=1e-5)


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (lambda: nnx.Conv(4, 4, (2, 2), feature_group_count=2, rngs=nnx.Rngs(0)), "in 2 groups"),
        (lambda: nnx.ConvTranspose(4, 4, (2, 2), rngs=nnx.Rngs(0)), "transposed"),
        (lambda: nnx.LinearGeneral((3, 4), 2, axis=(1, -1), rngs=nnx.Rngs(0)), "from both ends"),
        (lambda: nnx.LinearGeneral(4, 2, batch_axis={0: 3}, rngs=nnx.Rngs(0)), "each index of a batch axis"),
        (lambda: nnx.Einsum("bed,edf->bef", (3, 4, 2), rngs=nnx.Rngs(0)), "each index of its input"),
        (lambda: nnx.Einsum("btd,df->bf", (4, 2), rngs=nnx.Rngs(0)), "sums its input alone"),
        (lambda: nnx.Einsum("bd,df->b", (4, 2), rngs=nnx.Rngs(0)), "sums its kernel alone"),
        (lambda: nnx.vmap(lambda key: nnx.Linear(4, 2, rngs=nnx.Rngs(key)))(jax.random.split(KEY, 3)), "3 axes"),
    ],
)  # fmt: skip
def test_linears_without_a_matrix_say_why(part, why):
    assert why in NnxModule(One(part())).linears["part"].layout


def test_blocks_are_pruned_one_after_the_other_on_what_the_pruned_ones_before_them_give(batches):
    net, dense, found = Net(), Net(), prune_module(Net(), batches, wanda())
    stream = streams = [net.stem(x) for x in batches]
    moved = []
    for index, block in enumerate(net.blocks):
        # All linears of a block read what the block computes before it is pruned.
        inputs = {"up": [block.norm(x) for x in stream], "down": [block.hidden(x) for x in stream]}
        apart = pruned(block.down, [dense.blocks[index].hidden(x) for x in streams])
        for name, read in inputs.items():
            linear = getattr(block, name)
            linear.kernel[...] = jnp.asarray(pruned(linear, read).T)
            np.testing.assert_array_equal(weight(linear), weight(getattr(found[0].blocks[index], name)))
        moved.append(not np.array_equal(apart, weight(block.down)))
        stream, streams = [block(x) for x in stream], [dense.blocks[index](x) for x in streams]
    # What the dense blocks give would choose other weights.
    assert not moved[0]
    assert moved[2]
    assert found[1].parts == ["blocks.0", "blocks.1", "blocks.2"]
    assert [r.tokens for r in found[1].layers] == [3 * TOKENS] * 6


def test_without_lists_every_linear_is_a_part(batches):
    found, report = prune_module(Mlp(), batches, wanda())
    net, stream = Mlp(), batches
    for name in ("first", "second", "third"):
        linear = getattr(net, name)
        linear.kernel[...] = jnp.asarray(pruned(linear, stream).T)
        np.testing.assert_array_equal(weight(linear), weight(getattr(found, name)))
        stream = [nnx.relu(linear(x)) for x in stream]
    assert report.parts == ["first", "second", "third"]


def test_nnx_and_linen_of_the_same_weights_have_the_same_answer(batches):
    recipe = wanda(propagate=0.5, pattern="2:4")
    net, _ = prune_module(Net(), batches, recipe)
    variables = {"params": params_of(Net())}
    found, report = prune_module(LinenNet(), batches, recipe, params=variables)
    bare, _ = prune_module(LinenNet(), batches, recipe, params=nn.FrozenDict(variables["params"]))
    assert report.parts == ["blocks_0", "blocks_1", "blocks_2"]
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    assert isinstance(bare, nn.FrozenDict)
    for own, other, alone in zip(*map(jax.tree.leaves, (params_of(net), found, bare)), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-6)
        np.testing.assert_array_equal(other, alone)


@pytest.mark.parametrize("pattern", ["unstructured", "per-row", "2:4", "block:2x4", "group:4"])
def test_a_pattern_holds_in_every_linear(pattern, batches):
    net, report = prune_module(Net(count=2), batches, Recipe(method="magnitude", pattern=pattern))
    for block in net.blocks:
        for linear in (block.up, block.down):
            kept = weight(linear) != 0
            assert kept.sum() == kept.size // 2
            if pattern in ("per-row", "2:4"):
                assert (kept.sum(1) == WIDTH // 2).all()
            if pattern == "2:4":
                assert (kept.reshape(-1, 4).sum(1) == 2).all()
            tile = {"block:2x4": (2, 4), "group:4": (1, 4)}.get(pattern)
            if tile:
                sums = kept.reshape(WIDTH // tile[0], tile[0], WIDTH // tile[1], tile[1]).sum((1, 3))
                assert set(sums.ravel()) <= {0, tile[0] * tile[1]}
    assert report.sparsity == 0.5


class Trained(nnx.Module):
    """A block with all that a module changes while it runs."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.bn, self.dropout = nnx.BatchNorm(WIDTH, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.rngs, self.calls = rngs.fork(), nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        noise = 1e-3 * jax.random.normal(self.rngs(), x.shape)
        return self.down(self.dropout(nnx.relu(self.up(self.bn(x + noise)))))


def plain_state(net):
    state = jax.tree.leaves_with_path(nnx.state(net, nnx.Not(nnx.RngKey)))
    return {jax.tree_util.keystr(path): np.array(value) for path, value in state}


@pytest.mark.parametrize("inplace", [False, True])
def test_only_kernels_change_and_of_a_copy_unless_in_place(inplace, batches):
    net = Net(Trained)
    before = plain_state(net)
    found, _ = prune_module(net, batches, wanda(), inplace=inplace)
    assert (found is net) == inplace
    after, given = plain_state(found), plain_state(net)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "blocks" in name and "kernel" in name}
    if not inplace:
        assert all(np.array_equal(before[name], given[name]) for name in before)
    for each in (found, net):
        assert not each.blocks[0].dropout.deterministic
        assert not each.blocks[0].bn.use_running_average


def test_linen_keeps_boxes_and_dtypes_and_never_its_arguments(batches):
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            x = nn.Dense(WIDTH, kernel_init=boxed, param_dtype=jnp.bfloat16, name="first")(x)
            logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(WIDTH, kernel_init=logical, name="second")(x)

    variables = Boxed().init(KEY, batches[0])
    before = jax.tree.map(np.array, nn.meta.unbox(variables))
    found, report = prune_module(Boxed(), batches, Recipe(method="magnitude"), params=variables)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    kernels = [nn.meta.unbox(found)["params"][name]["kernel"] for name in ("first", "second")]
    assert [kernel.dtype for kernel in kernels] == [jnp.bfloat16, jnp.float32]
    assert [int((kernel == 0).sum()) for kernel in kernels] == [WIDTH**2 // 2] * 2
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(variables), before)
    assert not report.left_out


def test_what_is_left_out_has_a_reason(batches):
    class Lora(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs)
            self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return self.down(self.up(x))

    _, report = prune_module(Net(Lora, 2), batches, wanda(ignore="blocks.1.down"))
    # A linear that extends another is one linear, called once.
    assert {r.layer: r.tokens for r in report.layers} == dict.fromkeys(
        ["blocks.0.up", "blocks.0.down", "blocks.1.up"], 3 * TOKENS
    )
    outside, chosen = "outside the blocks", "not chosen by targets and ignore"
    assert {name: why for name, why in report.left_out.items() if "lora" not in name} == {
        "stem": outside, "head": outside, "blocks.1.down": chosen
    }  # fmt: skip
    assert "no linear's" in report.left_out["blocks.0.up.lora.lora_a"]
    assert "left out: stem (outside the blocks)" in str(report)
    _, report = prune_module(Net(), batches, wanda(), targets=["stem", "up"])
    assert report.parts == ["stem", "blocks.0", "blocks.1", "blocks.2"]
    # A table has the blocks, and what it names outside of them.
    _, report = prune_module(Net(), batches, wanda(), targets={"stem": 0.25})
    assert {r.layer: r.sparsity for r in report.layers if "blocks" not in r.layer} == {"stem": 0.25}
    assert report.left_out["head"] == outside


def test_a_shared_linear_is_pruned_last_on_the_inputs_of_all_its_calls(batches):
    class Shared(Mlp):
        def __call__(self, x):
            return self.first(nnx.relu(self.second(nnx.relu(self.first(x)))))

    found, report = prune_module(Shared(), batches, wanda(ignore="third"), call=lambda net, x: net(x))
    assert report.parts == ["second", "shared"]
    net = Shared()
    net.second.kernel[...] = found.second.kernel[...]
    again = [nnx.relu(net.second(nnx.relu(net.first(x)))) for x in batches]
    np.testing.assert_array_equal(weight(found.first), pruned(net.first, [*batches, *again]))


def test_tied_kernels_stay_tied(batches):
    net = Mlp()
    net.second.kernel = net.first.kernel
    found, report = prune_module(net, batches, wanda())
    assert found.first.kernel is found.second.kernel
    assert [r.layer for r in report.layers] == ["third", "first"]
    assert [r.tokens for r in report.layers] == [3 * TOKENS, 6 * TOKENS]
    params = params_of(Net(count=2))
    params["blocks_1"]["up"]["kernel"] = params["blocks_0"]["up"]["kernel"]
    found, _ = prune_module(LinenNet(count=2), batches, wanda(), params=params)
    assert found["blocks_0"]["up"]["kernel"] is found["blocks_1"]["up"]["kernel"]


def test_a_linear_that_a_block_calls_twice_is_pruned_with_the_block(batches):
    class Twice(Block):
        def __call__(self, x):
            return super().__call__(x) + self.up(2 * x)

    _, report = prune_module(Net(Twice, 2), batches, wanda())
    assert report.parts == ["blocks.0", "blocks.1"]
    assert {r.layer: r.tokens for r in report.layers}["blocks.0.up"] == 6 * TOKENS


@dataclass
class Output:
    """Of a class that JAX does not know."""

    x: Any
    rest: Any
    text: str


class Arguments(Block):
    """A block that is given more than arrays, and gives more than one."""

    def __call__(self, x, *, mask=None, scale=1.0, names=("a", None), cache=None):
        if cache is not None:
            cache.calls[...] = cache.calls[...] + 1
        return Output(super().__call__(x) * scale, {"mask": mask, "rest": None}, "a text")


class Tuples(Block):
    def __call__(self, x, mask, scale):
        return super().__call__(x) * scale, (mask, None), 3, "a text"


class WithTuples(Net):
    def __call__(self, batch):
        x = self.stem(batch["x"])
        for block in self.blocks:
            x, _, number, text = block(x, batch["mask"], scale=0.5)
            assert (type(number), text) == (int, "a text")
        return self.head(x)


def same_kernels(one, two):
    pairs = zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(two)), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


class Calls(nnx.Module):
    def __init__(self):
        self.calls = nnx.Cache(jnp.zeros(()))


class WithArguments(Net):
    def __call__(self, batch, cache=None):
        x = self.stem(batch["x"])
        for block in self.blocks:
            found = block(x, mask=batch["mask"], scale=0.5, cache=cache)
            assert found.text == "a text"
            x = found.x
        return self.head(x) if cache is None else self.head(x) * cache.calls[...]


def test_blocks_are_called_as_the_module_calls_them(batches):
    given = [{"x": x, "mask": None if index else x > 0} for index, x in enumerate(batches)]
    found, report = prune_module(WithArguments(Arguments), iter(given), wanda())
    assert report.parts == ["blocks.0", "blocks.1", "blocks.2"]
    plain, _ = prune_module(WithTuples(Tuples), given, wanda())
    assert same_kernels(plain, found)
    # What a block writes to an argument is there for the parts after it.
    targets = ["up", "down", "head"]
    cached, own = prune_module(
        WithArguments(Arguments), given, wanda(), call=lambda net, batch: net(batch, Calls()), targets=targets
    )
    np.testing.assert_array_equal(weight(cached.blocks[2].down), weight(found.blocks[2].down))
    assert own.parts[-1] == "head"
    seen = []
    prune_module(
        WithArguments(Arguments), given, wanda(), targets=targets,
        call=lambda net, batch: (cache := Calls(), net(batch, cache), seen.append(float(cache.calls[...]))),
    )  # fmt: skip
    assert set(seen) == {3.0}


def unreached(net, x):
    return net.stem(x)


def inside_a_program(net, x):
    return jax.jit(lambda x: net(x))(x)


def tied_outside():
    net = Net()
    net.head.kernel = net.blocks[0].up.kernel
    return net


def broken():
    net = Net()
    net.blocks[1].up.kernel[...] = net.blocks[1].up.kernel[...].at[0, 0].set(jnp.nan)
    return net


class Reading(Block):
    def __call__(self, x):
        return super().__call__(x) if jnp.any(x > 0) else x


ERRORS = {
    "no batches": (lambda xs: prune_module(Net(), []), "no batches"),
    "one array": (lambda xs: prune_module(Net(), xs[0]), r"say \[batch\]"),
    "no module": (lambda xs: prune_module(np.eye(3), xs), "given a ndarray"),
    "a linear": (lambda xs: prune_module(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), xs), "prune_layer"),
    "no linear": (lambda xs: prune_module(One(nnx.LayerNorm(8, rngs=nnx.Rngs(0))), xs), "no linear"),
    "Linen without params": (lambda xs: prune_module(LinenNet(), xs), "params=variables"),
    "Linen in place": (lambda xs: prune_module(LinenNet(), xs, params={}, inplace=True), "in place"),
    "NNX with params": (lambda xs: prune_module(Net(), xs, params={}), "is for Linen"),
    "a wrong batch": (lambda xs: prune_module(Net(), [xs[0][:, :3]]), "contracting"),
    "a field for folders": (lambda xs: prune_module(Net(), xs, wanda(seqlen=64, dtype="float16")), "(?s)seqlen.*dtype"),
    "no loss": (lambda xs: prune_module(Net(), xs, wanda(output_weights="gradient")), "give loss="),
    "grids, then training": (lambda xs: prune_module(Net(), xs, wanda(bits="int8", distil_epochs=1)), "off their grid"),
    "targets twice": (lambda xs: prune_module(Net(), xs, wanda(targets="up"), targets="up"), "given twice"),
    "no such target": (lambda xs: prune_module(Net(), xs, targets="dawn"), "did you mean 'down'"),
    "unreached": (lambda xs: prune_module(Net(), xs, call=unreached), "does not reach blocks.0.down"),
    "hidden": (lambda xs: prune_module(Net(), xs, call=inside_a_program), "blocks.0.up is called in a program"),
    "tied": (lambda xs: prune_module(tied_outside(), xs), "blocks.0.up shares its weight with head"),
    "no such pattern": (lambda xs: prune_module(Net(), xs, wanda(pattern="2:16")), "blocks.0.up.*16"),
    "no floats": (
        lambda xs: prune_module(Net(), xs, wanda(distil_epochs=1), call=lambda net, x: jnp.argmax(net(x), -1)),
        "no array of floats",
    ),
    "objects to train on": (
        lambda xs: prune_module(Net(), [object()], wanda(distil_epochs=1), call=lambda net, _: net(xs[0])),
        "say distil_epochs=0",
    ),
    "no recipe": (lambda xs: prune_module(Net(), xs, {"sparsity": 0.5}), "must be a Recipe"),
    "another width": (
        lambda xs: prune_module(Mlp(), [xs[0], xs[1][:, :5]], wanda()),
        "batch 1, counted from 0, gives first 5 inputs, and it has 8",
    ),
    "another width, later": (
        lambda xs: prune_module(Net(), [xs[0], xs[1], xs[2][:, :5]], wanda()), "(?s)contracting.*in the pass of batch 2"
    ),
    "fields": (lambda xs: prune_module(Net(), [{"x": x} for x in xs]), "the batch is a dict: `call` says how"),
    "no batch, Linen": (
        lambda xs: prune_module(LinenNet(), xs, params=params_of(Net()), call=lambda net: net), "`call` says how"
    ),
    "a weight of NaN": (lambda xs: prune_module(broken(), xs), "weight of blocks.1.up holds NaN"),
    "bits for no layer": (lambda xs: prune_module(Net(), xs, wanda(bits="q4_0")), "do not tile 8: use int8"),
    "values in training": (
        lambda xs: prune_module(Net(Reading), xs, wanda(train_epochs=1)), "training compiles .* say train_epochs=0"
    ),
    "values in training of all": (
        lambda xs: prune_module(Net(Reading), xs, wanda(distil_epochs=1)), "training compiles .* distil_epochs=0"
    ),
    "values in a gradient": (
        lambda xs: prune_module(Net(Reading), xs, wanda(output_weights="gradient"), loss=lambda y, x: jnp.sum(y)),
        "gradient' compiles .* say 'uniform'",
    ),
    "loss of several": (
        lambda xs: prune_module(Net(), xs, wanda(output_weights="gradient"), loss=lambda y, x: y),
        "loss must give a number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_what_cannot_be_done(name, batches):
    call, words = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=words):
        call(batches)
    assert "_passing" not in nnx.Linear.__call__.__qualname__


@pytest.mark.parametrize(
    ("factor", "words"), [(1e30, "not finite"), (np.nan, "not finite"), (None, "only empty"), (0, "zeros")]
)
def test_batches_without_a_finite_gram_are_an_error(factor, words, batches):
    given = [x[:0] if factor is None else x * factor for x in batches]
    with pytest.raises(PruningError, match=words):
        prune_module(Mlp(), given, wanda())


def test_blocks_that_read_values_run_as_plain_python(batches):
    class LinenReading(LinenBlock):
        @nn.compact
        def __call__(self, x):
            y = super().__call__(x)
            return y[np.asarray(jnp.any(y > 0, axis=1))] if len(y) else y

    class LinenReader(LinenNet):
        def setup(self):
            self.stem, self.head = nn.Dense(WIDTH), nn.Dense(WIDTH)
            self.blocks = [LinenReading() for _ in range(self.count)]

    plain, _ = prune_module(Net(), batches, wanda(propagate=0.5))
    found, report = prune_module(Net(Reading), batches, wanda(propagate=0.5))
    assert report.parts == ["blocks.0", "blocks.1", "blocks.2"]
    for own, other in zip(*map(jax.tree.leaves, (params_of(plain), params_of(found))), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6)
    _, report = prune_module(LinenReader(), batches, wanda(), params=params_of(Net()))
    assert report.parts == ["blocks_0", "blocks_1", "blocks_2"]


@pytest.mark.parametrize("way", ["module", "observer"])
def test_passes_end_after_an_error(way, batches):
    class Failing(Block):
        def __call__(self, x):
            if way == "module" and len(x) == 5:
                raise KeyError("five")
            return super().__call__(x)

    class Stubborn(Net):
        def __call__(self, x):
            try:
                return super().__call__(x)
            except:  # noqa: E722  - a pass that is ended must not begin again
                return super().__call__(x)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = threading.active_count()
    given = [*batches, batches[0][:5], batches[0][:7]]
    with pytest.raises(KeyError if way == "module" else KeyboardInterrupt):
        prune_module(
            Stubborn(Failing), given, wanda(), targets=["stem", "up"], observer=interrupt if way == "observer" else None
        )
    assert threading.active_count() == before
    assert "_passing" not in nnx.Linear.__call__.__qualname__


def test_blocks_alike_are_compiled_once_and_run_twice(batches):
    runs, traces = [], []

    class Counting(Block):
        def __call__(self, x):
            if isinstance(x, jax.core.Tracer):
                traces.append(1)
            jax.debug.callback(lambda: runs.append(1))
            return super().__call__(x)

    count = 4
    prune_module(Net(Counting, count), batches, wanda())
    jax.effects_barrier()
    # One program gives the Gram matrices of a block, another its output; the last block's is not needed.
    assert len(traces) == 2
    assert len(runs) == count + len(batches) * (2 * count - 1)


def test_linen_blocks_alike_are_compiled_once_and_run_twice(batches):
    runs, traces = [], []

    class Counting(LinenBlock):
        @nn.compact
        def __call__(self, x):
            if isinstance(x, jax.core.Tracer):
                traces.append(1)
            jax.debug.callback(lambda: runs.append(1))
            return super().__call__(x)

    class Counted(LinenNet):
        def setup(self):
            self.stem, self.head = nn.Dense(WIDTH), nn.Dense(WIDTH)
            self.blocks = [Counting() for _ in range(self.count)]

    count = 4
    prune_module(Counted(count), batches, wanda(), params=params_of(Net(count=count)))
    jax.effects_barrier()
    assert len(traces) == 2
    assert len(runs) == count + len(batches) * (2 * count - 1)


def test_a_linen_block_that_is_given_a_module_is_no_part(batches):
    class Given(nn.Module):
        shared: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.shared(nn.Dense(WIDTH, name="down")(nn.Dense(WIDTH, name="up")(x)))

    class Giving(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(WIDTH, name="shared")
            for index in range(2):
                x = Given(shared, name=f"blocks_{index}")(x)
            return x

    variables = Giving().init(KEY, batches[0])
    _, report = prune_module(Giving(), batches, wanda(), params=variables)
    assert report.parts == ["blocks_0.up", "blocks_0.down", "blocks_1.up", "blocks_1.down", "shared"]


def test_a_pass_has_the_settings_of_jax_of_its_caller(batches):
    seen = set()

    class Seeing(Mlp):
        def __call__(self, x):
            seen.add((jax.config.jax_default_matmul_precision, jax.sharding.get_abstract_mesh().axis_names))
            return super().__call__(x)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.default_matmul_precision("float32"), jax.set_mesh(mesh):
        prune_module(Seeing(), batches, wanda(precision="high"))
    assert seen == {("high", ("data",))}


def error_of(net, dense, batches):
    pairs = [(net(x), dense(x)) for x in batches]
    return sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs) / sum(float(jnp.sum(b**2)) for _, b in pairs)


def test_propagation_and_training_lower_the_error_of_the_output(batches):
    dense = Net(seed=3)
    plain, _ = prune_module(dense, batches, wanda())
    corrected, _ = prune_module(dense, batches, Recipe(method="maiht", propagate=1.0, output_weights="uniform"))
    uncorrected, _ = prune_module(dense, batches, Recipe(method="maiht", propagate=0.0, output_weights="uniform"))
    assert error_of(corrected, dense, batches) < error_of(uncorrected, dense, batches)
    trained, report = prune_module(dense, batches, wanda(train_epochs=4))
    assert error_of(trained, dense, batches) < error_of(plain, dense, batches)
    assert [r.block for r in report.blocks] == [0, 1, 2]
    assert all(r.last_loss < r.first_loss for r in report.blocks)


def test_zeros_stay_when_the_whole_module_is_trained(batches):
    dense = Net()
    plain, _ = prune_module(dense, batches, wanda())
    trained, report = prune_module(dense, batches, wanda(distil_epochs=4))
    assert report.blocks[-1].last_loss < report.blocks[-1].first_loss
    for own, other in zip(trained.blocks, plain.blocks, strict=True):
        np.testing.assert_array_equal(weight(own.up) == 0, weight(other.up) == 0)
        assert not np.array_equal(weight(own.up), weight(other.up))


def test_zeros_that_were_given_stay_and_bits_make_a_grid(batches):
    given, _ = prune_module(Net(), batches, wanda(sparsity=0.25))
    found, report = prune_module(given, batches, wanda(sparsity=0.5, keep_zeros=True, bits="int8"))
    for own, other in zip(found.blocks, given.blocks, strict=True):
        assert (weight(own.up)[weight(other.up) == 0] == 0).all()
        steps = weight(own.up) / np.abs(weight(own.up)).max(1, keepdims=True) * 127
        assert (weight(own.up) == 0).sum() >= WIDTH**2 // 2
        assert all(len(np.unique(np.round(row, 2))) <= 256 for row in steps)
    assert len(report.grids) == len(report.layers) == 6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_grid_in_few_digits_is_the_nearest_to_that_in_float32_and_its_error_is_of_what_is_stored(dtype, batches):
    half = nnx.Linear(WIDTH, WIDTH, param_dtype=dtype, rngs=nnx.Rngs(0))
    single = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    single.kernel[...] = half.kernel[...].astype(jnp.float32)
    recipe = Recipe(method="magnitude", sparsity=0.0, bits="int8")
    found, report = prune_module(One(half), batches, recipe)
    exact, _ = prune_module(One(single), batches, recipe)
    np.testing.assert_array_equal(weight(found.part), weight(exact.part).astype(dtype))
    dense, gram = weight(single).astype(np.float64), gram_of(batches).astype(np.float64)
    change = weight(found.part).astype(np.float64) - dense
    error = np.sum(change @ gram * change) / np.sum(dense @ gram * dense)
    np.testing.assert_allclose(report.grids[0].relative_error, error, rtol=1e-3)


def test_layers_that_no_group_tiles_are_named(rng):
    net = nnx.Sequential(nnx.Linear(16, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 4, rngs=nnx.Rngs(1)))
    told = []
    given = [rng.standard_normal((TOKENS, 16)).astype(np.float32)]
    _, report = prune_module(net, given, wanda(bits="q4_0"), observer=lambda _, *count: told.append(count))
    assert [r.layer for r in report.grids] == ["layers.2"]
    assert report.left_out == {
        "layers.0": "pruned, in floats: q4_0 has a scale for each 32 inputs, not a divisor of 16"
    }
    assert told[-1] == (3, 3)


def test_what_a_named_effort_does_and_a_module_cannot_have_is_told(batches):
    training = {"train_epochs", "distil_epochs"}
    most, left = module_recipe(Recipe(effort="most"), trains=False, has_loss=False)
    good, _ = module_recipe(Recipe(effort="good"), trains=False, has_loss=False)
    assert most.as_dict() | {"effort": "good"} == good.as_dict()
    assert left.keys() == training | {"allocation", "variants", "output_weights"}
    assert all("the module is one of torch" in left[name] for name in training)
    assert module_recipe(Recipe(method="best"), trains=False, has_loss=False)[1].keys() >= {"train_epochs"}
    assert not module_recipe(Recipe(), trains=False, has_loss=False)[1]
    _, report = prune_module(Mlp(), batches[:1], Recipe(effort="good", method="wanda", propagate=0.0))
    assert report.not_done == {"output_weights": "by the gradient of a loss, and none was given"}
    assert "not done: output_weights (by the gradient of a loss, and none was given)" in str(report)


def test_the_gradient_of_the_loss_weights_the_outputs(batches):
    # The loss sees two outputs of the head alone.
    def loss(output, batch):
        return jnp.sum(output[:, :2] ** 2)

    dense, fields = Mlp(), {"method": "magnitude", "pattern": "unstructured"}
    uniform, _ = prune_module(dense, batches, Recipe(**fields))
    weighted, _ = prune_module(
        dense, batches, Recipe(method="maiht", output_weights="gradient"), targets="third", loss=loss
    )
    plain, _ = prune_module(dense, batches, Recipe(method="maiht", output_weights="uniform"), targets="third")

    def seen(net):
        return sum(float(jnp.sum((net(x) - dense(x))[:, :2] ** 2)) for x in batches)

    assert seen(weighted) < seen(plain)
    assert seen(uniform) > 0


def test_an_expert_that_no_batch_reaches_is_pruned_by_magnitude(batches):
    class Mixture(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.experts = nnx.List([Block(rngs) for _ in range(3)])

        def __call__(self, x):
            return self.experts[0](x) + self.experts[1](x)

    net = Mixture()
    found, report = prune_module(net, batches, wanda())
    assert {r.layer for r in report.layers if r.starved} == {"experts.2.up", "experts.2.down"}
    own = np.abs(weight(net.experts[2].up))
    least = np.sort(own, axis=1)[:, [WIDTH // 2]]
    np.testing.assert_array_equal(weight(found.experts[2].up) != 0, own >= least)


def test_sums_of_layers_with_a_drift_in_some_batches_only_have_none():
    def grams(drift):
        eye = jnp.eye(2)
        return Grams(eye, jnp.float32(1), jnp.int32(1), eye[0], eye if drift else None)

    readers = (("one", "one"), ("two", "two"), ("three", "three"))
    first, second = (
        Sums(dict(zip(("one", "two", "three"), map(grams, drifts), strict=True)), readers)
        for drifts in ((True, False, True), (False, True, True))
    )
    both = added(first, second)
    assert [both[name].drift is None for name in ("one", "two", "three")] == [True, True, False]
    for name in ("one", "two", "three"):
        np.testing.assert_array_equal(both[name].gram, 2 * np.eye(2))


def test_experts_that_other_tokens_may_reach_have_no_drift(batches, monkeypatch):
    class Mixture(nnx.Module):
        """As many tokens for each expert in every module, but which ones is up to the router."""

        def __init__(self, rngs):
            self.router = nnx.Linear(WIDTH, 2, rngs=rngs)
            self.experts = nnx.List([Block(rngs) for _ in range(2)])

        def __call__(self, x):
            order = jnp.argsort(self.router(x)[:, 0])
            for expert, own in zip(self.experts, jnp.split(order, 2), strict=True):
                x = x.at[own].add(expert(x[own]))
            return x

    found, grams = {}, ModulePass._grams
    monkeypatch.setattr(ModulePass, "_grams", lambda *given: found.setdefault(given[1], grams(*given)))
    prune_module(Net(Mixture, 2), batches, wanda(propagate=0.5))
    assert {name for name, each in found.items() if each.drift is None} == {n for n in found if "experts" in n}
    assert len(found) == 10


@pytest.mark.processes
def test_batches_spread_over_devices_have_the_answer_of_one_device(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-m", "tests.pruning.spread_modules", str(tmp_path / "found.json")],
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for kind, found in json.loads((tmp_path / "found.json").read_text()).items():
        assert found["masks"], kind
        assert found["apart"] < 1e-5, kind
        assert found["devices"] == 1, kind
