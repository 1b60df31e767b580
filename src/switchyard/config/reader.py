"""Reads files and texts that users hand over as YAML or JSON: plain values, or one line that says what is wrong.

The YAML is that of configuration files: null, true, numbers, text, lists and mappings whose keys are text. Dates stay
text. Refused are tags such as !!python/name, a key that is given twice, aliases that hold themselves or expand to more
than LARGEST_TREE values, and nesting deeper than DEEPEST.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import yaml

from switchyard.errors import UserError, represented, shortened
from switchyard.files import read_regular

LARGEST_FILE = 1 << 20  # bytes
LARGEST_TREE = 100_000  # values, each counted as often as aliases repeat it
DEEPEST = 32  # lists and mappings inside each other
LONGEST_NUMBER = 40  # digits
CORE = ("null", "bool", "int", "float", "str", "seq", "map", "merge")  # what is left of YAML's types
NOT_TEXT = "contains bytes that are not text in this locale; use UTF-8, or set PYTHONUTF8=1"
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without the types that a configuration does not have, and with limits."""

    yaml_constructors: ClassVar[dict] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix("tag:yaml.org,2002:") in CORE
    }
    yaml_implicit_resolvers: ClassVar[dict] = {
        first: [(tag, pattern) for tag, pattern in rules if tag.removeprefix("tag:yaml.org,2002:") in CORE]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent, index):
        """Composes one value (YAMLError: too deep)."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise _problem(f"more than {DEEPEST} levels of nesting", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self):
        """Returns the document as nodes whose keys are text and stand once (YAMLError)."""
        node = super().get_single_node()
        if node is not None:
            self._check(node, {})
        return node

    def _check(self, node: yaml.Node, sizes: dict[yaml.Node, int | None]) -> int:
        """Returns how many values a node expands to (YAMLError: too many, or it holds itself)."""
        if node in sizes:
            if sizes[node] is None:
                raise _problem("an alias stands inside its own anchor", node.start_mark)
            return sizes[node]
        sizes[node], size = None, 1
        for part in _parts(node):
            size += self._check(part, sizes)
            if size > LARGEST_TREE:
                raise _problem(f"aliases expand to more than {LARGEST_TREE:,} values", node.start_mark)
        sizes[node] = size
        return size

    def flatten_mapping(self, node):
        """Merges `<<` into a mapping, whose own keys were checked before."""
        if not getattr(node, "checked", False):
            _check_keys(node)
            node.checked = True
        super().flatten_mapping(node)

    def construct_object(self, node, deep=False):
        """Makes the value of a node (YAMLError: one that its type or tag cannot hold)."""
        if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
            raise _problem(f"a number of {len(node.value):,} characters; at most {LONGEST_NUMBER}", node.start_mark)
        try:
            made = super().construct_object(node, deep)
            if isinstance(made, str):
                made.encode()  # an escape such as "\\ud800" is no character
            return made
        except yaml.YAMLError:
            raise
        except UNREADABLE:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _problem(f"{represented(node.value)} is not a value of type {kind}", node.start_mark) from None


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """Returns the values inside a node."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuses keys that are no text or that a mapping holds twice (YAMLError)."""
    seen = {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            name = "<<"
        elif key.tag == "tag:yaml.org,2002:str" and isinstance(key, yaml.ScalarNode):
            name = key.value
        else:
            what = represented(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise _problem(f"{what} as a key: keys must be text, put it between quotes", key.start_mark)
        if name in seen:
            first = seen[name].line + 1
            raise _problem(f"key {represented(name)} is given twice, first in line {first}", key.start_mark)
        seen[name] = key.start_mark


def _problem(text: str, mark: yaml.Mark | None) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, text, mark)


class UnreadableError(ValueError):
    """Reports text that cannot be read as expected; the message of the error is one line.

    Attributes:
        line: the line that is wrong, from 1; None where it is the whole.
        reason: what is wrong with it.
    """

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(f"line {line}: {reason}" if line else reason)
        self.reason, self.line = reason, line


def check_characters(text: str) -> None:
    """Refuses text with bytes that the locale could not read and Python keeps as surrogates (UnreadableError)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnreadableError(NOT_TEXT) from None


def parse_yaml(text: str) -> Any:
    """Returns what YAML text holds (UnreadableError)."""
    check_characters(text)
    try:
        loader = PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text[: getattr(error, "position", 0)].count("\n")
        raise UnreadableError(_reason(error), line + 1) from None
    except UNREADABLE as error:  # PyYAML's own, such as an escape beyond Unicode
        raise UnreadableError(f"not readable ({type(error).__name__})") from None


def _reason(error: yaml.YAMLError) -> str:
    """Returns what PyYAML complains about, as one line."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {represented(chr(error.character))} is not allowed"
    return shortened(" ".join(str(getattr(error, "problem", None) or error).split()), 120)


def parse_json(text: str | bytes) -> Any:
    """Returns what JSON text holds, NaN and Infinity refused (UnreadableError)."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a JSON number")

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise UnreadableError("nested too deeply") from None
    except ValueError as error:
        raise UnreadableError(shortened(" ".join(str(error).split()), 120)) from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object (ValueError: a key is given twice)."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {represented(twice)} is given twice")
    return found


def read_text(path: str | Path, what: str, remedy: str, largest: int = LARGEST_FILE) -> str:
    """Returns the text of a UTF-8 file; a byte order mark is left out.

    Args:
        path: of a regular file: a device or a pipe may never end.
        what: the file's name in messages, such as "config file".
        remedy: what messages end with.
        largest: bytes that it may have.

    Raises:
        UserError: no such file, no regular file, too large, or not UTF-8.
    """
    try:
        data = read_regular(Path(path), largest)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        marks = (b"\xff\xfe", b"\xfe\xff")
        reason = "UTF-16, not UTF-8 text" if data.startswith(marks) else f"not UTF-8 text at byte {error.start}"
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{what} '{shortened(str(path), 200)}': {reason}; {remedy}") from None
