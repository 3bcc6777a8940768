"""Which layers are pruned, and at which sparsity, by names and patterns.

| pattern | layers |
|---|---|
| `model.layers.3.mlp.down_proj` | the one with this checkpoint name |
| `down_proj`, `mlp.down_proj` | all with names that end in these parts |
| `re:model.layers.[0-3][.]` | all with checkpoint names that it matches from the start, like `re.match` |

`targets` is a list of patterns, or a table of patterns and sparsities. With a list, the matching layers are pruned.
With a table all layers are pruned, matching ones at the sparsity given there; 0 leaves a layer unchanged. If several
patterns match, names take precedence over expressions, longer names over shorter ones, and earlier expressions over
later ones. Layers that `ignore` matches are never pruned.

Names and expressions as in llm-compressor (`compressed_tensors.utils.match`), endings as in PEFT's `target_modules`.
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
# A list, or a table as pairs, because the order counts.
Targets = Patterns | tuple[tuple[str, float], ...]


def read_patterns(given: Any, option: str = "ignore") -> Patterns:
    """Read patterns from a text with commas (outside brackets) between them, or from a sequence.

    Raises:
        ValueError: if they are not names or expressions.
    """
    found = tuple(_split(given)) if isinstance(given, str) else given
    for pattern in found if isinstance(found, Sequence) else [found]:
        if not isinstance(pattern, str) or not pattern.removeprefix(EXPRESSION):
            raise ValueError(
                f"{option} must be names of layers, or expressions after {EXPRESSION!r}, as in ['down_proj', "
                f"'re:.*self_attn'], given {pattern!r}"
            )
        if pattern.startswith(EXPRESSION):
            try:
                re.compile(pattern.removeprefix(EXPRESSION))
            except re.error as error:
                raise ValueError(f"{option}: {pattern!r} is not a regular expression: {error}") from None
    return tuple(found)


def read_targets(given: Any) -> Targets:
    """Read patterns, or pairs of pattern and sparsity: from a text as in `down_proj=0.6,q_proj=0`, or from a mapping.

    Raises:
        ValueError: as for `read_patterns`; if only some patterns in a text have a sparsity, or one has two; if a
            sparsity is no number.
    """
    if isinstance(given, str):
        given = _table_in(given) or given
    if isinstance(given, Mapping):
        given = tuple(given.items())
    # JSON stores pairs as lists.
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
    """The sparsities that a text gives, by pattern; empty if there are none."""
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
    """Check the sparsities of a table; `fits` raises for one above 0 that the pattern cannot have.

    Raises:
        ValueError: if a sparsity is not possible, or the allocation is not uniform.
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
            "has the layers that are to stay unchanged"
        )


def _split(text: str) -> Iterator[str]:
    """Split at commas, except commas in brackets, which belong to an expression."""
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
    """Choose the layers to prune, each with its sparsity in the table of `targets`, or None.

    Args:
        names: names of all linear layers in the model's blocks.
        others: names of the other parts of the checkpoint, which are never pruned; `ignore` may match them.
        targets: already checked.
        ignore: patterns of layers to leave out, already checked.

    Raises:
        ValueError: listing every pattern that matches no layer, with near names, or that has no effect; or if no layer
            is left.
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
                f"targets: {pattern!r} is given {share:g}, but ignore leaves none of its layers ({listed(found, 3)}) "
                "to prune"
            )
    # The pattern that takes precedence comes last.
    expressions = [pattern for pattern in shares if pattern.startswith(EXPRESSION)]
    plain = sorted((each for each in shares if not each.startswith(EXPRESSION)), key=lambda name: name.count("."))
    own = {name: shares[pattern] for pattern in (*reversed(expressions), *plain) for name in matched(pattern)}
    chosen = {name: own.get(name) for name in names if name in kept and own.get(name) != 0}
    if not chosen and not problems:
        given = {"targets": shares or targets, "ignore": ignore}
        ruled = ", ".join(f"{option} {value!r}" for option, value in given.items() if value is not None)
        problems.append(f"none of {len(names)} is left with {ruled}; change one of these")
    if problems:
        raise ValueError("the layers to prune cannot be chosen:\n  " + "\n  ".join(problems))
    return chosen


class _Matcher:
    """The names that a pattern matches, in order."""

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
    """Why a pattern matches no layer."""
    if never:
        return (
            f"{option}: {pattern!r} matches {listed(never, 3)}, but only layers of the blocks are pruned, never "
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
    everything = "; for all layers leave targets out" if option == "targets" else ""
    return f"{option}: {pattern!r} matches no layer; {hint}{everything}"
