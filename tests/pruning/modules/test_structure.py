"""What `prune_module` makes of a module's structure: parts, arguments, what is shared and what stays as it is."""

from dataclasses import dataclass
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
from sparseopt.pruning.modules.module_pass import ModulePass
from sparseopt.pruning.modules.module_plan import module_recipe
from sparseopt.pruning.modules.watched import Sums, added
from tests.pruning.modules.kinds import TOKENS, WIDTH, Block, LinenNet, Mlp, Net, One, gram_of, params_of, wanda, weight


def pruned(linear, inputs):
    return prune_layer(weight(linear), gram_of(inputs), 0.5, method="wanda").weight


def tokens_of(report):
    return {record.layer: record.tokens for record in report.layers}


def test_without_lists_of_blocks_every_linear_is_a_part(batches):
    found, report = prune_module(Mlp(), batches, wanda())
    net, stream = Mlp(), batches
    for name in ("first", "second", "third"):
        linear = getattr(net, name)
        linear.kernel[...] = jnp.asarray(pruned(linear, stream).T)
        np.testing.assert_array_equal(weight(linear), weight(getattr(found, name)))
        stream = [nnx.relu(linear(x)) for x in stream]
    assert report.parts == ["first", "second", "third"]
    # A list whose entries have one linear each is not a list of blocks.
    _, report = prune_module(Net(lambda rngs: One(nnx.Linear(WIDTH, WIDTH, rngs=rngs)), 2), batches, wanda())
    assert report.parts == ["stem", "blocks.0.part", "blocks.1.part", "head"]


class Changing(nnx.Module):
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
    net = Net(Changing)
    before = plain_state(net)
    found, _ = prune_module(net, batches, wanda(), inplace=inplace)
    assert (found is net) == inplace
    after, given = plain_state(found), plain_state(net)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "blocks" in name and "kernel" in name}
    assert inplace or all(np.array_equal(before[name], given[name]) for name in before)
    for each in (found, net):
        assert not each.blocks[0].dropout.deterministic
        assert not each.blocks[0].bn.use_running_average


def test_linen_returns_what_it_is_given_with_boxes_and_dtypes(batches):
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            x = nn.Dense(WIDTH, kernel_init=boxed, param_dtype=jnp.bfloat16, name="first")(x)
            logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(WIDTH, kernel_init=logical, name="second")(x)

    variables = Boxed().init(jax.random.key(0), batches[0])
    before = jax.tree.map(np.array, nn.meta.unbox(variables))
    found, report = prune_module(Boxed(), batches, Recipe(method="magnitude"), params=variables)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    kernels = [nn.meta.unbox(found)["params"][name]["kernel"] for name in ("first", "second")]
    assert [kernel.dtype for kernel in kernels] == [jnp.bfloat16, jnp.float32]
    assert [int((kernel == 0).sum()) for kernel in kernels] == [WIDTH**2 // 2] * 2
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(variables), before)
    assert not report.left_out
    frozen, _ = prune_module(LinenNet(), batches, wanda(), params=nn.FrozenDict(params_of(Net())))
    assert isinstance(frozen, nn.FrozenDict)


def test_what_is_left_out_has_a_reason(batches):
    class Lora(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs)
            self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return self.down(self.up(x))

    _, report = prune_module(Net(Lora, 2), batches, wanda(ignore="blocks.1.down"))
    # A linear that extends another is one linear, called once.
    assert tokens_of(report) == dict.fromkeys(["blocks.0.up", "blocks.0.down", "blocks.1.up"], 3 * TOKENS)
    assert report.left_out["blocks.1.down"] == "not chosen by targets and ignore"
    assert "no linear's" in report.left_out["blocks.0.up.lora.lora_a"]
    _, report = prune_module(Net(), batches, wanda(), targets=["stem", "up"])
    assert report.parts == ["stem", "blocks.0", "blocks.1", "blocks.2"]
    # A table has the blocks, and what it names outside of them.
    _, report = prune_module(Net(), batches, wanda(), targets={"stem": 0.25})
    assert {r.layer: r.sparsity for r in report.layers if "blocks" not in r.layer} == {"stem": 0.25}
    assert report.left_out["head"] == "outside the blocks"


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


def test_tied_kernels_stay_tied_and_are_pruned_on_the_inputs_of_both(batches):
    net = Mlp()
    net.second.kernel = net.first.kernel
    found, report = prune_module(net, batches, wanda())
    assert found.first.kernel is found.second.kernel
    assert tokens_of(report) == {"third": 3 * TOKENS, "first": 6 * TOKENS}
    params = params_of(Net())
    params["blocks_1"]["up"]["kernel"] = params["blocks_0"]["up"]["kernel"]
    found, _ = prune_module(LinenNet(), batches, wanda(), params=params)
    assert found["blocks_0"]["up"]["kernel"] is found["blocks_1"]["up"]["kernel"]


def test_a_linear_that_a_block_calls_twice_is_pruned_with_the_block(batches):
    class Twice(Block):
        def __call__(self, x):
            return super().__call__(x) + self.up(2 * x)

    _, report = prune_module(Net(Twice, 2), batches, wanda())
    assert report.parts == ["blocks.0", "blocks.1"]
    assert tokens_of(report)["blocks.0.up"] == 6 * TOKENS


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

    variables = Giving().init(jax.random.key(0), batches[0])
    _, report = prune_module(Giving(), batches, wanda(), params=variables)
    assert report.parts == ["blocks_0.up", "blocks_0.down", "blocks_1.up", "blocks_1.down", "shared"]


@dataclass
class Output:
    """Of a class that JAX does not know."""

    x: Any
    rest: Any


class Arguments(Block):
    """A block that is given more than arrays, writes to an argument, and gives more than one."""

    def __call__(self, x, mask, *, scale=1.0, names=("a", None), cache=None):
        if cache is not None:
            cache.calls[...] = cache.calls[...] + 1
        return Output(super().__call__(x) * scale, {"mask": mask}), (mask, None), 3, "a text"


class Calls(nnx.Module):
    def __init__(self):
        self.calls = nnx.Cache(jnp.zeros(()))


@pytest.mark.parametrize("counted", [False, True])
def test_blocks_are_called_as_the_module_calls_them(counted, batches):
    class Plain(Net):
        def __call__(self, batch):
            x = self.stem(batch["x"])
            for block in self.blocks:
                x = 0.5 * block(x)
            return self.head(x)

    class Giving(Net):
        def __call__(self, batch):
            x, cache = self.stem(batch["x"]), Calls() if counted else None
            for block in self.blocks:
                output, _, number, text = block(x, batch["mask"], scale=0.5, cache=cache)
                assert (type(number), text) == (int, "a text")
                x = output.x
            # What a block writes to an argument is there for the parts after it.
            seen.append(float(cache.calls[...]) if counted else 3)
            return self.head(x)

    seen, given = [], [{"x": x, "mask": None if index else x > 0} for index, x in enumerate(batches)]
    expected, _ = prune_module(Plain(), given, wanda())
    found, report = prune_module(Giving(Arguments), iter(given), wanda(), targets=["up", "down", "head"])
    assert report.parts == ["blocks.0", "blocks.1", "blocks.2", "head"]
    for own, other in zip(found.blocks, expected.blocks, strict=True):
        np.testing.assert_array_equal(weight(own.down), weight(other.down))
    assert set(seen) == {3.0}


def test_a_pass_has_the_settings_of_jax_of_its_caller(batches):
    seen = set()

    def seeing(net, x):
        seen.add((jax.config.jax_default_matmul_precision, jax.sharding.get_abstract_mesh().axis_names))
        return net(x)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.default_matmul_precision("float32"), jax.set_mesh(mesh):
        prune_module(Mlp(), batches, wanda(precision="high"), call=seeing)
    assert seen == {("high", ("data",))}


def test_zeros_that_were_given_stay_on_a_grid_too(batches):
    given, _ = prune_module(Net(), batches, wanda(sparsity=0.25))
    found, report = prune_module(given, batches, wanda(sparsity=0.5, keep_zeros=True, bits="int8"))
    for own, other in zip(found.blocks, given.blocks, strict=True):
        assert (weight(own.up)[weight(other.up) == 0] == 0).all()
        assert np.count_nonzero(weight(own.up)) <= WIDTH**2 // 2
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
    assert list(report.left_out) == ["layers.0"]
    assert "32 inputs, not a divisor of 16" in report.left_out["layers.0"]
    assert told[-1] == (3, 3)


def test_what_a_named_effort_does_and_a_module_cannot_have_is_told(batches):
    most, left = module_recipe(Recipe(effort="most"), trains=False, has_loss=False)
    good, _ = module_recipe(Recipe(effort="good"), trains=False, has_loss=False)
    assert most.as_dict() | {"effort": "good"} == good.as_dict()
    assert left.keys() == {"train_epochs", "distil_epochs", "allocation", "output_weights"}
    assert module_recipe(Recipe(method="best"), trains=False, has_loss=False)[1].keys() >= {"train_epochs"}
    assert not module_recipe(Recipe(), trains=False, has_loss=False)[1]
    _, report = prune_module(Mlp(), batches[:1], Recipe(effort="good", method="wanda", propagate=0.0))
    assert report.not_done == {"output_weights": "by the gradient of a loss, and none was given"}
    assert "not done: output_weights (by the gradient of a loss, and none was given)" in str(report)


def test_the_gradient_of_the_loss_weights_the_outputs(batches):
    # The loss sees two outputs of the head alone.
    def loss(output, batch):
        return jnp.sum(output[:, :2] ** 2)

    def seen(output_weights, **options):
        recipe = Recipe(method="maiht", output_weights=output_weights)
        net, _ = prune_module(Mlp(), batches, recipe, targets="third", **options)
        return sum(float(jnp.sum((net(x) - Mlp()(x))[:, :2] ** 2)) for x in batches)

    assert 0 <= seen("gradient", loss=loss) < seen("uniform")


def test_an_expert_that_no_batch_reaches_is_pruned_by_magnitude(batches):
    class Mixture(nnx.Module):
        def __init__(self):
            self.experts = nnx.List([Block(nnx.Rngs(seed)) for seed in range(3)])

        def __call__(self, x):
            return self.experts[0](x) + self.experts[1](x)

    net = Mixture()
    found, report = prune_module(net, batches, wanda())
    assert {r.layer for r in report.layers if r.starved} == {"experts.2.up", "experts.2.down"}
    own = np.abs(weight(net.experts[2].up))
    least = np.sort(own, axis=1)[:, [WIDTH // 2]]
    np.testing.assert_array_equal(weight(found.experts[2].up) != 0, own >= least)


def test_a_drift_that_some_batches_lack_is_none():
    def sums(drift):
        grams = Grams(jnp.eye(2), jnp.float32(1), jnp.int32(1), jnp.ones(2), drift)
        return Sums({"one": grams}, (("one", "one"),))

    some, all_of_them = (added(sums(jnp.eye(2)), sums(drift))["one"] for drift in (None, jnp.eye(2)))
    assert some.drift is None
    for found in (some.gram, all_of_them.gram, all_of_them.drift):
        np.testing.assert_array_equal(found, 2 * np.eye(2))


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
