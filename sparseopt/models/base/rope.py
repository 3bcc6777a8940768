"""Rotary position embedding: frequencies in radians per token, and how models scale them.

    pair i of the first `share` of a head's features is rotated by  position * frequency_i,  frequency_i = theta^(-2i/R)

with R = share * H rotated features of H. A scaling changes the frequencies, `[R/2]` float32 for R = `size` features and
a window of `time` tokens, and some also the length of the rotated vectors (`magnitude`). Sources: Su et al.,
"RoFormer", 2021 (plain); Chen et al., "Extending context window by position interpolation", 2023 (linear); Peng et al.,
"YaRN", ICLR 2024, eq. 17-22 (yarn; its appendix A.1 dynamic); Ding et al., "LongRoPE", ICML 2024 (longrope).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from pydantic import PositiveFloat, TypeAdapter

from sparseopt.models.base.errors import ModelError, checked
from sparseopt.models.base.fields import Config, optional, refuse_unless, require, require_table


def plain_frequencies(theta: float, size: int) -> np.ndarray:
    """`theta^(-2i/R)`, `[R/2]`; float32 throughout, as in the reference: the rounding shows at position 8000."""
    return (1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)).astype(np.float32)


class Scaling(Protocol):
    """How the frequencies of R = `size` features change, and the factor `magnitude` by which vectors get longer."""

    magnitude: float = 1.0

    def frequencies(self, theta: float, size: int, time: int) -> np.ndarray:
        """`[R/2]`, for a window of `time` tokens."""

    def check(self, size: int) -> None:
        """Raise a `ModelError` unless this scaling fits that many features."""
        return


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Divides all frequencies by `factor`."""

    factor: float

    def frequencies(self, theta: float, size: int, time: int) -> np.ndarray:
        return plain_frequencies(theta, size) / np.float32(self.factor)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Divides low frequencies.

    Attributes:
        factor: divides frequencies of wavelengths above `length / low`.
        low: see `factor`.
        high: wavelengths below `length / high` are kept; those in between are interpolated.
        length: context before scaling, tokens.
    """

    factor: float
    low: float
    high: float
    length: int

    def frequencies(self, theta: float, size: int, time: int) -> np.ndarray:
        plain = plain_frequencies(theta, size)
        turns = self.length * plain / (2 * math.pi)
        keep = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return ((1 - keep) * (plain / np.float32(self.factor)) + keep * plain).astype(np.float32)


@dataclass(frozen=True)
class Dynamic(Scaling):
    """The base grows with a window beyond `length` tokens ("NTK-aware"); shorter windows are not changed."""

    factor: float
    length: int

    def check(self, size: int) -> None:
        if size == 2:
            raise ModelError("a dynamic rope needs four rotated features of a head or more, given 2")

    def frequencies(self, theta: float, size: int, time: int) -> np.ndarray:
        stretch = self.factor * max(time, self.length) / self.length - (self.factor - 1)
        return plain_frequencies(theta * stretch ** (size / (size - 2)), size)


@dataclass(frozen=True)
class Yarn(Scaling):
    """Divides low frequencies, keeps high ones, with a linear ramp over the feature pairs in between.

    Attributes:
        factor: divides the low frequencies.
        fast: pairs with at least this many turns in `length` tokens are kept.
        slow: pairs with at most this many turns are divided.
        length: context before scaling, tokens.
        whole: the ramp begins and ends at whole pairs.
    """

    factor: float
    fast: float
    slow: float
    length: int
    whole: bool
    magnitude: float

    def frequencies(self, theta: float, size: int, time: int) -> np.ndarray:
        def pair_turning(times: float) -> float:
            return size * math.log(self.length / (times * 2 * math.pi)) / (2 * math.log(theta))

        first, last = pair_turning(self.fast), pair_turning(self.slow)
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        # The reference widens an empty ramp by this much.
        last += 0.001 if first == last else 0
        ramp = np.clip((np.arange(size // 2, dtype=np.float32) - first) / (last - first), 0, 1)
        plain = plain_frequencies(theta, size)
        return (plain / np.float32(self.factor) * ramp + plain * (1 - ramp)).astype(np.float32)


@dataclass(frozen=True)
class LongRope(Scaling):
    """Divides every frequency by its own factor: one list up to `length` tokens, another beyond.

    Attributes:
        short: `[R/2]` factors for windows up to `length` tokens.
        long: `[R/2]` factors for longer windows.
        length: context before scaling, tokens.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    length: int
    magnitude: float

    def check(self, size: int) -> None:
        for name, factors in (("short", self.short), ("long", self.long)):
            if len(factors) != size // 2:
                raise ModelError(
                    f"the rope's {name}_factor has {len(factors)} entries, expected {size // 2}: one for each pair of "
                    f"the {size} rotated features of a head; take the model's published configuration"
                )

    def frequencies(self, theta: float, size: int, time: int) -> np.ndarray:
        factors = np.asarray(self.long if time > self.length else self.short, np.float32)
        return plain_frequencies(theta, size) / factors


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding.

    Attributes:
        theta: the base.
        scaling: None for plain frequencies.
        share: fraction of a head's features that are rotated; the first ones.
        interleaved: the pairs are neighbours, (2i, 2i + 1), not (i, i + R/2).
    """

    theta: float
    scaling: Scaling | None = None
    share: float = 1.0
    interleaved: bool = False

    def size(self, head_dim: int) -> int:
        """R, the number of rotated features of a head."""
        return int(head_dim * self.share)

    def check(self, head_dim: int) -> None:
        """Raise a `ModelError` unless this embedding fits heads of `head_dim` features."""
        size = self.size(head_dim)
        if size % 2:
            raise ModelError(f"rotary positions rotate pairs of a head's features, given {size} of head_dim={head_dim}")
        if self.scaling is not None:
            self.scaling.check(size)

    def frequencies(self, head_dim: int, time: int = 1) -> np.ndarray:
        """The `[R/2]` float32 frequencies for a window of `time` tokens."""
        size = self.size(head_dim)
        if self.scaling is None:
            return plain_frequencies(self.theta, size)
        return self.scaling.frequencies(self.theta, size, time)

    @property
    def magnitude(self) -> float:
        return 1.0 if self.scaling is None else self.scaling.magnitude


_FACTORS = TypeAdapter(list[PositiveFloat])


def _factor(fields: Config) -> float:
    return require(fields, "factor", float)


def _read_llama3(fields: Config) -> Scaling:
    low, high = require(fields, "low_freq_factor", float), require(fields, "high_freq_factor", float)
    if not low < high:
        raise ModelError(f"the rope's low_freq_factor={low} must be below high_freq_factor={high}")
    return Llama3(_factor(fields), low, high, require(fields, "original_max_position_embeddings"))


def _read_yarn(fields: Config) -> Scaling:
    length = require(fields, "original_max_position_embeddings")
    factor = require(fields, "max_position_embeddings") / length if fields.get("factor") is None else _factor(fields)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given, over, under = (fields.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is None:
        given = magnitude(over) / magnitude(under) if over and under else magnitude(1.0)
    fast, slow = fields.get("beta_fast") or 32.0, fields.get("beta_slow") or 1.0
    return Yarn(factor, float(fast), float(slow), length, bool(fields.get("truncate", True)), float(given))


def _read_longrope(fields: Config) -> Scaling:
    length = require(fields, "original_max_position_embeddings")
    stretch = require(fields, "max_position_embeddings") / length if fields.get("factor") is None else _factor(fields)
    given = fields.get("attention_factor")
    if given is None:
        given = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(length))
    return LongRope(_factors(fields, "short_factor"), _factors(fields, "long_factor"), length, float(given))


def _factors(fields: Config, name: str) -> tuple[float, ...]:
    what = f"the rope's {name} must be a list of positive numbers"
    factors = checked(_FACTORS, fields.get(name), what, "; take the model's published configuration")
    return tuple(factors)


_SCALINGS: dict[str, Callable[[Config], Scaling | None]] = {
    "default": lambda fields: None,
    "linear": lambda fields: LinearScaling(_factor(fields)),
    "dynamic": lambda fields: Dynamic(_factor(fields), require(fields, "max_position_embeddings")),
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}
# Scalings with which a model reads `factor` times as many tokens as this field says. With other scalings,
# `max_position_embeddings` is the length after scaling.
_STRETCHED = {
    "linear": "max_position_embeddings",
    "dynamic": "max_position_embeddings",
    "yarn": "original_max_position_embeddings",
}


def max_positions(config: Config) -> int | None:
    """Tokens of the longest window that a model supports, by its Hugging Face configuration; None if it does not say.

    A scaling that stretches `max_position_embeddings` counts. Models differ in whether that field already holds the
    longer length, so the larger of the two is used; with several ropes, the shortest.
    """
    longest = optional(config, "max_position_embeddings")
    if longest is None:
        return None
    fields = _rope_fields(config, None)
    reaches = []
    for table in [part for part in fields.values() if isinstance(part, Mapping)] or [fields]:
        table = {**fields, **table}
        length = _STRETCHED.get(_kind(table))
        stretched = length and table.get(length) is not None and table.get("factor") is not None
        reaches.append(int(_factor(table) * require(table, length)) if length and stretched else longest)
    return max(longest, min(reaches))


# Scalings that store the length before scaling.
_EXTENDED = ("llama3", "yarn", "longrope")


def _kind(fields: Config) -> str:
    kind = fields.get("rope_type") or fields.get("type") or "default"
    return "longrope" if kind == "su" else kind


def _rope_fields(config: Config, part: str | None) -> dict[str, Any]:
    """The fields of `rope_scaling` and `rope_parameters`, of one layer type, and the configuration's lengths."""
    lengths = ("max_position_embeddings", "original_max_position_embeddings")
    fields = {name: config[name] for name in lengths if config.get(name) is not None}
    tables: list[dict[str, Any]] = []
    for name in ("rope_scaling", "rope_parameters"):
        table = require_table(config, name) if config.get(name) else {}
        if part is not None and (part in table or name == "rope_parameters"):
            table = require_table(table, part) if table.get(part) else {}
        table = {key: value for key, value in table.items() if value is not None}
        if "type" in table:  # the older name
            table = {"rope_type": table.pop("type")} | table
        tables.append(table)
    older, newer = tables
    if newer and (differing := [key for key in older if older[key] != newer.get(key)]):
        # transformers would use `rope_scaling` alone, with its own defaults for missing fields.
        raise ModelError(
            "the model configuration has rope_scaling beside rope_parameters, and they differ in "
            f"{', '.join(differing)}; put what is to count into rope_parameters and remove rope_scaling"
        )
    found = fields | older | newer
    outside = fields.get("original_max_position_embeddings")
    if outside is not None and _kind(found) in _EXTENDED:
        found["original_max_position_embeddings"] = outside  # as in transformers, because of Phi-3
    return found


def rope_table(config: Config, theta: float = 10000.0, share: float = 1.0, part: str | None = None) -> dict[str, Any]:
    """The fields of a position embedding, from `rope_parameters` or from the older `rope_theta` and `rope_scaling`.

    `rope_type` is one of the known types. Arguments are as for `read_rope`.
    """
    fields: dict[str, Any] = {
        "rope_theta": config.get("rope_theta") or theta,
        "partial_rotary_factor": config.get("partial_rotary_factor") or share,
        **_rope_fields(config, part),
    }
    kind = _kind(fields)
    if kind not in _SCALINGS:
        raise ModelError(f"the model configuration's rope_type={kind!r} is unknown; known are {', '.join(_SCALINGS)}")
    if kind in _EXTENDED:
        fields.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings"))
    refuse_unless(fields, {"mrope_section": (None,), "mrope_interleaved": (None, False)})
    return fields | {"rope_type": kind}


def read_rope(
    config: Config, theta: float = 10000.0, share: float = 1.0, part: str | None = None, *, interleaved: bool = False
) -> Rope:
    """Read the position embedding of a Hugging Face configuration.

    Args:
        config: a Hugging Face configuration.
        theta: default of the base.
        share: default of `partial_rotary_factor`.
        part: the layer type to read, if `rope_parameters` has a table for each.
        interleaved: as in `Rope`; configurations do not say.
    """
    fields = rope_table(config, theta, share, part)
    share = require(fields, "partial_rotary_factor", float)
    if share > 1:
        raise ModelError(f"the model configuration's partial_rotary_factor must be in (0, 1], given {share}")
    return Rope(require(fields, "rope_theta", float), _SCALINGS[fields["rope_type"]](fields), share, interleaved)
