"""Which linears are pruned, and at which sparsity, by names and patterns.

| pattern | linears |
|---|---|
| `model.layers.3.mlp.down_proj` | the one with this checkpoint name |
| `down_proj`, `mlp.down_proj` | all whose names end in these parts |
| `re:model.layers.[0-3][.]` | all whose checkpoint names it matches from the start, as `re.match` does |

A linear is pruned if one of `targets` matches it, or there are none, and none of `ignore` does. Its sparsity is that of
the pattern in `sparsities` that matches: of several a name comes before an expression, a longer name before a shorter
one, and of expressions the first. Sparsity 0 leaves a linear as it is.

Names and expressions as in llm-compressor (`compressed_tensors.utils.match`), endings as in `target_modules` of PEFT.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from sparseopt.models.base.errors import listed

EXPRESSION = "re:"
HEAD = "lm_head"

Patterns = tuple[str, ...]
# Pairs, because their order counts.
Sparsities = tuple[tuple[str, float], ...]


def read_patterns(given: Any) -> Any:
    """Patterns as a tuple: of a text with commas outside brackets between, or of a sequence."""
    if isinstance(given, str):
        return tuple(_split(given))
    return tuple(given) if isinstance(given, Sequence) else given


def read_sparsities(given: Any) -> Any:
    """Pairs of patterns and sparsities, of a mapping or of a text as in `down_proj=0.6,q_proj=0.4`.

    Raises:
        ValueError: for any other text.
    """
    if isinstance(given, Mapping):
        return tuple(given.items())
    if not isinstance(given, str):
        # As JSON has them.
        return tuple(map(tuple, given)) if isinstance(given, list) else given
    found: dict[str, float] = {}
    for part in _split(given):
        pattern, _, number = part.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            pattern = ""
        if not pattern or pattern in found:
            raise ValueError(
                "sparsities must be different patterns with a number each, as in down_proj=0.6,q_proj=0.4, given "
                f"{given!r}"
            )
        found[pattern] = share
    return tuple(found.items())


def _split(text: str) -> Iterator[str]:
    """The parts between commas, except those in brackets, which belong to an expression."""
    start = depth = 0
    for place, letter in enumerate(f"{text},"):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and (depth <= 0 or place == len(text)):
            yield text[start:place].strip()
            start = place + 1


def check_choice(
    targets: Any, ignore: Any, sparsities: Any, check_share: Callable[[float], None], allocation: str
) -> None:
    """Check what can be checked without a model; `check_share` refuses a sparsity above 0.

    Raises:
        ValueError: for what are no names or expressions, a sparsity that is not possible, or sparsities together
            with an allocation that is not uniform.
    """
    for option, patterns in (("targets", targets), ("ignore", ignore)):
        if patterns is not None:
            _check_patterns(option, patterns)
    if sparsities is None:
        return
    if not isinstance(sparsities, tuple) or any(not isinstance(each, tuple) or len(each) != 2 for each in sparsities):
        raise ValueError(
            f"sparsities must be a mapping of patterns to sparsities, as in {{'down_proj': 0.6}}, given {sparsities!r}"
        )
    _check_patterns("sparsities", tuple(pattern for pattern, _ in sparsities))
    for pattern, share in sparsities:
        if not isinstance(share, Real) or isinstance(share, bool):
            raise ValueError(f"sparsities: {pattern!r} must have a number in [0, 1), given {share!r}")
        try:
            if share != 0:
                check_share(float(share))
        except ValueError as error:
            raise ValueError(f"sparsities: {pattern!r}: {error}") from None
    if allocation != "uniform":
        raise ValueError(
            f"sparsities say what allocation {allocation!r} is to choose: leave one of the two out; ignore has the "
            "linears that are to stay as they are"
        )


def _check_patterns(option: str, patterns: Any) -> None:
    for pattern in patterns if isinstance(patterns, tuple) else [patterns]:
        if not isinstance(pattern, str) or not pattern.removeprefix(EXPRESSION):
            raise ValueError(
                f"{option} must be names of linears, or expressions after {EXPRESSION!r}, as in ['down_proj', "
                f"'re:.*self_attn'], given {pattern!r}"
            )
        if pattern.startswith(EXPRESSION):
            try:
                re.compile(pattern.removeprefix(EXPRESSION))
            except re.error as error:
                raise ValueError(f"{option}: {pattern!r} is not a regular expression: {error}") from None


def chosen_linears(
    names: Sequence[str],
    others: Collection[str],
    targets: Patterns | None,
    ignore: Patterns | None,
    sparsities: Sparsities | None,
) -> dict[str, float | None]:
    """The linears that are pruned, each with its sparsity in `sparsities`, None for one that is not in there.

    Args:
        names: of all linears in the model's blocks.
        others: of the other parts of the checkpoint, which are never pruned; `ignore` may match them.
        targets: checked patterns, as the following.
        ignore: none of these.
        sparsities: of some.

    Raises:
        ValueError: listing every pattern that matches no linear, with near names, or that has no effect; or if no
            linear is left.
    """
    matched, problems = _Matcher(names), []
    never = _Matcher([*others, HEAD])
    shares = dict(sparsities or ())
    for option, patterns in (("targets", targets), ("ignore", ignore), ("sparsities", shares)):
        for pattern in patterns or ():
            # Recipes for other tools ignore the head, which is not pruned here anyway.
            if not matched(pattern) and not (option == "ignore" and never(pattern)):
                problems.append(_nothing(option, pattern, names, never(pattern)))
    kept = set(names) if targets is None else {name for pattern in targets for name in matched(pattern)}
    kept -= {name for pattern in ignore or () for name in matched(pattern)}
    for pattern, share in shares.items():
        if share and (found := matched(pattern)) and not kept.intersection(found):
            problems.append(
                f"sparsities: {pattern!r} is given {share:g}, but targets and ignore leave none of its linears "
                f"({listed(found, 3)}) to prune"
            )
    # The pattern that counts comes last.
    expressions = [pattern for pattern in shares if pattern.startswith(EXPRESSION)]
    plain = sorted((each for each in shares if not each.startswith(EXPRESSION)), key=lambda name: name.count("."))
    own = {name: shares[pattern] for pattern in (*reversed(expressions), *plain) for name in matched(pattern)}
    chosen = {name: own.get(name) for name in names if name in kept and own.get(name) != 0}
    if not chosen and not problems:
        given = {"targets": targets, "ignore": ignore, "sparsities": shares or None}
        ruled = ", ".join(f"{option} {value!r}" for option, value in given.items() if value is not None)
        problems.append(f"none of {len(names)} is left with {ruled}; change one of these")
    if problems:
        raise ValueError("the linears to prune cannot be chosen:\n  " + "\n  ".join(problems))
    return chosen


class _Matcher:
    """The names that a pattern matches, in their order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._endings: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            parts = name.split(".")
            for start in range(len(parts)):
                self._endings.setdefault(".".join(parts[start:]), []).append(name)

    def __call__(self, pattern: str) -> list[str]:
        if not pattern.startswith(EXPRESSION):
            return self._endings.get(pattern, [])
        expression = re.compile(pattern.removeprefix(EXPRESSION))
        return [name for name in self._names if expression.match(name)]


def _nothing(option: str, pattern: str, names: Sequence[str], never: Sequence[str]) -> str:
    """Why a pattern matches no linear."""
    if never:
        return (
            f"{option}: {pattern!r} matches {listed(never, 3)}, but only linears of the blocks are pruned, never "
            "embeddings, heads, norms or routers"
        )
    parts = pattern.count(".") + 1
    endings = list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))
    near = difflib.get_close_matches(pattern, endings, n=3)
    if pattern.startswith(EXPRESSION):
        hint = f"an expression is matched from the start of names such as {names[0]}"
    elif near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    else:
        hint = f"names end in {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in names))}"
    everything = "; for all linears leave targets out" if option == "targets" else ""
    return f"{option}: {pattern!r} matches no linear; {hint}{everything}"
