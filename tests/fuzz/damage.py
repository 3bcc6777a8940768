"""Bad inputs: how an error is checked, and random damage by hypothesis.

Most random inputs are valid files with a few defects: readers rarely look beyond the first four of arbitrary bytes.
"""

import contextlib
import copy
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

# Seconds of CPU time, which other processes do not lengthen: an input that takes longer is an error.
SLOW = 10.0
fuzzed = hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def refused(error: type[Exception], part: str, call: Callable[..., Any], *arguments: Any) -> None:
    """The call quickly ends in the documented error, with a short message that holds this part or pattern."""
    start = time.process_time()
    with pytest.raises(error) as caught:
        call(*arguments)
    said = str(caught.value)
    assert type(caught.value) is error
    assert part in said or re.search(part, said), said
    assert len(said) < 3000
    assert time.process_time() - start < SLOW


@contextlib.contextmanager
def a_value_or(*errors: type[Exception]) -> Iterator[None]:
    """What is inside quickly ends, in a value or in a documented error."""
    start = time.process_time()
    with contextlib.suppress(*errors):
        yield
    assert time.process_time() - start < SLOW


def written(folder: Path, **files: bytes) -> Path:
    """The folder with these files."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


POWERS = (8, 15, 16, 20, 31, 32, 53, 63, 64)
NUMBERS = (0, 1, 2, 3, 7, 8, 31, *(2**power - less for power in POWERS for less in (0, 1)))
STRANGE: tuple[Any, ...] = (
    *(None, True, False, -1, 10**30, 10**400, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("nan")),
    *("", "x", "12", "../x", "a/b", "\x00", "\ud800", "é" * 90, "x" * 300),
    *([], [0], [None], [[[]]], {}, {"a": 1}, [1, "a"], [-1, -1], [2**62, 4, 0], [0, 2**62]),
)
WORDS = [*b'\x00\x01\x7f\x80\xff"[{,', *NUMBERS]
PIECES = [(word % 256**width).to_bytes(width, "little") for word in WORDS for width in (1, 4, 8)]


@st.composite
def damaged(draw: Any, *seeds: bytes) -> bytes:
    """One of the seeds with up to eight pieces replaced, inserted, doubled or taken out."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 8))):
        # Headers are where the decisions are.
        at = draw(st.integers(0, min(64, len(data))) | st.integers(0, len(data)))
        length = draw(st.integers(0, 32))
        piece = draw(st.binary(max_size=32) | st.sampled_from([b"", *PIECES, bytes(data[at : at + length])]))
        data[at : at + draw(st.sampled_from([0, len(piece), length, len(data)]))] = piece
    return bytes(data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(inner):
        yield value, key
        yield from places(part)


@st.composite
def damaged_values(draw: Any, *seeds: Any) -> Any:
    """One of the JSON values with up to four parts replaced or removed."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        if found := list(places(value)):
            block, key = found[draw(st.integers(0, len(found) - 1))]
            if draw(st.integers(0, 3)):
                block[key] = copy.deepcopy(draw(st.sampled_from(STRANGE + NUMBERS)))
            else:
                del block[key]
    return value


@st.composite
def damaged_json(draw: Any, *seeds: Any) -> bytes:
    """The text of a damaged value, sometimes with wrong bytes too."""
    raw = json.dumps(draw(damaged_values(*seeds))).encode()
    return draw(damaged(raw)) if draw(st.integers(0, 3)) == 3 else raw
