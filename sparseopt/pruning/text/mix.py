"""Mixes of calibration texts: names, each with its number of windows."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparseopt.pruning.text.chats import TextError
from sparseopt.pruning.text.documents import KINDS, SELF

# A text of a mix ends behind its number of windows, or before a comma and the kind of the next text.
_PART = re.compile(rf"(?s).+?(?::\d+(?=,|$)|(?=,\s*(?:{'|'.join((SELF, *KINDS))})(?::|$))|$)")


def read_mix(given: Any) -> Any:
    """A calibration, with a mix as the numbers of windows by name, in the given order; anything else unchanged.

    A number follows the last colon of its text, so names may have colons. A name in which a comma looks like the end of
    a text needs the mapping.

    >>> from sparseopt.pruning.text.mix import read_mix
    >>> read_mix("pydoc:64,file:notes.txt:32")
    {'pydoc': 64, 'file:notes.txt': 32}

    Raises:
        TextError: if a text has no number from 1 on, or is named twice.
    """
    if isinstance(given, str):
        parts = [part.strip(", ").rpartition(":") for part in _PART.findall(given)]
        if len(parts) == 1:
            return given
        pairs = [
            (name, int(end)) if name and end.isdecimal() else (name + colon + end, 0) for name, colon, end in parts
        ]
    elif isinstance(given, Mapping) and all(isinstance(count, str | float | int | None) for count in given.values()):
        pairs = list(given.items())
    else:
        return given
    if wrong := [name for name, count in pairs if type(count) is not int or count < 1]:
        raise TextError(
            f"calibration {given!r} is a mix, in which {wrong[0]!r} has no number of windows from 1 on: write "
            "NAME:WINDOWS,NAME:WINDOWS, such as pydoc:64,file:notes.txt:32; for a name with such commas itself, give a "
            "mapping {NAME: WINDOWS} in Python or in the file of --recipe"
        )
    if len(found := dict(pairs)) < max(1, len(pairs)):
        raise TextError(f"calibration {given!r} needs each text of a mix once, with all its windows")
    return found


def sources_of(calibration: Any) -> list[tuple[Any, int | None]]:
    """The texts of a calibration read by `read_mix`, with their numbers of windows; None for a text that is no mix."""
    mixed = isinstance(calibration, dict) and all(type(count) is int for count in calibration.values())
    return list(calibration.items()) if mixed else [(calibration, None)]


def mixed_windows(calibration: Any) -> int | None:
    """The number of windows of a mix; None for another calibration."""
    return sum(count or 0 for _, count in sources_of(calibration)) or None


def divided(windows: int, sources: Sequence[tuple[Any, int | None]]) -> list[int]:
    """`windows` divided among the texts in proportion to their own windows, in whole numbers."""
    ends = np.cumsum([0, *(count or 1 for _, count in sources)])
    return np.diff(np.round(windows * ends / ends[-1]).astype(int)).tolist()
