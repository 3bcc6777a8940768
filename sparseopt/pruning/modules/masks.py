"""Which weights of a pruned model may change while it is trained further."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.models import PrunableModel
from sparseopt.models.files.in_memory import is_torch_module
from sparseopt.pruning.evaluate.audit import stored_masks


def masks(model: Any) -> Any:
    """Masks of the kept weights of a pruned model, to train it further without changing its zeros.

    Args:
        model: a Flax NNX module; the parameters of a Linen module, or its variables; a torch module; or a model folder,
            a GGUF file, a name on the hub, or an opened model.

    Returns:
        For NNX a pytree of bools like `nnx.state(module, nnx.Param)`, for Linen one like the argument: True where an
        entry may change, which is everywhere except at zeros of the linear layers' kernels. As the last member of an
        optax chain, it keeps the zeros exact:

            optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, masks))

        For torch a dictionary of bool tensors by the names of the linear layers' weights. For a folder or a file an
        iterator over all prunable layers: the name of the weight in the checkpoint and a bool array in the checkpoint's
        layout, True where the weight is not zero. Weights are read one by one; `dict(masks(folder))` holds all masks.

    Raises:
        ModelError: if the model cannot be used.
    """
    if isinstance(model, str | Path | PrunableModel):
        return stored_masks(model)
    if is_torch_module(model):
        return dict(_of_torch(model))
    from flax import nnx

    params = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model
    if not isinstance(params, Mapping):
        return stored_masks(model)

    def kept(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        shape = np.shape(leaf)
        return jnp.asarray(leaf) != 0 if "kernel" in names and len(shape) > 1 else jnp.ones(shape, bool)

    return jax.tree_util.tree_map_with_path(kept, params)


def _of_torch(module: Any) -> Iterator[tuple[str, Any]]:
    from sparseopt.pruning.modules.torch_module import TorchModule

    for name in TorchModule(module).linears:
        yield f"{name}.weight", module.get_submodule(name).weight.detach() != 0
