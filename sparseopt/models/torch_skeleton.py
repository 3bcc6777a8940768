"""Floor 5: a causal language model as transformers builds it, without weights.

What happens in front of the blocks is left to the model: positions, rotary tables, masks. The skeleton runs the model
with something else in place of every block, which sees how each block is called.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sparseopt.models.errors import ModelError
from sparseopt.models.families import FAMILIES
from sparseopt.models.family import STORED_FREQUENCIES
from sparseopt.models.fields import refuse_unless
from sparseopt.models.rope import max_positions
from sparseopt.models.torch_bridge import import_torch

# Tensors by their names in the module.
Tensors = dict[str, Any]


class Call(NamedTuple):
    """How the model calls a block, without the stream.

    Attributes:
        arguments: positional ones behind the stream.
        keywords: all but the stream.
        by_name: the stream comes as the keyword `hidden_states`.
    """

    arguments: tuple
    keywords: dict[str, Any]
    by_name: bool

    def with_stream(self, stream: Any) -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments of the call on another stream."""
        if self.by_name:
            return self.arguments, {"hidden_states": stream, **self.keywords}
        return (stream, *self.arguments), self.keywords


class Ended(Exception):
    """Raised by what stands in place of a block: the rest of the model is not needed."""


# What stands in place of blocks: block's number, stream, call; gives the block's output.
Visit = Callable[[int, Any, Call], Any]


@dataclass(frozen=True)
class Skeleton:
    """The module and where its parts lie.

    Attributes:
        module: transformers' model; its parameters hold nothing, its computed buffers do.
        model_type: of its configuration.
        vocab_size: rows of the embedding.
        hidden_size: width of the stream.
        attention_width: width of the attention's mixed values.
        max_positions: as in `DecoderConfig`.
        prefixes: of the names of every block's tensors, with the dot.
        blocks: the modules.
        shapes: of all parameters and stored buffers, by name.
        optional: the names of stored buffers; a file may lack them.
        tied: the names that hold the same parameter, by each of these names.
    """

    module: Any = field(repr=False)
    model_type: str
    vocab_size: int
    hidden_size: int
    attention_width: int
    max_positions: int | None
    prefixes: tuple[str, ...] = field(repr=False)
    blocks: tuple[Any, ...] = field(repr=False)
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    optional: frozenset[str] = field(repr=False)
    tied: dict[str, tuple[str, ...]] = field(repr=False)

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    def is_inner(self, name: str) -> bool:
        """Whether a tensor is a block's."""
        return name.startswith(self.prefixes)

    def is_table(self, name: str) -> bool:
        """Whether a tensor has a row for every token id: an embedding or a head."""
        shape = self.shapes[name]
        return len(shape) == 2 and shape[0] == self.vocab_size

    def blank(self, name: str) -> Any:
        """Zeros in the shape of a tensor that take no room."""
        import torch

        return torch.zeros(()).expand(self.shapes[name])

    def names_of(self, keys: Mapping[str, Any]) -> dict[str, str]:
        """The module's name of every key of a checkpoint that has one; some leave out the first part."""
        base = f"{self.module.base_model_prefix}."
        found = {key: key if key in self.shapes else base + key for key in keys}
        return {key: name for key, name in found.items() if name in self.shapes}

    def ignores(self, key: str) -> bool:
        """Whether a checkpoint's tensor is nothing that the model would read.

        These are copies of what it computes itself, and what transformers says it ignores.
        """
        computed = {name for name, _ in self.module.named_buffers()}
        patterns = (STORED_FREQUENCIES, *(self.module._keys_to_ignore_on_load_unexpected or ()))
        own = {key, f"{self.module.base_model_prefix}.{key}"}
        return bool(own & computed) or any(re.search(pattern, key) for pattern in patterns)

    def run(self, tensors: Tensors, tokens: Any, visit: Visit) -> Any:
        """Logits of token ids `[B, T]` with `visit` in place of every block; None where it raised `Ended`."""
        import torch

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                by_name = not arguments
                if by_name and "hidden_states" not in keywords:
                    raise ModelError(f"the blocks of a {self.model_type} model take no stream that is known here")
                stream = keywords.pop("hidden_states") if by_name else arguments[0]
                return visit(index, stream, Call(arguments[1:], keywords, by_name))

            return forward

        with torch.no_grad(), _replaced(self.blocks, [stand_in(index) for index in range(self.num_blocks)]):
            given = {"input_ids": tokens, "use_cache": False}
            try:
                return torch.func.functional_call(self.module, tensors, (), given, tie_weights=False).logits
            except Ended:
                return None


@contextmanager
def _replaced(blocks: tuple[Any, ...], forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Other functions in place of the blocks' own; the modules stay, since models look at their attributes."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def build_skeleton(config: Mapping[str, Any], tensors: int) -> Skeleton:
    """The skeleton of a configuration.

    Args:
        config: a Hugging Face configuration.
        tensors: how many the checkpoint holds.

    Raises:
        ModelError: if torch is not installed, transformers does not know the model or cannot build it, or it is of a
            kind that cannot be pruned here.
    """
    model_type = str(config.get("model_type"))
    torch, transformers, accelerate = import_torch(model_type, sorted(FAMILIES))
    refuse_unless(config, {"quantization_config": (None,), "is_encoder_decoder": (False,)})
    if model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"unknown model_type {model_type!r}; known are {', '.join(sorted(FAMILIES))}, and what transformers has, "
            f"but its version {transformers.__version__} does not have this one either. Code that comes along with a "
            "checkpoint is never run (trust_remote_code)"
        )
    try:
        read = transformers.CONFIG_MAPPING[model_type].from_dict(dict(config))
        sizes = read.get_text_config()
        count = sizes.num_hidden_layers
        if count > tensors:
            raise ModelError(
                f"the checkpoint holds {tensors} tensors, its configuration asks for {count} blocks; check that "
                "configuration and weights belong together"
            )
        # Buffers are computed at once: position tables and the like are in no checkpoint.
        with accelerate.init_empty_weights(include_buffers=False):
            module = transformers.AutoModelForCausalLM.from_config(read, dtype=torch.float32)
        module.tie_weights()
    except ModelError:
        raise
    except Exception as error:  # transformers raises whatever it does
        raise ModelError(
            f"transformers {transformers.__version__} builds no causal language model of this {model_type!r} "
            f"configuration ({type(error).__name__}: {error})"
        ) from error
    prefix, blocks = _find_blocks(module.eval(), model_type, count)
    prefixes = tuple(f"{prefix}.{index}." for index in range(count))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = {name: value for name, value in module.state_dict().items() if name not in parameters}
    skeleton = Skeleton(
        module=module,
        model_type=model_type,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        attention_width=(getattr(sizes, "num_attention_heads", 0) * (getattr(sizes, "head_dim", 0) or 0))
        or sizes.hidden_size,
        # By attribute: transformers has one name for what configurations call `n_positions` and otherwise.
        max_positions=max_positions(
            {name: getattr(sizes, name, None) for name in ("max_position_embeddings", "rope_parameters")}
        ),
        prefixes=prefixes,
        blocks=tuple(blocks),
        shapes={name: tuple(value.shape) for name, value in (parameters | buffers).items()},
        optional=frozenset(buffers),
        tied=_find_tied(parameters),
    )
    _refuse_shared_blocks(skeleton)
    return skeleton


def _find_blocks(module: Any, model_type: str, count: int) -> tuple[str, Any]:
    """Name and list of the blocks: of all lists as long as there are blocks the one with the most weights in it."""
    import torch

    found = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.ModuleList) and len(part) == count
    }
    if not found:
        raise ModelError(f"a {model_type} model of transformers has no list of {count} blocks, by which it is pruned")
    weights = {name: sum(math.prod(p.shape) for p in part.parameters()) for name, part in found.items()}
    best = max(found, key=weights.__getitem__)
    return best, found[best]


def _find_tied(parameters: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def _refuse_shared_blocks(skeleton: Skeleton) -> None:
    for name, group in skeleton.tied.items():
        if skeleton.is_inner(name):
            raise ModelError(
                f"a {skeleton.model_type} model uses one parameter in several places ({', '.join(group)}); such blocks "
                "cannot be pruned one by one"
            )
