"""Checks of single arguments. An error names the argument, what it should be, and what was given."""

import difflib
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType, MappingProxyType
from typing import Any, ClassVar

import jax
import numpy as np

from sparseopt.core.base.types import T, is_traced
from sparseopt.system.machine import available_memory_bytes, device_memory_left, format_bytes

# A need below this is not compared with the machine's memory.
ALWAYS_FREE = 2**26


def renames(**names: str) -> Callable[[T], T]:
    """A decorator that makes an argument with an old name a TypeError that says what to write now."""

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                raise TypeError(f"{function.__name__} has no argument {old} since 0.3: give {names[old]}")
            return function(*args, **kwargs)

        return called

    return wrap


def whole_number(name: str, given: Any, least: int, most: float = math.inf, meaning: str = "") -> int:
    """`given` as an int if it is a whole number, even a float, in `[least, most]`; else a ValueError with `meaning`."""
    value = finite_number(given)
    if not (value % 1 == 0 and least <= value <= most):
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} is a whole number {limits}{meaning and f' ({meaning})'}, given {given!r}")
    return int(value)


def is_positive(given: Any) -> bool:
    """Whether `given` is a finite real number above 0."""
    return float(finite_number(given)) > 0


def positive_number(name: str, given: Any) -> float:
    """`given` as a float if it is positive and finite; else a ValueError."""
    if not is_positive(given):
        raise ValueError(f"{name} must be positive and finite, given {given!r}")
    return float(finite_number(given))


def finite_number(given: Any) -> Any:
    """A finite real number, also of a zero-dimensional array; NaN for anything else."""
    value = given.item() if getattr(given, "shape", None) == () else given
    return value if isinstance(value, numbers.Real) and math.isfinite(value) else math.nan


def real_array(name: str, given: Any) -> np.ndarray:
    """`given` as an array of real numbers, masked entries as NaN; a ValueError for ragged rows and other dtypes."""
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given) and given.dtype.kind in "biuf":
        wide: Any = given.astype(given.dtype if given.dtype.kind == "f" else np.float64)
        given = wide.filled(np.nan)
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not an array of real numbers: {error}") from error
    # An empty list has no numbers of a wrong kind. bfloat16 is not one of NumPy's own kinds.
    if array.size and array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        advice = "; if it holds numbers, convert it with .astype(float)" if array.dtype.kind in "OUS" else ""
        raise ValueError(f"{name} must hold real numbers, given dtype {array.dtype}{advice}")
    return array


def refuses_leaves(name: str, given: Any) -> str | None:
    """Why a pytree cannot be computed with: it is not one, or a leaf holds no real numbers. Tracers are not checked."""
    for leaf in jax.tree.leaves(given):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex | str):
            what = class_or_function(leaf) or f"an object of {type(leaf).__name__}"
            return f"the {name} must be a pytree of numbers, given {what}: decorate a class of your own with @so.pytree"
        kind = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if jax.numpy.issubdtype(kind, np.complexfloating):
            return f"the {name} must hold real numbers, given {kind}: stack the real and the imaginary parts"
        if isinstance(kind, np.dtype) and kind.kind in "OUSMm":
            what = repr(leaf) if isinstance(leaf, str) else f"an array of dtype {kind}"
            return f"the {name} must hold numbers, given {what}: convert it to floats"
    return None


def refuses_not_finite(name: str, given: Any) -> str | None:
    """Why a pytree of arrays cannot be computed with: an entry is NaN or infinite. Only what a CPU holds is checked."""
    for leaf in jax.tree.leaves(given):
        if is_traced(leaf) or not hasattr(leaf, "dtype") or not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            continue
        if isinstance(leaf, jax.Array) and {device.platform for device in leaf.devices()} != {"cpu"}:
            continue
        array = np.asarray(leaf)
        with np.errstate(all="ignore"):
            fine = np.isfinite(array.sum())  # without a copy of a large array
        if not fine and (wrong := np.argwhere(~np.isfinite(array))).size:
            place = tuple(wrong[0].tolist())
            return f"the {name} must hold finite numbers, given {array[place]} at {place} ({len(wrong)} such)"
    return None


def class_or_function(given: Any) -> str | None:
    """`the class L1` or `the function f`, which stands in place of an object; None for an object."""
    kind = "class" if isinstance(given, type) else "function" if isinstance(given, FunctionType) else None
    return kind and f"the {kind} {given.__name__}"


def fits(given: Any, protocol: type) -> bool:
    """Whether it is an object, not a class, that has what the protocol asks for."""
    return not isinstance(given, type) and all(hasattr(given, name) for name in _members(protocol))


@functools.cache
def _members(protocol: type) -> list[str]:
    """What a protocol asks for; Python 3.11 collects it anew for every `isinstance`."""
    named = {name for kind in protocol.__mro__ for name in (*vars(kind), *vars(kind).get("__annotations__", ()))}
    return [name for name in named if not name.startswith("_")]


def own_refusal(given: Any, *asked: Any) -> str | None:
    """What the method `refuses` of a penalty, a loss or a solver (asked about a problem) says; None without it."""
    return given.refuses(*asked) if hasattr(given, "refuses") else None


def require_memory(needed: int, what: str, advice: str, on_device: int = 0) -> None:
    """Raise a ValueError unless `needed` bytes, a lower bound on the need of `what`, are free; `advice` ends it.

    `on_device` is what it needs at least of the first device's memory, which counts if JAX knows it.
    """
    if needed > ALWAYS_FREE and needed > (free := available_memory_bytes()):
        raise ValueError(f"{what} takes at least {format_bytes(needed)}, and {format_bytes(free)} are free: {advice}")
    if on_device > ALWAYS_FREE and (left := device_memory_left()) is not None and on_device > left:
        raise ValueError(
            f"{what} takes at least {format_bytes(on_device)} of the device, and {format_bytes(left)} are free there: "
            f"{advice}, more devices, or the CPU (JAX_PLATFORMS=cpu)"
        )


class Mistakes(ValueError):
    """Several mistakes, each `found` with the key that it concerns."""

    def __init__(self, found: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in found))
        self.found = found


def unknown(kind: str, given: Any, known: Iterable[str]) -> str:
    """The sentence for an unknown name: it lists the known names, and the nearest."""
    names = list(known)
    near = difflib.get_close_matches(given, names, n=1) if isinstance(given, str) else []
    return f"unknown {kind} {given!r}; known are {', '.join(names)}" + (f"; did you mean {near[0]!r}?" if near else "")


def suggest(given: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest known name, otherwise the list of known names."""
    return _suggest(given[:80], tuple(map(str, known)))


@functools.lru_cache(maxsize=4096)
def _suggest(given: str, known: tuple[str, ...]) -> str:
    # Cached: every run of a sweep has the same mistakes.
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def known_numbers(given: Any, name: str) -> np.ndarray:
    """An attribute in float64; NaN if it is traced or holds no numbers."""
    value = getattr(given, name)
    if isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not is_traced(value):
        # With NumPy: under jit, JAX would trace even what is known.
        number = np.asarray(value)
        if jax.numpy.issubdtype(number.dtype, jax.numpy.number):
            return number.astype(np.float64)
    return np.full((), np.nan)


class Limited:
    """The numbers of a penalty: some must not be below 0, some must be above a number, and others are free."""

    least: ClassVar[tuple[str, ...]] = ("weight",)
    above: ClassVar[Mapping[str, float]] = MappingProxyType({})
    bounds: ClassVar[tuple[str, ...]] = ()  # other numbers
    number_names: ClassVar[tuple[str, ...]] = ()  # all

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        cls.number_names = (*cls.least, *cls.above, *cls.bounds)

    def refuses(self) -> str | None:
        """Why its numbers make no sense, as far as these are known outside jit, or None."""
        for name in self.number_names:
            if (given := getattr(self, name)) is None or isinstance(given, str | list | tuple):
                return f"the penalty's {name} must hold real numbers, given {given!r}"
            number = np.asarray(0.0 if isinstance(given, jax.core.Tracer) else given)
            if number.dtype.kind == "f":
                # Of a bound infinity means that there is none.
                bad = np.isnan(number) if name not in self.least else ~np.isfinite(number)
                if bad.any():
                    return f"the {name} of {type(self).__name__} must be finite, given {number[bad].flat[0]}"
        for name in self.least:
            if (smallest := np.min(known_numbers(self, name), initial=0)) < 0:
                return f"the penalty's {name} must not be negative, given {smallest}"
        for name, bound in self.above.items():
            given = known_numbers(self, name)
            if not np.all(np.isnan(given) | (given > bound)):
                return f"the {name} of {type(self).__name__} must be above {bound}, given {np.min(given)}"
        return None
