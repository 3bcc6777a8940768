"""Modules pruned on batches over four devices and on one; run by `test_devices.py`, which has eight."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sparseopt.core.base.mesh import device_line, over
from sparseopt.pruning import prune_module
from tests.pruning.modules.kinds import TOKENS, WIDTH, LinenNet, Mlp, Net, params_of, wanda


class Images(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = (nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


CASES = {
    "blocks": (Net, {}),
    "linears": (Mlp, {}),
    "images": (Images, {}),
    "trained": (Net, {"propagate": 0.5, "train_epochs": 2, "distil_epochs": 1}),
    "linen": (LinenNet, {}),
    # With arrays that have the cut in their types.
    "explicit": (Net, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_batches_spread_over_devices_have_the_answer_of_one_device(name, rng):
    make, fields = CASES[name]
    places = over(device_line(4))
    if name == "explicit":
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        places = NamedSharding(mesh, PartitionSpec("data"))
    shape = (8, 5, 5, 4) if name == "images" else (TOKENS, WIDTH)
    batches = [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
    answers = []
    for place in (None, places):
        module, given = make(), [jax.device_put(x, place) for x in batches]
        more = {"params": params_of(Net())} if isinstance(module, nn.Module) else {}
        answer, _ = prune_module(module, given, wanda(**fields), **more)
        answers.append(jax.tree.leaves(answer if more else nnx.state(answer)))
    for one, many in zip(*answers, strict=True):
        np.testing.assert_array_equal(np.asarray(one) == 0, np.asarray(many) == 0)
        np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)
        assert len(many.sharding.device_set) == 1
