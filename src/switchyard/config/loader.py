"""Reads the configuration: YAML and dotted overrides in, a checked Config out, one-line errors."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from switchyard.config import old_keys, recipes
from switchyard.config.checks import laws
from switchyard.config.reader import UnreadableError, check_characters, parse_yaml, read_text
from switchyard.config.schema import Config
from switchyard.config.sections import Section, messages, subsections
from switchyard.config.unread import refused
from switchyard.errors import LONGEST, UserError, represented, shortened

EMPTY = ("", "null", "Null", "NULL", "~")  # what is no text


def load(
    path: str | Path, overrides: Sequence[str] = (), inherited: bool = False, devices: int | None = None
) -> Config:
    """Reads a YAML file and `section.key=value` overrides, of which the last of a key counts.

    Args:
        path: of a UTF-8 file with a mapping of sections; an empty file means the defaults. Where no such file exists,
            the name of a configuration that comes with the package, such as "quickstart".
        overrides: see above.
        inherited: whether the file is a checkpoint's own, which may hold keys that have no effect, see `build`.
        devices: see `build`.

    Raises:
        UserError: missing file, broken YAML, unknown key, wrong type or impossible combination.
    """
    return build(read_sections(recipes.find(path)), overrides, inherited, devices)


def read_sections(path: str | Path) -> dict[str, Any]:
    """Returns the sections of a YAML file, unchecked (UserError: missing file, broken YAML, no mapping)."""
    text, name = read_text(path, "config file", "give the path of a YAML file"), shortened(str(path), 200)
    try:
        tree = parse_yaml(text)
    except UnreadableError as error:
        where = f" line {error.line}:" if error.line else ""
        raise UserError(f"config file '{name}':{where} broken YAML: {error.reason}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"config file '{name}': holds a {type(tree).__name__}; expected sections such as 'model:'")
    return tree


def build(
    tree: dict[str, Any], overrides: Sequence[str] = (), inherited: bool = False, devices: int | None = None
) -> Config:
    """Makes a checked Config of nested mappings and `section.key=value` overrides.

    Args:
        tree: section -> key -> value.
        overrides: the last of a key counts.
        inherited: whether `tree` comes from a checkpoint. A key that this configuration does not read is then refused
            only where an override names it; `notes` tells of the others.
        devices: how many there are, which `parallel.data_parallel: null` shares out; None where nobody knows.

    Raises:
        UserError: as in `load`.
    """
    tree = {name: dict(part) if isinstance(part, dict) else part for name, part in tree.items()}
    if not all(isinstance(name, str) for name in tree):
        raise UserError("config: section names must be text")
    given = _overridden(tree, overrides, inherited)
    try:
        sections = {"parallel": {}} | {name: {} if part is None else part for name, part in tree.items()}
        config = Config.model_validate(sections, context={"devices": devices})
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    check(config)
    for key, reason in refused(config).items():
        if not inherited or key in given:
            raise UserError(f"{key}: {represented(config.value(key))}; {reason}")
    return config


def _overridden(tree: dict[str, Any], overrides: Sequence[str], inherited: bool) -> set[str]:
    """Writes overrides into the tree, moves its old keys into moe.router, and returns the keys of the overrides."""
    old = old_keys.take_out(tree)  # of the file
    old_keys.check_alike(old, old_keys.options_in((tree.get("moe") or {}).get("router")) if old else {})
    router_first = sorted(overrides, key=lambda one: one.partition("=")[0].strip() != "moe.router")
    given = dict(_apply(tree, override) for override in router_first)  # options come after the router that has them
    new = old_keys.options_in(given.get("moe.router"))
    new |= {key.removeprefix("moe.router."): value for key, value in given.items() if key.startswith("moe.router.")}
    asked = old_keys.take_out(tree)
    old_keys.check_alike(asked, new)
    old = {key: value for key, value in old.items() if key not in new} | asked
    told = [key for key in old if key in asked or not inherited]
    old_keys.put_in(tree, old, told, [key for key in old if key not in told])
    return {*given, *(f"moe.router.{key}" for key in (*new, *asked))}


def check(config: Config) -> None:
    """Refuses combinations that no single field can see (UserError)."""
    for holds, key, value, allowed in laws(config):
        if not holds:
            raise UserError(f"{key}: {shortened(value)}; {allowed}")


def _apply(tree: dict[str, Any], override: str) -> tuple[str, Any]:
    """Writes one `section.key=value` into the tree and returns `section.key` and the value."""
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise UserError(f"override '{shortened(override)}': write section.key=value, such as train.steps=100")
    try:
        value = _value_of(section, key, text.strip())
    except UnreadableError as error:
        raise UserError(f"override '{shortened(override)}': {error.reason}") from None
    part = tree.setdefault(section, {})
    if part is None:
        part = tree[section] = {}
    if not isinstance(part, dict):
        raise UserError(f"{shortened(section)}: {represented(part)}; must be a section of keys")
    if (section, key.partition(".")[0]) == ("moe", "router"):
        part["router"] = _router(part.get("router", "switch"), key, value)
    elif "." in key and _subsections(section, key.partition(".")[0]):
        outer, _, inner = key.partition(".")
        known = part.get(outer)
        part[outer] = {**(known if isinstance(known, dict) else {}), inner: value}
    else:
        part[key] = value
    return f"{section}.{key}", value


def _router(before: Any, key: str, value: Any) -> Any:
    """Returns what a tree has for moe.router after an override of `router`, or of `router.option`."""
    known = dict(before) if isinstance(before, dict) else {"name": before}
    if "." in key:
        return {**known, key.partition(".")[2]: value}
    return before if value == known.get("name") else value  # another router keeps no options of this one


def _value_of(section: str, key: str, text: str) -> Any:
    """Returns the value of an override (UnreadableError)."""
    check_characters(text)
    if not _is_text(section, key) or text.startswith(("'", '"')):
        try:
            return parse_yaml(text)
        except UnreadableError as error:
            raise UnreadableError(f"the value is not YAML: {error.reason}; quote it") from None
    return None if text in EMPTY else text  # train.name=001 is a name, and data.path=a #1.txt no comment


def _is_text(section: str, key: str) -> bool:
    """Returns whether a key exists and holds text."""
    known = Config.model_fields.get(section)
    field = known.annotation.model_fields.get(key) if known else None
    return field is not None and field.annotation in (str, str | None)


def _is_table(section: str, key: str = "") -> bool:
    """Returns whether a key holds names with values, such as moe.losses."""
    field = Config.model_fields[section].annotation.model_fields.get(key)
    return field is not None and get_origin(field.annotation) is dict


def _subsections(section: str, key: str) -> dict[str, type[Section]]:
    """Returns `subsections` of a key; none where there is no such key."""
    known = Config.model_fields.get(section)
    field = known.annotation.model_fields.get(key) if known else None
    return subsections(field.annotation) if field else {}


def _one_line(error: ValidationError) -> str:
    """Returns the first problem of a pydantic report as `key: value; what is allowed`."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    loc, path = first["loc"], [str(step) for step in first["loc"]]
    fields = Config.model_fields[path[0]].annotation.model_fields if len(path) > 1 else Config.model_fields
    nested = _subsections(*path[:2]) if len(path) > 2 else {}
    if "" in nested:
        fields, shown, length = nested[""].model_fields, path[:3], 3
    elif nested:  # what follows the key is the type that was chosen
        fields, shown, length = nested[path[2]].model_fields, [*path[:2], *path[3:4]], 4
    else:  # what follows the key are the types that were tried
        shown = path if first["type"] == "extra_forbidden" else path[: 3 if _is_table(*path[:2]) else 2]
        length = len(shown)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(shortened(path[-1]), list(fields), n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(fields)}"
        return f"{_dotted(shown)}: unknown key; {hint}"
    allowed = shortened(messages(problems, loc[:length]), 4 * LONGEST)
    value = "not given" if nested and first["type"] == "missing" else represented(first["input"])
    return f"{_dotted(shown)}: {value}; {allowed}"


def _dotted(path: list[str]) -> str:
    return ".".join(shortened(step) for step in path)
