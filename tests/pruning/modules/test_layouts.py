"""The matrix of a linear and the rows that it reads, for every kind of linear in Flax, against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view

from sparseopt.pruning.modules.linen_module import LinenModule
from sparseopt.pruning.modules.nnx_module import NnxModule
from tests.pruning.modules.kinds import LinenOne, One


def rngs():
    return nnx.Rngs(0)


def general(inputs, outputs, axis):
    """In NNX and in Linen."""
    return (
        lambda: nnx.LinearGeneral(inputs, outputs, axis=axis, use_bias=False, rngs=rngs()),
        lambda: nn.DenseGeneral(outputs, axis=axis, use_bias=False),
    )


def einsum(text, shape):
    return lambda: nnx.Einsum(text, shape, rngs=rngs()), lambda: nn.Einsum(shape, text, use_bias=False)


def conv(shape, size, pads=0, mode="constant", **options):
    """Also the shape of its input, and the patches that it reads, channel by channel."""
    axes, strides, dilation = len(size), options.get("strides", 1), options.get("kernel_dilation", 1)

    def patches(x):
        x = np.pad(x.reshape(-1, *x.shape[-axes - 1 :]), [(0, 0), *np.broadcast_to(pads, (axes, 2)), (0, 0)], mode=mode)
        spans = (np.array(size) - 1) * dilation + 1
        windows = sliding_window_view(x, tuple(spans), tuple(range(1, axes + 1)))
        starts, steps = (
            tuple(slice(None, None, int(s)) for s in np.broadcast_to(by, axes)) for by in (strides, dilation)
        )
        return windows[(slice(None), *starts, slice(None), *steps)].reshape(-1, 3 * np.prod(size))

    return (
        lambda: nnx.Conv(3, 4, size, use_bias=False, rngs=rngs(), **options),
        lambda: nn.Conv(4, size, use_bias=False, **options),
        shape,
        patches,
    )


IMAGE = (2, 6, 5, 3)
# Name: the linear in NNX and in Linen, the shape of its input, and its rows; by the axes of its output that come first.
LINEARS = {
    "dense": (
        lambda: nnx.Linear(5, 4, use_bias=False, rngs=rngs()),
        lambda: nn.Dense(4, use_bias=False),
        (2, 3, 5),
        lambda x: x.reshape(-1, 5),
    ),
    "general": (*general((3, 2), (2, 2), (-2, -1)), (5, 3, 2), lambda x: x.reshape(5, 6)),
    "another order": (*general((3, 2), 4, (-1, -3)), (3, 7, 2), lambda x: x.transpose(1, 0, 2).reshape(7, 6)),
    "from the front": (*general((3, 2), 4, (1, 3)), (2, 3, 4, 2), lambda x: x.transpose(0, 2, 1, 3).reshape(8, 6)),
    "einsum": (*einsum("btd,dnh->btnh", (5, 2, 2)), (2, 3, 5), lambda x: x.reshape(6, 5)),
    "ellipsis": (
        *einsum("b...nh,hnd->b...d", (2, 3, 4)),
        (2, 5, 3, 2),
        lambda x: x.transpose(0, 1, 3, 2).reshape(10, 6),
    ),
    "same": conv(IMAGE, (3, 2), [(0, 1), (0, 1)], strides=(2, 1)),
    "valid, dilated": conv(IMAGE, (2, 3), padding="VALID", kernel_dilation=(2, 1)),
    "pairs": conv(IMAGE, (3, 3), [(1, 2), (0, 1)], padding=((1, 2), (0, 1))),
    "circular, even": conv(IMAGE, (4, 3), [(1, 2), (1, 1)], "wrap", padding="CIRCULAR"),
    "reflected": conv(IMAGE, (3, 2), [(1, 1), (0, 1)], "reflect", padding="REFLECT"),
    "causal": conv((2, 6, 3), (3,), [(4, 0)], padding="CAUSAL", kernel_dilation=2),
    "without a batch axis": conv((6, 5, 3), (2, 2), padding="VALID"),
    "of volumes": conv((2, 3, 3, 4, 3), (2, 1, 2), padding="VALID"),
}


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
        matrix, kernel = opened.read("part"), opened.kernel("part")
        assert matrix.shape == opened.linears["part"].shape
        np.testing.assert_allclose(rows @ matrix.T, np.reshape(output, (len(rows), -1)), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(layout.kernel(matrix, kernel.shape), kernel)


def test_outputs_that_an_einsum_moves_are_weighted_where_they_are(rng):
    y = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    layout = NnxModule(One(nnx.Einsum("btd,dnh->nbth", (7, 2, 5), rngs=rngs()))).linears["part"].layout
    np.testing.assert_allclose(layout.by_output(jnp.asarray(y)), y.sum((1, 2)).ravel(), rtol=1e-5)


NO_MATRIX = {
    "in 2 groups": lambda: nnx.Conv(4, 4, (2, 2), feature_group_count=2, rngs=rngs()),
    "transposed": lambda: nnx.ConvTranspose(4, 4, (2, 2), rngs=rngs()),
    "from both ends": lambda: nnx.LinearGeneral((3, 4), 2, axis=(1, -1), rngs=rngs()),
    "each index of a batch axis": lambda: nnx.LinearGeneral(4, 2, batch_axis={0: 3}, rngs=rngs()),
    "each index of its input": lambda: nnx.Einsum("bed,edf->bef", (3, 4, 2), rngs=rngs()),
    "sums its input alone": lambda: nnx.Einsum("btd,df->bf", (4, 2), rngs=rngs()),
    "sums its kernel alone": lambda: nnx.Einsum("bd,df->b", (4, 2), rngs=rngs()),
    "3 axes": lambda: nnx.vmap(lambda key: nnx.Linear(4, 2, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 3)
    ),
}


@pytest.mark.parametrize("why", NO_MATRIX)
def test_linears_without_a_matrix_say_why(why):
    assert why in NnxModule(One(NO_MATRIX[why]())).linears["part"].layout
