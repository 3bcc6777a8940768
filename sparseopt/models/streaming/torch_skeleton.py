"""A causal language model as transformers builds it, without weights.

What happens before the blocks is left to the model: positions, rotary tables, masks. The skeleton runs the model with a
function in place of every block, which sees how the block is called.
"""

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparseopt.models.base.errors import ModelError, guarded
from sparseopt.models.base.fields import refuse_unless
from sparseopt.models.base.rope import max_positions
from sparseopt.models.families import FAMILIES
from sparseopt.models.families.family import STORED_FREQUENCIES
from sparseopt.models.files.source import Source
from sparseopt.models.streaming.prunable import check_count
from sparseopt.models.streaming.torch_bridge import torch_device

# Old checkpoints of GPT-J and GPT-Neo store the value that hides a score: -1e9, beyond float16.
OLD_MASKS = r".*\.attn\.(attention\.)?masked_bias"
# Parameters `[experts, ...]` that transformers stacks if a checkpoint holds the experts apart: the linears of each,
# one below the other.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Tensors by their names in the module.
Tensors = dict[str, Any]


class Call(NamedTuple):
    """How the model calls a block, without the stream, which comes first or `by_name`, as `hidden_states`."""

    arguments: tuple
    keywords: dict[str, Any]
    by_name: bool

    def with_stream(self, stream: Any) -> tuple[tuple, dict[str, Any]]:
        if self.by_name:
            return self.arguments, {"hidden_states": stream, **self.keywords}
        return (stream, *self.arguments), self.keywords


class Ended(Exception):
    """Raised by a `Visit` to end a run before the rest of the model."""


# Runs in place of the blocks: block's index, stream, call; returns the block's output.
Visit = Callable[[int, Any, Call], Any]


@dataclass(frozen=True)
class TorchConfig:
    """Sizes of a model that runs in torch, as in `DecoderConfig` and `PrunableBlock`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    attention_width: int
    max_positions: int | None


class Skeleton:
    """The module of a source's configuration and its parts.

    Attributes:
        module: transformers' model; its parameters are empty, its computed buffers are not.
        config: its sizes.
        prefixes: of the names of every block's tensors, with the dot.
        blocks: the modules.
        shapes: of all parameters and stored buffers, by name.
        optional: the names of stored buffers, which a file may lack.
        tied: the names that share one parameter, by each of these names.
        stacked: by name, the parameters in which experts are stacked.
    """

    def __init__(self, source: Source) -> None:
        """Build the module; a `ModelError` says why that is not possible or why it cannot be pruned."""
        self.module, self.config = _build_module(source)
        count = self.config.num_layers
        prefix, blocks = _find_blocks(self.module, self.model_type, count)
        self.prefixes = tuple(f"{prefix}.{index}." for index in range(count))
        self.blocks = tuple(blocks)
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        buffers = {name: value for name, value in self.module.state_dict().items() if name not in parameters}
        self.shapes = {name: tuple(value.shape) for name, value in (parameters | buffers).items()}
        self.optional = frozenset(buffers)
        self.tied = _find_tied(parameters)
        self.stacked = self._find_stacked()
        for name, group in self.tied.items():
            if self.is_inner(name):
                raise ModelError(
                    f"a {self.model_type} model uses one parameter in several places ({', '.join(group)}); such blocks "
                    "cannot be pruned one by one"
                )

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def last(self) -> int:
        return len(self.blocks) - 1

    def is_inner(self, name: str) -> bool:
        """Whether a tensor belongs to a block."""
        return name.startswith(self.prefixes)

    def names_of(self, keys: Iterable[str], known: Collection[str]) -> dict[str, str]:
        """The module's name of every key of a checkpoint that is known; some checkpoints leave out the first part."""
        base = f"{self.module.base_model_prefix}."
        found = {key: key if key in known else base + key for key in keys}
        return {key: name for key, name in found.items() if name in known}

    def parts_of(self, name: str) -> list[list[str]]:
        """The names of what a stacked parameter is made of, a list an expert, if a checkpoint holds experts apart."""
        owner, _, kind = name.rpartition(".")
        count = self.shapes[name][0]
        return [[f"{owner}.{expert}.{part}.weight" for part in STACKED.get(kind, ())] for expert in range(count)]

    def part_shape(self, name: str) -> tuple[int, ...]:
        """The shape of each of these parts."""
        _, rows, columns = self.shapes[name]
        return rows // len(STACKED[name.rpartition(".")[2]]), columns

    def _find_stacked(self) -> frozenset[str]:
        import torch

        plain = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
        return frozenset(
            f"{prefix}{owner}.{name}"
            for prefix, block in zip(self.prefixes, self.blocks, strict=True)
            for owner, part in block.named_modules()
            if not isinstance(part, plain)
            for name, parameter in part.named_parameters(recurse=False)
            if (parameter.ndim == 3 and parameter.shape[0] > 1) or (parameter.ndim > 1 and "expert" in owner)
        )

    def ignores(self, key: str) -> bool:
        """Whether the model reads no such tensor: it computes it itself, or transformers lists it as ignored."""
        patterns = self.module._keys_to_ignore_on_load_unexpected or ()
        return self.computes(key) or any(re.search(pattern, key) for pattern in patterns)

    def computes(self, key: str) -> bool:
        """Whether a tensor holds no weight: the model computes it itself, or did in older versions."""
        computed = {name for name, _ in self.module.named_buffers()}
        own = {key, f"{self.module.base_model_prefix}.{key}"}
        return bool(own & computed) or any(re.fullmatch(pattern, key) for pattern in (STORED_FREQUENCIES, OLD_MASKS))

    def run(self, tensors: Tensors, tokens: Any, visit: Visit) -> Any:
        """Logits of token ids `[B, T]` with `visit` in place of every block; None where it raised `Ended`."""
        import torch

        # Only the forward functions are replaced: models look at the attributes of their blocks.
        for index, block in enumerate(self.blocks):
            block.forward = self._stand_in(index, visit)
        given = {"input_ids": tokens, "use_cache": False}
        try:
            with torch.no_grad():
                return torch.func.functional_call(self.module, tensors, (), given, tie_weights=False).logits
        except Ended:
            return None
        finally:
            for block in self.blocks:
                del block.forward

    def _stand_in(self, index: int, visit: Visit) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            by_name = not arguments
            if by_name and "hidden_states" not in keywords:
                raise ModelError(f"the blocks of a {self.model_type} model do not take the stream in a known way")
            stream = keywords.pop("hidden_states") if by_name else arguments[0]
            return visit(index, stream, Call(arguments[1:], keywords, by_name))

        return forward


def _build_module(source: Source) -> tuple[Any, TorchConfig]:
    config = source.config
    model_type = str(config.get("model_type"))
    try:
        import accelerate
        import torch
        import transformers
    except ImportError as error:
        raise ModelError(
            f"unknown model_type {model_type!r}; known are {', '.join(sorted(FAMILIES))}. Other architectures go "
            f"through torch, and {error.name} is not installed: pip install 'sparseopt[torch]'"
        ) from error
    refuse_unless(config, {"quantization_config": (None,), "is_encoder_decoder": (False,)})
    if model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"unknown model_type {model_type!r}; known are {', '.join(sorted(FAMILIES))}, and what transformers has, "
            f"but its version {transformers.__version__} does not have this one either. Code beside the weights is "
            "never run (trust_remote_code)"
        )

    def build() -> tuple[Any, TorchConfig]:
        read = transformers.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(config)))
        sizes = read.get_text_config()
        check_count(source, sizes.num_hidden_layers, "blocks")
        # Buffers are computed now: position tables and the like are in no checkpoint.
        with torch_device(), accelerate.init_empty_weights(include_buffers=False):
            module = transformers.AutoModelForCausalLM.from_config(read, dtype=torch.float32)
        module.tie_weights()
        return module.eval(), _read_sizes(model_type, sizes)

    made_by = f"transformers {transformers.__version__}"
    return guarded(
        build, f"{made_by} builds no causal language model from this {model_type!r} configuration", advice=""
    )


def _read_sizes(model_type: str, sizes: Any) -> TorchConfig:
    """By attribute: transformers has one name for fields that configurations call by several."""
    heads, head_dim = getattr(sizes, "num_attention_heads", 0), getattr(sizes, "head_dim", 0) or 0
    positions = {name: getattr(sizes, name, None) for name in ("max_position_embeddings", "rope_parameters")}
    return TorchConfig(
        model_type=model_type,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_hidden_layers,
        attention_width=heads * head_dim or sizes.hidden_size,
        max_positions=max_positions(positions),
    )


def _find_blocks(module: Any, model_type: str, count: int) -> tuple[str, Any]:
    """Name and list of the blocks: of all lists of that length, the one with the most weights."""
    import torch

    found = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.ModuleList) and len(part) == count
    }
    if not found:
        raise ModelError(f"a {model_type} model of transformers has no list of {count} blocks, which pruning needs")
    weights = {name: sum(math.prod(p.shape) for p in part.parameters()) for name, part in found.items()}
    best = max(found, key=weights.__getitem__)
    return best, found[best]


def _find_tied(parameters: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}
