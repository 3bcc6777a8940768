"""A torch module (extra `torch`): its linear layers, transformers' `Conv1D`, and its convolutions.

torch is imported only if it has been imported before: the caller has a torch module.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from sparseopt.models.files.in_memory import as_numpy
from sparseopt.pruning.base.grams import Grams
from sparseopt.pruning.modules.lanes import PartCall
from sparseopt.pruning.modules.layouts import Layout, Window
from sparseopt.pruning.modules.watched import Inputs, Linear, Observer, Sums, Watched, block_names, input_of

_grams_of_input = jax.jit(lambda layout, x, dense_x=None: layout.grams(x, dense_x))


class TorchModule(Watched):
    """A torch module, whose weights are set in place."""

    def __init__(self, module: Any, call: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        import torch

        self.module, self._call, self.gram = module, call or (lambda module, batch: module(batch)), _grams_of
        parts = dict(module.named_modules())
        compiled = [part for part in parts.values() if _is_compiled(part)]
        if compiled:
            raise ValueError(
                f"the module has a compiled {type(compiled[0]).__name__}, which hides its parts: prune the one that it "
                "was made of, and compile the result"
            )
        names: dict[int, list[str]] = {}
        for name, part in parts.items():
            for key, parameter in part._parameters.items():
                if parameter is not None:
                    names.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
        hidden = {
            id(part): f"{name} uses its weight without a call"
            for name, own in parts.items()
            if isinstance(own, torch.nn.MultiheadAttention)
            for part in own.modules()
        }
        self._parts: dict[str, Any] = {}
        self.linears = {}
        for name, part in parts.items():
            layout = _layout_of(part)
            if layout is None:
                continue
            layout, weight = hidden.get(id(part), layout), part._parameters.get("weight")
            if weight is None:
                layout = "its weight is computed from others"
            elif not weight.is_floating_point():
                layout = f"its weight is of {weight.dtype}"
            tied = tuple(each.removesuffix(".weight") for each in names.get(id(weight), ()) if each != f"{name}.weight")
            shape = layout.shape(tuple(weight.shape)) if isinstance(layout, Layout) else (0, 0)
            self.linears[name] = Linear(shape, layout, tied)
            self._parts[name] = part
        self.left_out = {
            name: f"a weight of {list(parameter.shape)} that is no linear's"
            for name, parameter in module.named_parameters()
            if parameter.ndim > 1 and name.rpartition(".")[0] not in self.linears
        }
        children = {
            name: [
                (f"{name}.{child}".lstrip("."), type(own)) for child, own in part._modules.items() if own is not None
            ]
            for name, part in parts.items()
        }
        lists = [name for name, part in parts.items() if isinstance(part, torch.nn.ModuleList | torch.nn.Sequential)]
        self.blocks = block_names(children, lists, self.linears)
        self._parts |= {name: parts[name] for name in self.blocks}

    @contextmanager
    def watching(self) -> Iterator[None]:
        import torch

        training = [part for part in self.module.modules() if part.training]
        own = {name: vars(part).get("forward") for name, part in self._parts.items()}
        caching = [config for config in _configs(self.module) if config.use_cache]
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            self.module.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # it reads the weights of an encoder's layers directly
            for config in caching:
                config.use_cache = False  # lanes would hold all keys and values
            for name, part in self._parts.items():
                # An attribute of the object itself comes before the method of its class.
                part.forward = partial(self._forward, name, part.forward)
            yield
        finally:
            for name, part in self._parts.items():
                vars(part).pop("forward", None)
                if own[name] is not None:
                    part.forward = own[name]
            for part in training:
                part.training = True
            for config in caching:
                config.use_cache = True
            torch.backends.mha.set_fastpath_enabled(fast)

    def _forward(self, name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._visit(name, run, args, kwargs)

    def call(self, batch: Any) -> Any:
        import torch

        with torch.no_grad():
            return self._call(self.module, batch)

    def observed(self, call: PartCall, layouts: Mapping[str, Layout], dense: Inputs | None = None) -> Sums:
        return self._observe(call, Observer(layouts, _grams_of, dense)).sums()

    def inputs(self, call: PartCall, layouts: Mapping[str, Layout]) -> Inputs:
        # Copied: a layer's input may be written to afterwards.
        return self._observe(call, Observer(layouts, None, kept=lambda tensor: tensor.clone())).inputs()

    def _observe(self, call: PartCall, observer: Observer) -> Observer:
        import torch

        with torch.no_grad(), self._visited_by(observer):
            if call.name in self.linears:
                observer.read(call.name, input_of(call))
            else:
                # A block may write to its arguments, such as a stream or a cache, and it runs again.
                args, kwargs = jax.tree.map(_copied, (call.args, call.kwargs))
                call.function(*args, **kwargs)
        return observer

    def output(self, call: PartCall) -> Any:
        import torch

        with torch.no_grad(), self._visited_by(None):
            return call.run()

    def read(self, name: str) -> np.ndarray:
        return self._layout(name).matrix(as_numpy(self._parts[name].weight))

    def write(self, name: str, weight: np.ndarray) -> None:
        import torch

        parameter = self._parts[name].weight
        kernel = np.array(self._layout(name).kernel(weight, tuple(parameter.shape)))  # which torch may write to
        if parameter.dtype == torch.bfloat16:
            kernel = kernel.view(np.int16)
            found = torch.from_numpy(kernel).view(torch.bfloat16)
        else:
            found = torch.from_numpy(kernel)
        with torch.no_grad():
            parameter.copy_(found)

    def dense(self) -> "TorchModule":
        return TorchModule(copy.deepcopy(self.module), self._call)

    def result(self) -> Any:
        return self.module


def _is_compiled(module: Any) -> bool:
    import torch

    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or isinstance(module, torch.jit.ScriptModule)


def _configs(module: Any) -> list[Any]:
    """The configurations of transformers' models in a module."""
    found = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    return [config for config in found.values() if isinstance(getattr(config, "use_cache", None), bool)]


def _copied(value: Any) -> Any:
    if hasattr(value, "clone"):
        return value.clone()
    return copy.deepcopy(value) if getattr(value, "__dict__", None) and not callable(value) else value


def _grams_of(layout: Layout, value: Any, dense: Any) -> Grams:
    """The Grams of a tensor; a mixture's layer gets a different number of tokens each time."""
    values = [value] if dense is None else [value, dense]
    if layout.window is not None:
        return _grams_of_input(layout, *map(to_jax, values))
    import torch

    values = [each.reshape(-1, each.shape[-1]) for each in values]
    count = height = len(values[0])
    if value.ndim == 2:
        # Few heights, so that few programs serve all.
        height = 1 << max(count - 1, 0).bit_length()
    padded = [torch.nn.functional.pad(each, (0, 0, 0, height - count)) for each in values]
    found = _grams_of_input(layout, *map(to_jax, padded))
    return found._replace(mass=jax.numpy.float32(count), tokens=jax.numpy.int32(count))


def to_jax(tensor: Any) -> Array:
    """A torch tensor in float32, copied: torch may write to it while JAX still reads it."""
    import torch

    copy = tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return jax.device_put(copy.numpy()) if copy.device.type == "cpu" else jax.dlpack.from_dlpack(copy)


def _layout_of(part: Any) -> Layout | str | None:
    """The layout of a linear layer, or a text that says why it has none; None if it is no linear layer."""
    import torch

    nn = torch.nn
    if isinstance(part, nn.Linear):
        return Layout((0, 1))
    if type(part).__name__ == "Conv1D" and hasattr(part, "nf"):
        return Layout((1, 0))
    if isinstance(part, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "a transposed convolution"
    if not isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    if part.groups > 1:
        return f"a convolution in {part.groups} groups"
    doubled = part._reversed_padding_repeated_twice
    pads = tuple((doubled[i], doubled[i + 1]) for i in range(0, len(doubled), 2))[::-1]
    modes = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    ones = (1,) * len(pads)
    window = Window(
        tuple(part.kernel_size), tuple(part.stride), "VALID", ones, tuple(part.dilation), pads,
        modes[part.padding_mode], channels_last=False,
    )  # fmt: skip
    return Layout(tuple(range(part.weight.ndim)), 1, (), window)
