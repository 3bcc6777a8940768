"""Modules in memory: facts of Flax NNX, Flax Linen and torch alike, against NumPy and against each other."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseopt.pruning import Recipe, prune_layer
from tests.pruning.modules.kinds import (
    LINEN,
    NNX,
    TOKENS,
    Net,
    forward,
    gram_of,
    of_every_kind,
    of_flax,
    params_of,
    wanda,
    weights,
)


def error_of(params, batches):
    pairs = [(forward(params, x)[1], forward(params_of(Net()), x)[1]) for x in batches]
    return sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)


@of_every_kind
def test_blocks_are_pruned_in_turn_on_what_the_pruned_ones_before_them_give(kind, batches):
    pruned, report = kind.prune(batches, wanda())
    dense, params, moved = params_of(Net()), params_of(Net()), []
    for index in range(3):
        # All linears of a block read what the block computes before it is pruned.
        reads, apart = ([forward(some, x)[0] for x in batches] for some in (params, dense))
        for name in ("up", "down"):
            key = f"blocks_{index}.{name}"
            expected, other = (
                prune_layer(weights(dense)[key], gram_of([x[key] for x in some]), 0.5, method="wanda").weight
                for some in (reads, apart)
            )
            np.testing.assert_array_equal(weights(pruned)[key], expected)
            params[f"blocks_{index}"][name]["kernel"] = expected.T
        moved.append(not np.array_equal(expected, other))
    # What the dense blocks give would choose other weights.
    assert (moved[0], moved[2]) == (False, True)
    assert report.parts == [f"blocks{kind.separator}{index}" for index in range(3)]
    assert [r.layer for r in report.layers] == [f"{part}.{name}" for part in report.parts for name in ("up", "down")]
    assert [r.tokens for r in report.layers] == [3 * TOKENS] * 6
    assert report.sparsity == 0.5
    assert report.left_out == {"stem": "outside the blocks", "head": "outside the blocks"}
    assert "left out: stem (outside the blocks)" in str(report)


@of_every_kind
def test_all_kinds_have_one_answer_and_propagation_lowers_the_error_of_the_output(kind, batches):
    errors = []
    for share in (0.0, 1.0):
        recipe = Recipe(method="maiht", propagate=share, pattern="2:4", output_weights="uniform")
        found, expected = (each.prune(batches, recipe)[0] for each in (kind, NNX))
        for name, own in weights(found).items():
            np.testing.assert_allclose(own, weights(expected)[name], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(np.count_nonzero(own.reshape(-1, 4), axis=1), 2)
        errors.append(error_of(found, batches))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("way", ["module", "observer"])
@of_every_kind
def test_passes_end_after_an_error(kind, way, batches):
    def failing(x):
        if way == "module" and len(x) == 5:
            raise KeyError("five")
        return x

    def stubborn(net, x):
        try:
            return net(x)
        except:  # noqa: E722  - a pass that is ended must not begin again
            return net(x)

    def interrupt(*_):
        raise KeyboardInterrupt

    given, observer = [*batches, batches[0][:5], batches[0][:7]], interrupt if way == "observer" else None
    before = threading.active_count()
    with pytest.raises(KeyError if way == "module" else KeyboardInterrupt):
        kind.prune(given, wanda(), hook=failing, targets=["stem", "up"], observer=observer, call=stubborn)
    assert threading.active_count() == before
    assert "_passing" not in nnx.Linear.__call__.__qualname__


@pytest.mark.parametrize(
    ("kind", "how", "blocks"), [(NNX, "train_epochs", [0, 1, 2]), (LINEN, "distil_epochs", [3])], ids=["nnx", "linen"]
)
def test_training_lowers_the_error_of_the_output_and_zeros_stay(kind, how, blocks, batches):
    plain, _ = kind.prune(batches, wanda())
    trained, report = kind.prune(batches, wanda(**{how: 4}))
    assert error_of(trained, batches) < error_of(plain, batches)
    assert [r.block for r in report.blocks] == blocks
    assert all(r.last_loss < r.first_loss for r in report.blocks)
    ours, theirs = (weights(params)["blocks_0.up"] for params in (trained, plain))
    assert not np.array_equal(ours, theirs)
    np.testing.assert_array_equal(ours == 0, theirs == 0)


@of_flax
def test_blocks_that_read_values_run_as_plain_python(kind, batches):
    def reading(x):
        return x[np.asarray(jnp.any(x > 0, axis=1))] if len(x) else x

    plain, found = (kind.prune(batches, wanda(propagate=0.5), hook=hook)[0] for hook in (lambda x: x, reading))
    for name, own in weights(plain).items():
        np.testing.assert_allclose(own, weights(found)[name], rtol=1e-4, atol=1e-6)


@of_flax
def test_blocks_alike_are_compiled_once_and_run_twice(kind, batches):
    runs, traces, count = [], [], 4

    def counting(x):
        if isinstance(x, jax.core.Tracer):
            traces.append(1)
        jax.debug.callback(lambda: runs.append(1))
        return x

    kind.prune(batches, wanda(), hook=counting, count=count)
    jax.effects_barrier()
    # One program gives the Gram matrices of a block, another its output; the last block's is not needed.
    assert len(traces) == 2
    assert len(runs) == count + len(batches) * (2 * count - 1)
