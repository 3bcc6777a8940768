"""The communication between devices in a compiled program, read from its text.

`jax.jit(f).lower(*arguments).compile().as_text()` is one program that every device runs; an array in it is the part
of one device. So the bytes of an operand are those that each participating device sends.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
)

_NAME = r"%?[\w.\-]+"
_COMPUTATION = re.compile(rf"^(ENTRY )?({_NAME}) \(.*\) -> .*\{{$")
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?({_NAME}) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_CALLED = re.compile(rf"\b(?:calls|to_apply|\w+_computations?)=(?:\{{([^}}]*)\}}|({_NAME}))")
_LOOP = re.compile(rf"\b(?:condition|body)=({_NAME})")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`; the two halves of an asynchronous one count once.
        bytes: of its operands on one device. A permutation sends as much, an all-reduce sums arrays of that size, an
            all-gather hands over that part.
        loops: the loops around it, outermost first: how often each turns, or None where the program does not say.
    """

    kind: str
    bytes: int
    loops: tuple[int | None, ...]


class _Instruction(NamedTuple):
    shape: str
    operation: str
    operands: str
    attributes: str


def collectives(program: str) -> list[Collective]:
    """All collective operations of a compiled program in the order of its text, those of every branch.

    Args:
        program: the text of an optimised HLO module, as `compiled.as_text()` gives it.

    Raises:
        ValueError: for a text without an entry computation.
    """
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = None, None
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(_bare(head[2]), {})
            entry = _bare(head[2]) if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[_bare(found[1])] = _instruction(found[2])
    if entry is None:
        raise ValueError(
            f"expected the text of a compiled program with an ENTRY computation, given {len(program)} characters "
            "without one: pass jax.jit(f).lower(...).compile().as_text()"
        )
    return list(_walk(computations, entry, ()))


def total_bytes(found: Iterable[Collective], kind: str) -> int:
    """The bytes of one kind, each operation once for every turn of the loops around it that the program counts.

    A loop that the program does not count is taken for one turn.
    """
    return sum(one.bytes * times(one) for one in found if one.kind == kind)


def times(one: Collective) -> int:
    """How often an operation runs in one turn of the loops that the program does not count."""
    return math.prod(turns for turns in one.loops if turns is not None)


def _bare(name: str) -> str:
    return name.lstrip("%")


def _closed(text: str) -> int:
    """The place after the bracket that closes the one at the start."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _instruction(text: str) -> _Instruction:
    """Taken apart: `shape operation(operands), attributes`; the shape of several arrays is in brackets."""
    end = _closed(text) if text.startswith("(") else text.find(" ")
    shape, rest = text[:end], text[end:].lstrip()
    start = max(rest.find("("), 0)
    operands = rest[start : start + _closed(rest[start:])]
    return _Instruction(shape, rest[:start], operands, rest[start + len(operands) :])


def _bytes_of(shape: str) -> int:
    """Of one array or several."""
    size = 0
    for kind, sides in _SHAPE.findall(shape):
        named = _BITS.search(kind)
        bits = int(named[0]) if named else 8 * (kind == "pred")  # a token has none
        size += -(-bits * math.prod(int(side) for side in sides.split(",") if side) // 8)
    return size


def _handed(operands: str, known: dict[str, _Instruction]) -> int:
    """The bytes of operands, which are names, with their shapes before them in some versions."""
    if _SHAPE.search(operands):
        return _bytes_of(operands)
    names = (_bare(name) for name in re.findall(_NAME, operands))
    return sum(_bytes_of(known[name].shape) for name in names if name in known)


def _walk(
    computations: dict[str, dict[str, _Instruction]], name: str, loops: tuple[int | None, ...]
) -> Iterator[Collective]:
    known = computations.get(name, {})
    for one in known.values():
        kind = one.operation.removesuffix("-start")
        if kind in KINDS:
            yield Collective(kind, _handed(one.operands, known), loops)
        elif one.operation == "while":
            trips = _TRIPS.search(one.attributes)
            inside = (*loops, int(trips[1]) if trips else None)
            for called in _LOOP.findall(one.attributes):
                yield from _walk(computations, _bare(called), inside)
        elif one.operation not in ("async-update", "async-done"):
            # These two repeat the computation that their async-start names.
            for several, single in _CALLED.findall(one.attributes):
                for called in re.findall(_NAME, several or single):
                    yield from _walk(computations, _bare(called), loops)
