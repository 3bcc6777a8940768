"""Floor 5: tensors between torch and JAX, by dlpack: the same memory on both sides where layout and device allow.

torch is imported where it is first needed, and by nobody whose model has a family here.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from sparseopt.models.errors import ModelError


def import_torch(model_type: Any, known: list[str]) -> tuple[Any, Any, Any]:
    """The packages torch, transformers and accelerate.

    Raises:
        ModelError: if one is missing, with the command that installs them.
    """
    try:
        import accelerate
        import torch
        import transformers
    except ImportError as error:
        raise ModelError(
            f"unknown model_type {model_type!r}; known are {', '.join(known)}. Other architectures go through torch, "
            f"and {error.name} is not installed: pip install 'sparseopt[torch]'"
        ) from error
    return torch, transformers, accelerate


def to_jax(tensor: Any) -> Array:
    """A torch tensor as a JAX array on the default device.

    No copy of a contiguous tensor where that device is the processor; torch must not write into it afterwards.
    """
    array = jax.dlpack.from_dlpack(tensor.detach().contiguous())
    device = jax.devices()[0]
    return array if device in array.devices() else jax.device_put(array, device)


def to_torch(array: Array) -> Any:
    """A JAX array as a torch tensor in the processor's memory; no copy where it lies there. It must not be written to.

    JAX computes in the background: this waits until the values are there.
    """
    import torch

    return torch.from_dlpack(jax.block_until_ready(jax.device_put(array, jax.devices("cpu")[0])))


def to_tensor(value: np.ndarray) -> Any:
    """A torch tensor of its own with a stored array's values; floats become float32.

    torch places it where JAX can take it over, which NumPy does not.
    """
    import torch

    if np.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_:
        return torch.from_numpy(value.copy())
    tensor = torch.empty(value.shape, dtype=torch.float32)
    tensor.numpy()[...] = value
    return tensor
