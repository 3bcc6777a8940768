"""Random inputs, as choices by hypothesis.

Most inputs are valid files with a few defects: flipped bytes, changed lengths, moved parts, replaced numbers in JSON.
Readers rarely look beyond the first four of arbitrary bytes.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from hypothesis import strategies

T = TypeVar("T")


class Choices:
    """Choices by hypothesis, which shrinks them."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return self.draw(strategies.integers(low, high))

    def blob(self, most: int) -> bytes:
        return self.draw(strategies.binary(max_size=most))


def inputs_of(target: Any) -> Any:
    """The inputs of a target as a strategy of hypothesis."""

    @strategies.composite
    def inputs(draw: Any) -> Any:
        return target.make(Choices(draw))

    return inputs()


def pick(choices: Choices, options: Sequence[T]) -> T:
    return options[choices.integer(0, len(options) - 1)]


def chance(choices: Choices, one_in: int) -> bool:
    """True once in so many; the choice that hypothesis shrinks to is False."""
    return choices.integer(0, one_in - 1) == one_in - 1


POWERS = (8, 15, 16, 20, 31, 32, 53, 63, 64)
NUMBERS = (0, 1, 2, 3, 7, 8, 31, *(2**power - less for power in POWERS for less in (0, 1)))


def mutated_bytes(choices: Choices, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds with up to eight things wrong; once in 16, arbitrary bytes."""
    if chance(choices, 16):
        return choices.blob(300)
    data = bytearray(pick(choices, seeds))
    for _ in range(choices.integer(1, 8)):
        at = choices.integer(0, max(0, len(data) - 1))
        # Headers are where the decisions are.
        at = at % 64 if chance(choices, 3) else at
        length = choices.integer(1, 32)
        match choices.integer(0, 8):
            case 0:
                if data:
                    data[at % len(data)] ^= 1 << choices.integer(0, 7)
            case 1:
                if data:
                    data[at % len(data)] = pick(choices, (0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B, 0x2C))
            case 2:
                width = pick(choices, (2, 4, 8))
                data[at : at + width] = (pick(choices, NUMBERS) % 256**width).to_bytes(width, "little")
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                data[at:at] = choices.blob(32)
            case 6:
                del data[at:]
            case 7:
                other = pick(choices, seeds)
                start = choices.integer(0, max(0, len(other) - 1))
                data[at : at + length] = other[start : start + length]
            case 8:
                data[at : at + length] = choices.blob(32)
    return bytes(data)


STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**40, 2**63, 2**64, 10**30, 10**400, -0.0, 0.5, 1e-320, 1e308, float("inf"),
    float("nan"), "", "x", "12", "../x", "a/b", "\x00", "\ud800", "é" * 90, "x" * 300, [], [0], [None], [[[]]], {},
    {"a": 1}, [1, "a"], [-1, -1], [2**62, 4, 0], [0, 2**62],
)  # fmt: skip


def mutated_json(choices: Choices, value: Any) -> Any:
    """A copy of a JSON value with up to four parts replaced, removed or moved."""
    value = json.loads(json.dumps(value))
    for _ in range(choices.integer(1, 4)):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(pick(choices, STRANGE))
        block, key = pick(choices, places)
        match choices.integer(0, 5):
            case 0 | 1 | 2:
                block[key] = copy.deepcopy(pick(choices, STRANGE))
            case 3:
                del block[key]
            case 4:
                other, there = pick(choices, places)
                block[key] = json.loads(json.dumps(other.get(there) if isinstance(other, dict) else 0))
            case 5:
                block[key] = pick(choices, NUMBERS)
    return value


def _places(value: Any) -> Any:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(inner):
        yield value, key
        yield from _places(part)


def json_bytes(choices: Choices, value: Any) -> bytes:
    """The text of a mutated JSON value, once in four with wrong bytes too."""
    raw = json.dumps(mutated_json(choices, value)).encode("utf-8", "surrogatepass")
    return mutated_bytes(choices, [raw]) if chance(choices, 4) else raw
