"""Floor 6: the fingerprint of a pruning run: everything that decides its result."""

import dataclasses
import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.models import PrunableModel, TorchModel
from sparseopt.models.prunable import digest
from sparseopt.pruning.recipe import Recipe, described
from sparseopt.system.machine import versions
from sparseopt.system.run_folder import Fingerprint

# Another version may round differently, and a resumed run must give the result of an uninterrupted one, bit for bit.
DECISIVE = ("sparseopt", "jax", "jaxlib", "numpy")
# The packages that run the blocks, by the kind of model.
FLAX_ROUTE, TORCH_ROUTE = ("flax",), ("torch", "transformers")
TRAINING = ("optax",)


class Identity:
    """The fingerprints of the runs that share one pass over a model.

    Attributes:
        linears: the names of the linears of every block, as in their records.
    """

    def __init__(self, model: PrunableModel, calibration: np.ndarray, heldout: np.ndarray) -> None:
        self._model = model
        self.linears = [
            [model.weight_key(index, name).removesuffix(".weight") for name in model.block_linears(index)]
            for index in range(model.num_blocks)
        ]
        tokens = {"calibration": calibration, "held-out": heldout}
        self._tokens = digest((name, array, [array]) for name, array in tokens.items())

    @cached_property
    def _weights(self) -> str:
        """A digest; the whole source is read for it, once."""
        return self._model.check_finite()

    def of(self, recipe: Recipe) -> Fingerprint:
        """What decides the result of a recipe's run, as plain JSON values."""
        found = versions()
        route = TORCH_ROUTE if isinstance(self._model, TorchModel) else FLAX_ROUTE
        decisive = (*DECISIVE, *route, *(TRAINING if recipe.reconstruction is not None else ()))
        device = jax.devices()[0]
        return json.loads(
            json.dumps(
                {
                    "weights": self._weights,
                    "tokens": self._tokens,
                    "recipe": recipe_identity(recipe),
                    "versions": {name: found[name] for name in decisive if name in found},
                    # The kind of a CPU repeats the platform's name.
                    "device": " ".join(dict.fromkeys((device.platform, device.device_kind, platform.machine()))),
                }
            )
        )


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, with digests of what its text omits: the arrays and the code of your own objects."""
    own = (None if isinstance(recipe.method, str) else recipe.method, recipe.penalty)
    leaves = [(path, _array(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(own)]
    arrays = digest((jax.tree_util.keystr(path), leaf, [leaf]) for path, leaf in leaves)
    sources = {f"{part.__module__}.{part.__qualname__}": _source(part) for part in _own_code(own)}
    code = {name: hashlib.sha256(source.encode()).hexdigest()[:16] for name, source in sources.items()}
    return {**recipe.as_dict(), "arrays": arrays if leaves else None, "code": code}


def _array(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    value = np.asarray(leaf)
    return np.asarray(described(leaf)) if value.dtype == object else value


def _own_code(value: Any) -> Iterator[Any]:
    """The classes and functions that a value consists of, except those of Python and of the `DECISIVE` packages."""
    for kind in [inspect.unwrap(value)] if hasattr(value, "__qualname__") else type(value).__mro__:
        root = (getattr(kind, "__module__", None) or "builtins").partition(".")[0]
        if root == "__main__" or root not in {*DECISIVE, *sys.stdlib_module_names}:
            yield kind
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, partial):
        inner = [value.func, value.args, value.keywords]
    elif isinstance(value, dict):
        inner = list(value.values())
    else:
        inner = list(value) if isinstance(value, list | tuple) else []
    for part in inner:
        yield from _own_code(part)


def _source(part: Any) -> str:
    """The source of a class or function; for a class without a file, as in a notebook, that of its functions."""
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        members = vars(part).values() if isinstance(part, type) else ()
        return "".join(_source(member) for member in members if inspect.isfunction(member))
