"""The communication between devices in a compiled program, read from its text.

`jax.jit(f).lower(*arguments).compile().as_text()` is one program that every device runs; an array in it is the part
of one device. So the bytes of an operand are those that each participating device sends.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = "all-reduce all-gather all-to-all ragged-all-to-all collective-permute collective-broadcast reduce-scatter"

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
# A name, the shape of one array or of several in brackets, the operation and what follows.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_LOOP = re.compile(r"\b(?:condition|body)=%?([\w.-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|\S+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`; the two halves of an asynchronous one count once.
        bytes: of its operands on one device.
        loops: the loops around it, outermost first: how often each turns, or None where the program does not say.
    """

    kind: str
    bytes: int
    loops: tuple[int | None, ...]


def collectives(program: str) -> list[Collective]:
    """All collective operations of a compiled program, those of every branch."""
    computations: dict[str, dict[str, tuple[str, str, str]]] = {}
    entry = current = ""
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            computations[current][found[1]] = (found[2], found[3], found[4])

    def walk(name: str, loops: tuple[int | None, ...]) -> Iterator[Collective]:
        known = computations.get(name, {})
        for _, operation, rest in known.values():
            kind = operation.removesuffix("-start")
            if kind in KINDS.split():
                operands = rest.partition("), ")[0]  # a layout may hold brackets, too
                names = [operand for operand in _NAME.findall(operands) if operand in known]
                yield Collective(kind, _bytes(operands) or sum(_bytes(known[one][0]) for one in names), loops)
            elif operation == "while":
                trips = _TRIPS.search(rest)
                for called in _LOOP.findall(rest):
                    yield from walk(called, (*loops, int(trips[1]) if trips else None))
            elif operation not in ("async-update", "async-done"):  # they repeat what their async-start names
                for called in re.findall(r"[\w.-]+", " ".join(_CALLED.findall(rest))):
                    yield from walk(called, loops)

    return list(walk(entry, ()))


def total_bytes(found: Iterable[Collective], kind: str) -> int:
    """The bytes of one kind, each operation once for every turn of the loops around it that the program counts."""
    return sum(one.bytes * times(one) for one in found if one.kind == kind)


def times(one: Collective) -> int:
    """How often an operation runs in one turn of the loops that the program does not count."""
    return math.prod(turns for turns in one.loops if turns is not None)


def _bytes(shapes: str) -> int:
    arrays = [
        (int(bits or 8), [int(side) for side in sides.split(",") if side]) for _, bits, sides in _ARRAY.findall(shapes)
    ]
    return sum(-(-bits * math.prod(sides) // 8) for bits, sides in arrays)
