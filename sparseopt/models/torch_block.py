"""Floor 5: one block of a torch model: it runs on JAX arrays, and its tensors can be read and written.

The module is transformers' and holds nothing; tensors are lent to it while it runs. So a copy of a block is another
table of the same tensors.
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
    """What a block must know of the model around it."""

    @property
    def attention_width(self) -> int:
        """The width of the attention's mixed values."""

    @property
    def writes_input(self) -> bool:
        """Whether blocks write into the stream that they get."""

    def call(self, index: int, batch: int, time: int) -> Call:
        """How the model calls a block on `batch` windows of `time` tokens."""


class TorchBlock:
    """A block with its tensors, in the layout of its module.

    A linear is an `nn.Linear` or transformers' `Conv1D`, which stores `[in, out]`. Each reads a tap of its own name.
    """

    # No expert is stacked with others: those that are linears go by their own names.
    num_experts = 0
    expert_share = 1.0
    residual_taps: tuple[str, ...] = ()

    def __init__(self, module: Any, index: int, tensors: Tensors, caller: Caller) -> None:
        self._module, self._index, self._tensors, self._caller = module, index, tensors, caller
        self._linears = linears_of(module)

    @property
    def linears(self) -> dict[str, str]:
        """The tap that each linear reads, by the linear's name."""
        return {name: name for name in self._linears}

    @property
    def attention_width(self) -> int:
        """The width of the attention's mixed values."""
        return self._caller.attention_width

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Run the block."""
        return to_jax(self.run(to_torch(x_BTD)))

    def run(self, x_BTD: Any, watch: Watch | None = None) -> Any:
        """Run the block on a torch tensor, `watch` told of the input of every linear before it is used.

        Raises:
            ModelError: if a linear that is no expert was not called: its input cannot be seen.
        """
        called: set[str] = set()

        def told(name: str, value: Any) -> None:
            called.add(name)
            if watch is not None:
                watch(name, value)

        x_BTD = x_BTD.clone() if self._caller.writes_input else x_BTD
        arguments, keywords = self._caller.call(self._index, *x_BTD.shape[:2]).with_stream(x_BTD)
        with watched(self._linears, told):
            output = run_module(self._module, self._tensors, arguments, keywords)
        refuse_uncalled(self._linears, called, self._index)
        return stream_of(output)

    def read(self, path: str) -> Array:
        """The parameter at a path, a linear's weight as `[out, in]`.

        Raises:
            KeyError: if the block has no such parameter.
        """
        tensor = self._tensor(path)
        return to_jax(tensor.T if self._is_transposed(path) else tensor)

    def write(self, values: Mapping[str, Array | np.ndarray]) -> None:
        """Put other values there, by path; blocks copied before keep theirs.

        Raises:
            KeyError: if the block has no such parameter.
        """
        for path, value in values.items():
            self._tensor(path)
            given = to_torch(jnp.asarray(value, jnp.float32))
            self._tensors[path] = given.T.contiguous() if self._is_transposed(path) else given

    def weight_shape(self, name: str) -> tuple[int, int]:
        """`(out, in)` of a linear.

        Raises:
            KeyError: if the block has no such linear.
        """
        path = f"{name}.weight"
        rows, columns = self._tensor(path).shape
        return (columns, rows) if self._is_transposed(path) else (rows, columns)

    def copy(self) -> "TorchBlock":
        """A block of its own with the same parameters."""
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


def unprunable_experts(module: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the parameters in which a block keeps experts that are no linears of their own."""
    import torch

    plain = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    return {
        f"{owner}.{name}": tuple(parameter.shape)
        for owner, part in module.named_modules()
        if not isinstance(part, plain)
        for name, parameter in part.named_parameters(recurse=False)
        if (parameter.ndim == 3 and parameter.shape[0] > 1) or (parameter.ndim > 1 and "expert" in owner)
    }


def run_module(module: Any, tensors: Tensors, arguments: tuple, keywords: dict[str, Any]) -> Any:
    """Run a module on tensors that are lent to it, without gradients."""
    import torch

    with torch.no_grad():
        return torch.func.functional_call(module, tensors, arguments, keywords, tie_weights=False)


@contextmanager
def watched(linears: dict[str, Any], watch: Watch) -> Iterator[None]:
    """Tell `watch` of every input of the linears."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
            watch(name, arguments[0] if arguments else next(iter(keywords.values())))

        return hook

    hooks = [part.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, part in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_uncalled(linears: dict[str, Any], called: set[str], index: int) -> None:
    """Refuse a block that uses a linear's weight without calling the linear; an expert may be without tokens."""
    missed = [name for name in linears if name not in called and ".experts." not in name]
    if missed:
        raise ModelError(
            f"block {index} does not call {', '.join(missed)} as a linear, so that its input cannot be seen; "
            "a model with such blocks cannot be pruned through torch"
        )


def stream_of(output: Any) -> Any:
    """The stream in a block's output, which may be the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def with_stream(output: Any, stream: Any) -> Any:
    """An output like the one given, with another stream, and nothing besides."""
    return type(output)((stream, *[None] * (len(output) - 1))) if isinstance(output, tuple | list) else stream
