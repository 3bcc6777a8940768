"""Reading YAML files as plain values with the line of every key, safe for untrusted files.

The safe loader makes no Python objects. What remains is size: an alias stands for a whole block, and a block of aliases
of such blocks for exponentially more ("billion laughs"), so values are counted as if they were written out. Values are
text, numbers, booleans, null, lists and mappings with text keys; other tags raise an error.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

Location = tuple[str | int, ...]

# Far above what people write, and read within a second or two.
MAX_BYTES = 256 * 1024
MAX_NODES = 10_000
MAX_DEPTH = 24
MAX_MISTAKES = 100

_CORE = "tag:yaml.org,2002:"
_KEYS = {f"{_CORE}str", f"{_CORE}merge"}
# What YAML 1.1 reads otherwise.
_OLDER = {f"{_CORE}{kind}" for kind in ("int", "float", "timestamp")}
_PLAIN = {f"{_CORE}{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


class ConfigError(ValueError):
    """Raised if a config cannot be used; the message lists every mistake with its place and what to do."""


class _Loader(yaml.SafeLoader):
    """Safe YAML of bounded size with the numbers of YAML 1.2: 1e-6 is a number; 2:4, 010 and dates are text.

    Attributes:
        lines: the line of every key.
        mistakes: what is wrong with keys.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines: dict[Location, int] = {}
        self.mistakes: list[str] = []
        self._composed = self._written_out = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._composed += 1
        if self._composed > MAX_NODES:
            raise ComposerError(None, None, f"more than {MAX_NODES} values", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def check(self, node: yaml.Node, place: Location = (), inside: tuple[yaml.Node, ...] = ()) -> None:
        """Check a node, and everything inside it, before anything is constructed."""
        self._written_out += 1
        if any(node is outer for outer in inside):
            raise ComposerError(None, None, "an alias of a block inside that block", node.start_mark)
        if self._written_out > MAX_NODES or len(inside) == MAX_DEPTH:
            text = f"more than {MAX_NODES} values or {MAX_DEPTH} blocks inside each other, with aliases written out"
            raise ComposerError(None, None, text, node.start_mark)
        if node.tag not in _PLAIN:
            raise ComposerError(None, None, f"the tag {node.tag!r}; give plain values", node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.lines[(*place, index)] = value.start_mark.line + 1
                self.check(value, (*place, index), (*inside, node))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line, written = key.start_mark.line + 1, key.value if isinstance(key, yaml.ScalarNode) else "a block"
                here = (*place, written)
                if key.tag not in _KEYS:
                    self.mistakes.append(f"  line {line}: the key {written[:80]} is not text; put it in quotes")
                elif here in self.lines:
                    self.mistakes.append(f"  line {line}: {path_text(here)} is given twice in one block")
                self.lines[here] = line
                self.check(value, here, (*inside, node))

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            text = f"a whole number of {value.bit_length()} bits; at most 64 fit"
            raise ConstructorError(None, None, text, node.start_mark)
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            text = "a text with half a character (a lone surrogate); write it in UTF-8"
            raise ConstructorError(None, None, text, node.start_mark)
        return value


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OLDER]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_DIGITS = list("-+.0123456789")
_Loader.add_implicit_resolver(f"{_CORE}int", re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F]+|0o[0-7]+)$"), _DIGITS)
_Loader.add_implicit_resolver(
    f"{_CORE}float",
    re.compile(r"^[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
    _DIGITS,
)
_Loader.add_constructor(f"{_CORE}int", lambda _, node: int(node.value, 0))


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would not read as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _represent_text(dumper: Any, text: str) -> Any:
    """Line breaks of Unicode are kept in double quotes alone; elsewhere YAML reads them as a space."""
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def write_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that `read_yaml` reads."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str, source: str) -> tuple[Any, dict[Location, int]]:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None, {}
        loader.check(root)
        value = loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{source}{place}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: more than {MAX_DEPTH} blocks inside each other") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        # From a constructor, for text that does not fit its tag, as in `!!int x`.
        raise ConfigError(f"{source}: not valid YAML: a value does not fit its type ({error})") from None
    if loader.mistakes:
        raise ConfigError(f"{source} cannot be used:\n" + "\n".join(loader.mistakes[:MAX_MISTAKES]))
    return value, loader.lines


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """Plain values of a YAML file, and the line of every key.

    Raises:
        ConfigError: if the file is too large, is not a YAML mapping, or has a key that is not text or given twice.
        OSError: if it cannot be read.
    """
    with path.open("rb") as stream:
        raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES} bytes, which no config needs; check the path")
    try:
        value, lines = _parse(raw.decode(), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, `key: value` lines; given {type(value).__name__}")
    return value, lines


def parse_yaml(text: str, source: str) -> Any:
    """The plain value of a short YAML text, such as the right side of `key=value`; the source is for messages.

    Raises:
        ConfigError: if the text is not YAML, or has a key that is not text or given twice.
    """
    return _parse(text[: MAX_BYTES + 1], source)[0]


def path_text(place: Location) -> str:
    """A place in a config as people write it: `sweep.list[2].seed`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in place)
    return text.removeprefix(".")


def refused(mistakes: Sequence[tuple[Location, str]], lines: Mapping[Location, int], source: str) -> ConfigError:
    """The error for a file with these mistakes, each with its place and text, ordered by line."""
    listed = []
    for place, text in mistakes[:MAX_MISTAKES]:
        known = next((place[:end] for end in range(len(place), 0, -1) if place[:end] in lines), None)
        listed.append(f"  line {lines[known]}: {text}" if known else f"  {text}")
    if len(mistakes) > MAX_MISTAKES:
        listed.append(f"  and {len(mistakes) - MAX_MISTAKES} more")
    count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
    return ConfigError(f"{source} cannot be used, {count}:\n" + "\n".join(listed))
