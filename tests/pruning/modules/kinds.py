"""The kinds of modules that `prune_module` takes: one network in NNX, Linen and torch, with the same weights."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from sparseopt.pruning import Recipe, prune_module

WIDTH, TOKENS = 8, 24
EPS = 1e-6  # of layer norms


def same(x):
    return x


class Block(nnx.Module):
    """Two linears in a residual branch; `hook` sees what the block reads."""

    def __init__(self, rngs, hook=same):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.hook = hook

    def __call__(self, x):
        x = self.hook(x)
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Net(nnx.Module):
    def __init__(self, block=Block, count=3, seed=0):
        rngs = nnx.Rngs(seed)
        self.stem = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([block(rngs) for _ in range(count)])
        self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Mlp(nnx.Module):
    """Without lists of blocks, so that every linear is a part."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first, self.second, self.third = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3))

    def __call__(self, x):
        return self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))


class LinenBlock(nn.Module):
    hook: Callable = same

    @nn.compact
    def __call__(self, x):
        x = self.hook(x)
        y = nn.relu(nn.Dense(WIDTH, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(WIDTH, name="down")(y)


class LinenNet(nn.Module):
    hook: Callable = same
    count: int = 3

    def setup(self):
        self.stem, self.head = nn.Dense(WIDTH), nn.Dense(WIDTH)
        self.blocks = [LinenBlock(self.hook) for _ in range(self.count)]

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class One(nnx.Module):
    def __init__(self, part):
        self.part = part

    def __call__(self, x):
        return self.part(x)


class LinenOne(nn.Module):
    part: nn.Module

    def __call__(self, x):
        return self.part(x)


def weight(linear):
    """Of a linear of NNX, `[out, in]`."""
    return np.asarray(linear.kernel[...]).T


def params_of(net):
    """The parameters of a `Net` as those of a `LinenNet`."""
    found = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    blocks = found.pop("blocks")
    return found | {f"blocks_{index}": block for index, block in blocks.items()}


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a net with a hook and so many blocks is made and pruned, and its parameters, by the names of `LinenNet`."""

    separator: str
    make: Callable
    params: Callable
    batch: Callable = same

    def prune(self, batches, recipe, *, hook=same, count=3, **options):
        module, own = self.make(hook, count)
        pruned, report = prune_module(module, [self.batch(x) for x in batches], recipe, **own, **options)
        return self.params(pruned), report


def torch_net(hook, count):
    import torch

    class TorchBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(WIDTH, eps=EPS)
            self.up, self.down = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = hook(x)
            return x + self.down(torch.relu(self.up(self.norm(x))))

    net = torch.nn.Sequential()
    net.stem = torch.nn.Linear(WIDTH, WIDTH)
    net.blocks = torch.nn.Sequential(*(TorchBlock() for _ in range(count)))
    net.head = torch.nn.Linear(WIDTH, WIDTH)
    params = flatten_dict(params_of(Net(count=count)), sep=".")
    for name, own in net.named_parameters():
        value = params[torch_name(name, own)]
        own.data = torch.tensor(value.T if own.ndim > 1 else value)
    return net, {}


def torch_name(name, own):
    """Of a parameter, as `LinenNet` has it."""
    leaf = "kernel" if own.ndim > 1 else "bias" if name.endswith("bias") else "scale"
    return f"{name.rpartition('.')[0].replace('blocks.', 'blocks_')}.{leaf}"


def torch_params(net):
    found = {torch_name(name, own): own.detach().numpy().T for name, own in net.named_parameters()}
    return unflatten_dict(found, sep=".")


def torch_batch(x):
    import torch

    return torch.tensor(np.asarray(x))


NNX = Kind(".", lambda hook, count: (Net(lambda rngs: Block(rngs, hook), count), {}), params_of)
LINEN = Kind("_", lambda hook, count: (LinenNet(hook, count), {"params": params_of(Net(count=count))}), same)
TORCH = Kind(".", torch_net, torch_params, torch_batch)
of_flax = pytest.mark.parametrize("kind", [NNX, LINEN], ids=["nnx", "linen"])
of_every_kind = pytest.mark.parametrize(
    "kind", [NNX, LINEN, pytest.param(TORCH, marks=pytest.mark.oracle)], ids=["nnx", "linen", "torch"]
)


def weights(params):
    """Of the linears in blocks, `[out, in]`."""
    names = [(block, name) for block in params if block.startswith("blocks") for name in ("up", "down")]
    return {f"{block}.{name}": np.asarray(params[block][name]["kernel"]).T for block, name in names}


def forward(params, x):
    """In NumPy: what each linear of the blocks reads, `[tokens, in]`, and what the last block gives."""
    x, read = np.asarray(x, np.float64), {}

    def linear(part, x):
        return x @ np.asarray(part["kernel"], np.float64) + np.asarray(part["bias"], np.float64)

    x = linear(params["stem"], x)
    for name in sorted(block for block in params if block.startswith("blocks")):
        block = params[name]
        centred = x - x.mean(1, keepdims=True)
        normed = centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + EPS)
        read[f"{name}.up"] = normed * block["norm"]["scale"] + block["norm"]["bias"]
        read[f"{name}.down"] = np.maximum(linear(block["up"], read[f"{name}.up"]), 0)
        x = x + linear(block["down"], read[f"{name}.down"])
    return read, x


def gram_of(inputs):
    rows = np.concatenate([np.asarray(x, np.float64) for x in inputs])
    return (rows.T @ rows).astype(np.float32)


def wanda(**fields):
    return Recipe(method="wanda", **fields)
