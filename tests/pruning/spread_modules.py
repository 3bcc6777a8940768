"""Modules pruned on batches over the four virtual devices of a mesh, and on one device; see `test_modules.py`."""

import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sparseopt.core.base.mesh import device_line, over
from sparseopt.pruning import Recipe, prune_module
from tests.pruning.test_modules import TOKENS, WIDTH, LinenNet, Mlp, Net, params_of


class Images(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = (nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def main(path: Path) -> None:
    """Compare, and write what was found."""
    rng, mesh = np.random.default_rng(0), device_line(4)
    tokens = [rng.standard_normal((TOKENS, WIDTH)).astype(np.float32) for _ in range(2)]
    images = [rng.standard_normal((8, 5, 5, 4)).astype(np.float32) for _ in range(2)]
    plain = Recipe(method="wanda")
    trained = Recipe(method="wanda", propagate=0.5, train_epochs=2, distil_epochs=1)
    params = params_of(Net())
    cases = {
        "blocks": (Net(), tokens, plain, {}),
        "linears": (Mlp(), tokens, plain, {}),
        "images": (Images(), images, plain, {}),
        "trained": (Net(), tokens, trained, {}),
        "linen": (LinenNet(), tokens, plain, {"params": params}),
        "explicit": (Net(), tokens, plain, {}),
    }
    # One whose arrays have the cut in their types.
    explicit = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    by_rows = NamedSharding(explicit, PartitionSpec("data"))
    found = {}
    for name, (module, batches, recipe, more) in cases.items():
        answers = []
        for spread in (False, True):
            places = by_rows if name == "explicit" else over(mesh)
            given = [jax.device_put(x, places if spread else None) for x in batches]
            answer, _ = prune_module(module, given, recipe, **more)
            answers.append(jax.tree.leaves(answer if isinstance(module, nn.Module) else nnx.state(answer)))
        pairs = [(np.asarray(one), np.asarray(many)) for one, many in zip(*answers, strict=True)]
        found[name] = {
            "masks": all(np.array_equal(one == 0, many == 0) for one, many in pairs),
            "apart": max(float(np.max(np.abs(one - many))) for one, many in pairs),
            "devices": max(len(leaf.sharding.device_set) for leaf in answers[1]),
        }
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
