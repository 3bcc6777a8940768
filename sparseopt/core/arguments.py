"""Floor 1: checks of single arguments. An error names the argument, what it should be, and what was given."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np

from sparseopt.system.machine import available_memory_bytes, format_bytes

# So little is always there: what needs less does not ask the machine.
ALWAYS_FREE = 2**26


def whole_number(name: str, given: Any, least: int, most: int | None = None, meaning: str = "") -> int:
    """`given` as an int; a float that is whole counts.

    Args:
        name: of the argument, for the error.
        given: what the caller passed.
        least: the smallest that serves.
        most: the largest that serves, or None.
        meaning: what the number stands for, in a few words for the error.

    Raises:
        ValueError: for anything that is no whole number in that range.
    """
    value = _plain(given)
    whole = isinstance(value, numbers.Real) and math.isfinite(value) and value == math.floor(value)
    if not (whole and least <= value and (most is None or value <= most)):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is a whole number {limits}{meaning and f' ({meaning})'}, given {given!r}")
    return int(value)


def is_positive(given: Any) -> bool:
    """Whether it is one finite real number above 0."""
    value = _plain(given)
    return isinstance(value, numbers.Real) and math.isfinite(value) and float(value) > 0


def positive_number(name: str, given: Any, meaning: str = "") -> float:
    """`given` as a float.

    Raises:
        ValueError: for anything that is no positive, finite number.
    """
    if not is_positive(given):
        raise ValueError(f"{name} must be positive and finite{meaning and f' ({meaning})'}, given {given!r}")
    return float(_plain(given))


def _plain(given: Any) -> Any:
    """An array of no dimensions, of NumPy or JAX, as the number that it holds; all else as it is."""
    return given.item() if getattr(given, "shape", None) == () else given


def real_array(name: str, given: Any) -> np.ndarray:
    """`given` as an array of real numbers; the masked entries of a masked array are NaN.

    Raises:
        ValueError: for rows of unequal length, and for text, dates, objects and complex numbers.
    """
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given) and given.dtype.kind in "biuf":
        wide: Any = given.astype(given.dtype if given.dtype.kind == "f" else np.float64)
        given = wide.filled(np.nan)
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no array of real numbers: {error}") from error
    # An empty list has no numbers whose kind could be wrong. bfloat16 is none of NumPy's own kinds.
    if array.size and array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        advice = "; if it holds numbers, convert it by .astype(float)" if array.dtype.kind in "OUS" else ""
        raise ValueError(f"{name} must hold real numbers, given dtype {array.dtype}{advice}")
    return array


def require_memory(needed: int, what: str, advice: str) -> None:
    """See that at least so many bytes are free: what this refuses cannot be done, what it lets pass may be too much.

    Args:
        needed: at least so many will be taken.
        what: what takes them, for the error.
        advice: what to do.

    Raises:
        ValueError: if they are not.
    """
    if needed > ALWAYS_FREE and needed > (free := available_memory_bytes()):
        raise ValueError(f"{what} takes at least {format_bytes(needed)}, and {format_bytes(free)} are free: {advice}")


def unknown(kind: str, given: Any, known: Iterable[str]) -> str:
    """The sentence for a name that is not known: it lists those that are, and the nearest."""
    names = list(known)
    near = difflib.get_close_matches(given, names, n=1) if isinstance(given, str) else []
    return f"unknown {kind} {given!r}; known are {', '.join(names)}" + (f"; did you mean {near[0]!r}?" if near else "")
