"""Floor 5: what a model family is: a configuration reader and a reversible table of checkpoint names.

A family is one small file that makes a `Family`; the helpers here read the fields that families share and
refuse by name what the decoder does not do.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
from flax import nnx

from sparseopt.models.decoder import Block, DecoderConfig, Embedding, Head, Rope
from sparseopt.models.errors import ModelError

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class KeyTable:
    """Checkpoint names and module paths, one to one: `model.layers.3.x.weight <-> layers.3.x.weight`.

    Attributes:
        prefixes: pairs (checkpoint prefix, module prefix), dot at the end of neither.
        ignored: patterns of checkpoint names that hold no weight, such as stored rotary frequencies.
    """

    prefixes: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()

    def to_path(self, key: str) -> str:
        """The module path of a checkpoint name."""
        return self._swap(key, self.prefixes)

    def to_key(self, path: str) -> str:
        """The checkpoint name of a module path."""
        return self._swap(path, tuple((module, checkpoint) for checkpoint, module in self.prefixes))

    def ignores(self, key: str) -> bool:
        """Whether a checkpoint name holds no weight."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)

    @staticmethod
    def _swap(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
        for old, new in pairs:
            if name.startswith(f"{old}."):
                return new + name[len(old) :]
        raise KeyError(f"no entry of the key table begins {name!r}; it has {', '.join(old for old, _ in pairs)}")


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: its name in a Hugging Face configuration.
        read_config: configuration dictionary to `DecoderConfig`; a `ModelError` names what is not supported.
        keys: checkpoint names and module paths.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any]], DecoderConfig] = field(repr=False)
    keys: KeyTable = field(repr=False)

    def expected_shapes(self, config: DecoderConfig) -> Shapes:
        """The shape of every tensor a checkpoint must hold, by its name there; a tied head has no own."""
        outer = {"embed_tokens": part_shapes(Embedding, config), "head": part_shapes(Head, config)}
        if config.tied:
            del outer["head"]["lm_head.weight"]
        block = part_shapes(Block, config)
        parts = outer | {f"layers.{i}": block for i in range(config.num_layers)}
        return {
            self.keys.to_key(f"{part}.{path}"): shape
            for part, shapes in parts.items()
            for path, shape in shapes.items()
        }

    def allows(self, key: str, config: DecoderConfig) -> bool:
        """Whether a checkpoint may hold this name beyond the expected ones: it is then left unread."""
        return self.keys.ignores(key) or (config.tied and key == self.keys.to_key("head.lm_head.weight"))


@lru_cache(maxsize=64)
def part_template(part: type[nnx.Module], config: DecoderConfig) -> tuple[nnx.GraphDef, tuple[tuple[tuple, Any], ...]]:
    """A part's graph definition and flat abstract state, made once: all blocks share one definition."""
    abstract = nnx.eval_shape(lambda: part(config, rngs=nnx.Rngs(0)))  # type: ignore[call-arg]
    graphdef, state = nnx.split(abstract)
    return graphdef, tuple(nnx.to_flat_state(state))


def build_part(part: type[nnx.Module], config: DecoderConfig, read: Callable[[str], jax.Array]) -> Any:
    """A part with its parameters from `read(path)`, where path is the dotted module path within the part."""
    graphdef, flat = part_template(part, config)
    filled = [(path, variable.replace(read(".".join(map(str, path))))) for path, variable in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def part_shapes(part: type[nnx.Module], config: DecoderConfig) -> Shapes:
    """The shapes of a part's parameters by dotted module path."""
    return {".".join(map(str, path)): tuple(variable.shape) for path, variable in part_template(part, config)[1]}


def require(config: Mapping[str, Any], name: str, kind: type[int] | type[float] = int) -> Any:
    """A positive number from a configuration.

    Raises:
        ModelError: if it is absent, of another type, or not positive.
    """
    value: Any = config.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or not value > 0:
        raise ModelError(f"the model configuration's {name} must be a positive {kind.__name__}, given {value!r}")
    return value


def refuse_unless(config: Mapping[str, Any], allowed: Mapping[str, tuple]) -> None:
    """Check switches that the decoder does not have: each named field must be absent or one of its values.

    Raises:
        ModelError: naming every field that asks for more.
    """
    wrong = [
        f"{name}={config[name]!r} (supported: {', '.join(map(repr, values))})"
        for name, values in allowed.items()
        if name in config and config[name] not in values
    ]
    if wrong:
        raise ModelError(f"the model configuration asks for what this decoder does not do: {'; '.join(wrong)}")


def read_rope(config: Mapping[str, Any]) -> Rope:
    """The position embedding, from `rope_parameters` or from the older `rope_theta` and `rope_scaling`.

    Raises:
        ModelError: for a kind other than default, linear or llama3, or a number that is missing.
    """
    fields: dict[str, Any] = {"rope_theta": config.get("rope_theta") or 10000.0}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise ModelError(f"the model configuration's {name} must be a table, given {config[name]!r}")
        fields |= config.get(name) or {}
    refuse_unless(fields, {"partial_rotary_factor": (1, None)})
    kind = fields.get("rope_type") or fields.get("type") or "default"
    theta = require(fields, "rope_theta", float)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, require(fields, "factor", float))
    if kind == "llama3":
        return Rope(
            theta,
            require(fields, "factor", float),
            require(fields, "low_freq_factor", float),
            require(fields, "high_freq_factor", float),
            require(fields, "original_max_position_embeddings"),
        )
    raise ModelError(f"the model configuration's rope_type={kind!r} is unknown; known are default, linear, llama3")
