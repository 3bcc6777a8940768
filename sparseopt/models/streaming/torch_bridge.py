"""The way between torch and JAX: tensors by dlpack, and what a block's linears are given.

torch is imported on first use only, and never for a model whose family is known here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from sparseopt.models.base.errors import ModelError

# Called with the name of a linear and its input, before the linear runs.
Watch = Callable[[str, Any], None]


@cache
def torch_device() -> Any:
    """Where torch runs: on JAX's default device if torch can use it, a GPU that both are built for; else on the CPU."""
    import torch

    device = jax.devices()[0]
    shared = device.platform == "gpu" and torch.cuda.is_available()
    return torch.device("cuda", device.local_hardware_id) if shared else torch.device("cpu")


def to_jax(tensor: Any) -> Array:
    """A torch tensor as a JAX array on the default device.

    A contiguous tensor is not copied where torch runs on that device; torch must not write into it afterwards.
    """
    if _is_host_of_jax(tensor.device):
        return jax.device_put(tensor.detach().numpy())
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def to_torch(array: Array) -> Any:
    """A JAX array as a torch tensor where torch runs, not copied if it is there already. It must not be written to.

    Waits until JAX has computed the values.
    """
    import torch

    if _is_host_of_jax(torch_device()):
        return torch.from_numpy(np.array(array))
    return torch.from_dlpack(jax.block_until_ready(jax.device_put(array, jax.devices()[0])))


def _is_host_of_jax(device: Any) -> bool:
    """Whether torch is on the CPU and JAX is not, and may not even be able to use it (JAX_PLATFORMS)."""
    return device.type == "cpu" and jax.devices()[0].platform != "cpu"


def to_tensor(value: np.ndarray) -> Any:
    """A torch tensor with a copy of a stored array's values, where torch runs; floats become float32.

    torch aligns its memory so that JAX can share it; NumPy does not.
    """
    import torch

    if np.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_:
        return torch.from_numpy(value.copy()).to(torch_device())
    tensor = torch.empty(value.shape, dtype=torch.float32)
    tensor.numpy()[...] = value
    return tensor.to(torch_device())


def linears_of(module: Any) -> dict[str, Any]:
    """The linears in a block, by name, in the order in which it makes them."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)}


def is_transposed(linear: Any) -> bool:
    """Whether a linear stores its weight `[in, out]`."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(linear, Conv1D)


@contextmanager
def watched(linears: dict[str, Any], index: int, watch: Watch | None = None) -> Iterator[None]:
    """Pass the input of every linear of block `index` to `watch` while the block runs.

    Raises:
        ModelError: at the end, if a linear was not called: its weight was used in another way. An expert may be without
            tokens.
    """
    called: set[str] = set()

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
            called.add(name)
            if watch is not None:
                watch(name, arguments[0] if arguments else next(iter(keywords.values())))

        return hook

    hooks = [part.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, part in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    missed = [name for name in linears if name not in called and ".experts." not in name]
    if missed:
        raise ModelError(
            f"block {index} does not call {', '.join(missed)} as a linear, so that its input cannot be seen; "
            "a model with such blocks cannot be pruned through torch"
        )


def stream_of(output: Any) -> Any:
    """The stream in a block's output, which may be the first of several values."""
    return output[0] if isinstance(output, tuple | list) else output


def with_stream(output: Any, stream: Any) -> Any:
    """An output of the same form with another stream, its other values None."""
    return type(output)((stream, *[None] * (len(output) - 1))) if isinstance(output, tuple | list) else stream
