"""What `prune_module` rejects: the type of the error and what it names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseopt.pruning import PruningError, prune_module
from tests.pruning.modules.kinds import Block, LinenNet, Mlp, Net, One, params_of, wanda


class Reading(Block):
    def __call__(self, x):
        return super().__call__(x) if jnp.any(x > 0) else x


def net(xs, recipe=None, **options):
    return prune_module(Net(), xs, recipe, **options)


def reading(xs, recipe, **options):
    return prune_module(Net(Reading), xs, recipe, **options)


def linen(xs, **options):
    return prune_module(LinenNet(), xs, **{"params": params_of(Net())} | options)


def tied_outside(xs):
    net = Net()
    net.head.kernel = net.blocks[0].up.kernel
    prune_module(net, xs)


def broken(xs):
    net = Net()
    net.blocks[1].up.kernel[...] = net.blocks[1].up.kernel[...].at[0, 0].set(jnp.nan)
    prune_module(net, xs)


def inside_a_program(net, x):
    return jax.jit(lambda x: net(x))(x)


def total(output, batch):
    return jnp.sum(output)


GRADIENT, TRAIN, DISTIL = wanda(output_weights="gradient"), wanda(train_epochs=1), wanda(distil_epochs=1)
FOLDERS, MODELS = wanda(seqlen=64, dtype="float16"), wanda(weighting="residual", expert_tokens="all")
TARGETED, TWO_OF_16 = wanda(targets="up"), wanda(pattern="2:16")
# Two parts of what each is told.
BAD = [
    (lambda xs: net([]), "no batches", "at least one"),
    (lambda xs: net(xs[0]), "batches", "say [batch]"),
    (lambda xs: prune_module(np.eye(3), xs), "module", "ndarray"),
    (lambda xs: prune_module(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), xs), "linear", "prune_layer"),
    (lambda xs: prune_module(One(nnx.LayerNorm(8, rngs=nnx.Rngs(0))), xs), "module", "no linear"),
    (lambda xs: linen(xs, params=None), "Linen", "params=variables"),
    (lambda xs: linen(xs, inplace=True), "Linen", "in place"),
    (lambda xs: linen(xs, call=lambda net: net), "call", "batch"),
    (lambda xs: net(xs, params={}), "params", "Linen"),
    (lambda xs: net(xs, {"sparsity": 0.5}), "recipe", "dict"),
    (lambda xs: net(xs, FOLDERS), "seqlen", "dtype"),
    (lambda xs: net(xs, MODELS), "weighting", "expert_tokens"),
    (lambda xs: net(xs, GRADIENT), "output_weights", "loss="),
    (lambda xs: net(xs, wanda(), loss=total), "loss", "uniform"),
    (lambda xs: net(xs, wanda(bits="int8", distil_epochs=1)), "distil_epochs", "grid"),
    (lambda xs: net(xs, TARGETED, targets="up"), "targets", "twice"),
    (lambda xs: net(xs, targets="dawn"), "dawn", "'down'"),
    (lambda xs: net(xs, call=lambda net, x: net.stem(x)), "reach", "blocks.0.down"),
    (lambda xs: net(xs, call=inside_a_program), "blocks.0.up", "program"),
    (tied_outside, "blocks.0.up", "head"),
    (broken, "blocks.1.up", "NaN"),
    (lambda xs: net(xs, TWO_OF_16), "blocks.0.up", "16"),
    (lambda xs: net(xs, wanda(bits="q4_0")), "q4_0", "8"),
    (lambda xs: net([{"x": x} for x in xs]), "dict", "call"),
    (lambda xs: net([xs[0][:, :3]]), "contracting", "3"),
    (lambda xs: net([*xs[:2], xs[2][:, :5]], wanda()), "contracting", "batch 2"),
    (lambda xs: prune_module(Mlp(), [xs[0], xs[1][:, :5]], wanda()), "batch 1", "first 5 inputs"),
    (lambda xs: net(xs, DISTIL, call=lambda net, x: jnp.argmax(net(x))), "no array", "floats"),
    (lambda xs: net([object()], DISTIL, call=lambda net, _: net(xs[0])), "object", "distil_epochs=0"),
    (lambda xs: reading(xs, TRAIN), "compiles", "train_epochs=0"),
    (lambda xs: reading(xs, DISTIL), "compiles", "distil_epochs=0"),
    (lambda xs: reading(xs, GRADIENT, loss=total), "gradient", "'uniform'"),
    (lambda xs: net(xs, GRADIENT, loss=lambda y, x: y), "loss", "number"),
]


@pytest.mark.parametrize(("call", "field", "given"), BAD, ids=lambda each: each if isinstance(each, str) else "")
def test_an_error_names_what_cannot_be_done(call, field, given, batches):
    with pytest.raises(TypeError if field in ("contracting", "call") else ValueError) as caught:
        call(batches)
    told = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert field in told
    assert given in told
    assert "_passing" not in nnx.Linear.__call__.__qualname__


@pytest.mark.parametrize(
    ("factor", "words"), [(1e30, "not finite"), (np.nan, "not finite"), (None, "only empty"), (0, "zeros")]
)
def test_batches_without_a_finite_gram_are_an_error(factor, words, batches):
    given = [x[:0] if factor is None else x * factor for x in batches]
    with pytest.raises(PruningError, match=words):
        prune_module(Mlp(), given, wanda())
