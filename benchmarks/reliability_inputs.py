"""The bad inputs of the tests: how many of each kind were tried, and how many ended in the documented error."""

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The lists are part of the tests.
sys.path.append(str(Path(__file__).parent.parent))

Case = tuple[str, Callable[[Path], Callable[[], Any]], tuple[type[Exception], ...], str]


def cases() -> Iterator[Case]:
    """Kind, a function that makes the call, the documented errors, and a part of the message or a pattern for it."""
    from tests.fuzz.bad_inputs import BAD_INPUTS
    from tests.trend.test_hostile import BAD_INPUTS as TREND

    for bad in BAD_INPUTS:
        yield bad.kind, bad.make, (bad.error,), bad.text
    for kind, _, call, text in TREND:
        yield f"trend filter, {kind}", _without_folder(call), (ValueError, TypeError), text


def _without_folder(call: Callable[[], Any]) -> Callable[[Path], Callable[[], Any]]:
    return lambda _: call


def counted() -> Iterator[dict[str, Any]]:
    """One record per kind, in the order of the lists."""
    found: dict[str, list[int]] = {}
    for kind, make, errors, text in cases():
        counts = found.setdefault(kind, [0, 0])
        counts[0] += 1
        with tempfile.TemporaryDirectory() as place:
            call = make(Path(place))
            try:
                call()
            except errors as error:
                counts[1] += text in str(error) or re.search(text, str(error)) is not None
            except Exception as error:
                sys.stderr.write(f"{kind}: {type(error).__name__}: {error}\n")
    for kind, (tried, clear) in found.items():
        yield {"kind": kind, "tried": tried, "clear_errors": clear}
