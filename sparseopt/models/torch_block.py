"""Floor 5: one block of a torch model: it runs on JAX arrays, and its tensors can be read and written.

The module is transformers' and holds no weights; tensors are passed to it for each run. A copy of a block is another
dictionary of the same tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseopt.models.errors import ModelError
from sparseopt.models.torch_bridge import to_jax, to_torch
from sparseopt.models.torch_skeleton import Call, Tensors

# Called with the name of a linear and its input, before the linear runs.
Watch = Callable[[str, Any], None]


class Caller(Protocol):
    """What a block needs to know of the model around it, see `TorchModel`."""

    @property
    def attention_width(self) -> int: ...

    @property
    def writes_input(self) -> bool: ...

    def call(self, index: int, batch: int, time: int) -> Call: ...


class TorchBlock:
    """A block with its tensors, in the layout of its module; a `PrunableBlock`.

    A linear is an `nn.Linear` or transformers' `Conv1D`, which stores `[in, out]`. Each reads a tap of its own name.
    """

    # Experts are never stacked here: those that are linears go by their own names.
    num_experts = 0
    expert_share = 1.0
    residual_taps: tuple[str, ...] = ()

    def __init__(self, module: Any, index: int, tensors: Tensors, caller: Caller) -> None:
        self._module, self._index, self._tensors, self._caller = module, index, tensors, caller
        self._linears = linears_of(module)

    @property
    def linears(self) -> dict[str, str]:
        return {name: name for name in self._linears}

    @property
    def attention_width(self) -> int:
        return self._caller.attention_width

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return to_jax(self.run(to_torch(x_BTD)))

    def run(self, x_BTD: Any, watch: Watch | None = None) -> Any:
        """Run the block on a torch tensor; `watch` sees the input of every linear before it is used.

        Raises:
            ModelError: if a linear that is no expert was not called, so that its input is unknown.
        """
        import torch

        x_BTD = x_BTD.clone() if self._caller.writes_input else x_BTD
        arguments, keywords = self._caller.call(self._index, *x_BTD.shape[:2]).with_stream(x_BTD)
        with torch.no_grad(), watched(self._linears, self._index, watch):
            output = torch.func.functional_call(self._module, self._tensors, arguments, keywords, tie_weights=False)
        return stream_of(output)

    def read(self, path: str) -> Array:
        tensor = self._tensor(path)
        return to_jax(tensor.T if self._is_transposed(path) else tensor)

    def write(self, values: Mapping[str, Array | np.ndarray]) -> None:
        for path, value in values.items():
            self._tensor(path)
            given = to_torch(jnp.asarray(value, jnp.float32))
            self._tensors[path] = given.T.contiguous() if self._is_transposed(path) else given

    def weight_shape(self, name: str) -> tuple[int, int]:
        path = f"{name}.weight"
        rows, columns = self._tensor(path).shape
        return (columns, rows) if self._is_transposed(path) else (rows, columns)

    def copy(self) -> "TorchBlock":
        return TorchBlock(self._module, self._index, dict(self._tensors), self._caller)

    def _tensor(self, path: str) -> Any:
        if path not in self._tensors:
            raise KeyError(f"no parameter {path!r} in a block; its linears are {', '.join(self._linears)}")
        return self._tensors[path]

    def _is_transposed(self, path: str) -> bool:
        name, _, kind = path.rpartition(".")
        return kind == "weight" and is_transposed(self._linears.get(name))


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
