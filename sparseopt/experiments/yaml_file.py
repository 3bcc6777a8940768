"""Floor 7: a YAML file as plain values with the line of every key, read so that a stranger's file cannot hurt.

The safe loader makes no Python objects. What remains is size: an alias stands for a whole block and a block of aliases
of such blocks for exponentially more ("billion laughs"), so blocks are counted as they would be written out, while
they are read. Values are text, numbers, booleans, null, lists and mappings by text; other tags are refused.
"""

import re
from pathlib import Path
from typing import Any

import yaml

Location = tuple[str | int, ...]

# Above all that people write, and read within a second or two.
MAX_BYTES = 256 * 1024
MAX_NODES = 10_000
MAX_DEPTH = 24

_CORE = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_CORE}str", f"{_CORE}merge"
_PLAIN = {f"{_CORE}{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
# SafeLoader's constructors raise these for text that does not fit its tag, as in `!!int x`.
_CONSTRUCTION = (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError)


class ConfigError(ValueError):
    """A config that cannot be used; the text lists every mistake with its place and what to do."""


class _Loader(yaml.SafeLoader):
    """Safe YAML of bounded size where 1e-6 is a number, as everybody but YAML 1.1 reads it, and a date is text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        # Nodes and levels of a finished node, with its aliases written out. Nodes stay alive, so ids are unique.
        self._sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As the base class, with the node measured."""
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._count += 1
        if self._depth == MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} blocks inside each other", mark)
        if self._count > MAX_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_NODES} values", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias of a block inside that block", mark)
        if node is not None and not is_alias:
            self._measure(node, mark)
        return node

    def _measure(self, node: yaml.Node, mark: yaml.Mark) -> None:
        if node.tag not in _PLAIN:
            raise yaml.composer.ComposerError(None, None, f"the tag {node.tag!r}; give plain values", mark)
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        sizes = [self._sizes[id(part)] for part in inner]
        nodes, levels = 1 + sum(s[0] for s in sizes), 1 + max((s[1] for s in sizes), default=0)
        if nodes > MAX_NODES or levels > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_NODES} values or {MAX_DEPTH} levels with aliases written out", mark
            )
        self._sizes[id(node)] = nodes, levels


_Loader.add_implicit_resolver(
    f"{_CORE}float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_CORE}timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """Plain values of a YAML file, and the line of every key.

    Raises:
        ConfigError: for a file that is too large, no YAML mapping, or has a key that is no text or is given twice.
        OSError: if it cannot be read.
    """
    with path.open("rb") as stream:
        raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES} bytes, which no config needs; check the path")
    try:
        values, root = _parse(raw.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8") from None
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None
    if not isinstance(values, dict) or root is None:
        raise ConfigError(f"{path} must hold a mapping of settings, `key: value` lines; given {type(values).__name__}")
    lines, mistakes = _lines_of(root)
    if mistakes:
        raise ConfigError(f"{path} cannot be used:\n" + "\n".join(mistakes[:100]))
    return values, lines


def parse_yaml(text: str) -> Any:
    """The plain value of a short YAML text, such as the right side of `key=value`.

    Raises:
        ConfigError: for text that is no YAML.
    """
    value, root = _parse(text[: MAX_BYTES + 1])
    if root is not None and _lines_of(root)[1]:
        raise ConfigError("keys must be text, each given once")
    return value


def path_text(place: Location) -> str:
    """A place in a config as people write it: `sweep.list[2].seed`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in place)
    return text.removeprefix(".")


def _parse(text: str) -> tuple[Any, yaml.Node | None]:
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        value = None if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{place}: no valid YAML: {problem}") from None
    except (*_CONSTRUCTION, RecursionError) as error:
        raise ConfigError(f": no valid YAML: a value does not fit its type ({error})") from None
    finally:
        if loader is not None:
            loader.dispose()
    _check_values(value)
    return value, root


def _check_values(value: Any) -> None:
    """See that whole numbers are of 64 bits and texts can be written again."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_values(key)
            _check_values(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f": a whole number of {value.bit_length()} bits; at most 64 fit")
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(": a text with half a character (a lone surrogate); write it out in UTF-8")


def _lines_of(root: yaml.Node) -> tuple[dict[Location, int], list[str]]:
    """The line of every key, and what is wrong with keys."""
    lines: dict[Location, int] = {}
    mistakes: list[str] = []

    def walk(node: yaml.Node, place: Location) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.tag not in (_TEXT, _MERGE):
                    written = key.value if isinstance(key, yaml.ScalarNode) else "a block"
                    mistakes.append(f"  line {line}: the key {written[:80]} is no text; put it in quotes")
                    continue
                here = (*place, key.value)
                if here in lines:
                    mistakes.append(f"  line {line}: {path_text(here)} is given twice in one block")
                lines[here] = line
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*place, index)] = value.start_mark.line + 1
                walk(value, (*place, index))

    walk(root, ())
    return lines, mistakes
