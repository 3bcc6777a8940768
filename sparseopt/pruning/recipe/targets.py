"""Which linears are pruned, and at which sparsity, by names and patterns.

| pattern | linears |
|---|---|
| `model.layers.3.mlp.down_proj` | the one with this checkpoint name |
| `down_proj`, `mlp.down_proj` | all whose names end in these parts |
| `re:model.layers.[0-3][.]` | all whose checkpoint names it matches from the start, as `re.match` does |

`targets` is a list of patterns, or a table of patterns and sparsities. With a list, the linears that match are pruned.
With a table all are, those that match at the sparsity given there; 0 leaves a linear as it is. Of several patterns that
match, a name comes before an expression, a longer name before a shorter one, and of expressions the first. Linears that
`ignore` matches are never pruned.

Names and expressions as in llm-compressor (`compressed_tensors.utils.match`), endings as in `target_modules` of PEFT.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from sparseopt.models.base.errors import listed

EXPRESSION = "re:"
HEAD = "lm_head"

Patterns = tuple[str, ...]
# A list, or a table as pairs, because their order counts.
Targets = Patterns | tuple[tuple[str, float], ...]


def read_patterns(given: Any, option: str = "ignore") -> Patterns:
    """Patterns as a tuple: of a text with commas outside brackets between, or of a sequence.

    Raises:
        ValueError: for what are no names or expressions.
    """
    found = tuple(_split(given)) if isinstance(given, str) else given
    for pattern in found if isinstance(found, Sequence) else [found]:
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
    return tuple(found)


def read_targets(given: Any) -> Targets:
    """Patterns, or pairs of patterns and sparsities: of a text as in `down_proj=0.6,q_proj=0`, or of a mapping.

    Raises:
        ValueError: as `read_patterns` does, for a text in which some patterns have a sparsity, or one has two, and for
            a sparsity that is no number.
    """
    if isinstance(given, str):
        given = _table_in(given) or given
    if isinstance(given, Mapping):
        given = tuple(given.items())
    # JSON has pairs as lists.
    pairs = [tuple(e) for e in given if isinstance(e, tuple | list)] if isinstance(given, Sequence) else []
    if not pairs:
        return read_patterns(given, "targets")
    if len(pairs) < len(given) or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"targets must be patterns, or a table as in {{'down_proj': 0.6}}, given {given!r}")
    read_patterns([pattern for pattern, _ in pairs], "targets")
    for pattern, share in pairs:
        if not isinstance(share, int | float) or isinstance(share, bool):
            raise ValueError(f"targets: {pattern!r} must have a number in [0, 1), given {share!r}")
    return tuple(pairs)


def _table_in(text: str) -> dict[str, float]:
    """The sparsities that a text gives by pattern, empty for none."""
    pairs: dict[str, float] = {}
    parts = list(_split(text))
    for part in parts:
        pattern, equals, number = part.rpartition("=")
        with contextlib.suppress(ValueError):
            if equals:
                pairs[pattern] = float(number)
    if pairs and len(pairs) < len(parts):
        raise ValueError(
            "targets must be patterns, or different patterns with a sparsity each, as in down_proj=0.6,q_proj=0.4, "
            f"given {text!r}"
        )
    return pairs


def shares_in(targets: Targets | None) -> dict[str, float] | None:
    """The sparsities of a table by pattern; None for a list."""
    pairs: Any = targets
    return dict(pairs) if targets and not isinstance(targets[0], str) else None


def check_shares(targets: Targets | None, fits: Callable[[float], None], allocation: str) -> None:
    """Check the sparsities of a table; `fits` refuses one above 0 that its pattern cannot have.

    Raises:
        ValueError: for one that is not possible, or together with an allocation that is not uniform.
    """
    for pattern, share in (shares := shares_in(targets) or {}).items():
        try:
            if share:
                fits(share)
        except ValueError as error:
            raise ValueError(f"targets: {pattern!r}: {error}") from None
    if shares and allocation != "uniform":
        raise ValueError(
            f"targets have sparsities, which allocation {allocation!r} is to choose: leave one of the two out; ignore "
            "has the linears that are to stay as they are"
        )


def _split(text: str) -> Iterator[str]:
    """The parts between commas, except those in brackets, which belong to an expression."""
    start = depth = 0
    for place, letter in enumerate(f"{text},"):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and (depth <= 0 or place == len(text)):
            yield text[start:place].strip()
            start = place + 1


def chosen_linears(
    names: Sequence[str],
    others: Collection[str],
    targets: Targets | None,
    ignore: Patterns | None,
) -> dict[str, float | None]:
    """The linears that are pruned, each with its sparsity in the table of `targets`, None for one without.

    Args:
        names: of all linears in the model's blocks.
        others: of the other parts of the checkpoint, which are never pruned; `ignore` may match them.
        targets: checked, as the following.
        ignore: none of these.

    Raises:
        ValueError: listing every pattern that matches no linear, with near names, or that has no effect; or if no
            linear is left.
    """
    matched, problems = _Matcher(names), []
    never = _Matcher([*others, HEAD])
    shares = shares_in(targets) or {}
    asked: Sequence[Any] = tuple(shares) or targets or ()
    for option, patterns in (("targets", asked), ("ignore", ignore or ())):
        for pattern in patterns:
            # Recipes for other tools ignore the head, which is not pruned here anyway.
            if not matched(pattern) and not (option == "ignore" and never(pattern)):
                problems.append(_nothing(option, pattern, names, never(pattern)))
    kept = set(names) if targets is None or shares else {name for pattern in asked for name in matched(pattern)}
    kept -= {name for pattern in ignore or () for name in matched(pattern)}
    for pattern, share in shares.items():
        if share and (found := matched(pattern)) and not kept.intersection(found):
            problems.append(
                f"targets: {pattern!r} is given {share:g}, but ignore leaves none of its linears ({listed(found, 3)}) "
                "to prune"
            )
    # The pattern that counts comes last.
    expressions = [pattern for pattern in shares if pattern.startswith(EXPRESSION)]
    plain = sorted((each for each in shares if not each.startswith(EXPRESSION)), key=lambda name: name.count("."))
    own = {name: shares[pattern] for pattern in (*reversed(expressions), *plain) for name in matched(pattern)}
    chosen = {name: own.get(name) for name in names if name in kept and own.get(name) != 0}
    if not chosen and not problems:
        given = {"targets": shares or targets, "ignore": ignore}
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
