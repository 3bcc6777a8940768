"""Floor 5: tensors between torch and JAX by dlpack: the same memory on both sides where layout and device allow.

torch is imported on first use only, and never for a model whose family is known here.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array


def to_jax(tensor: Any) -> Array:
    """A torch tensor as a JAX array on the default device.

    A contiguous tensor is not copied where that device is the CPU; torch must not write into it afterwards.
    """
    array = jax.dlpack.from_dlpack(tensor.detach().contiguous())
    device = jax.devices()[0]
    return array if device in array.devices() else jax.device_put(array, device)


def to_torch(array: Array) -> Any:
    """A JAX array as a torch tensor in CPU memory, not copied if it is there already. It must not be written to.

    Waits until JAX has computed the values.
    """
    import torch

    return torch.from_dlpack(jax.block_until_ready(jax.device_put(array, jax.devices("cpu")[0])))


def to_tensor(value: np.ndarray) -> Any:
    """A torch tensor with a copy of a stored array's values; floats become float32.

    torch aligns its memory so that JAX can share it; NumPy does not.
    """
    import torch

    if np.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_:
        return torch.from_numpy(value.copy())
    tensor = torch.empty(value.shape, dtype=torch.float32)
    tensor.numpy()[...] = value
    return tensor
