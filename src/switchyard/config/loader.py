"""Reads the configuration: YAML and dotted overrides in, a checked Config out, one-line errors."""

import difflib
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError

from switchyard.config.checks import laws
from switchyard.config.schema import Config
from switchyard.errors import UserError


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Reads a YAML file and `section.key=value` overrides.

    Raises:
        UserError: missing file, broken YAML, unknown key, wrong type or impossible combination.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"config file '{path}': {reason}; give the path of a YAML file") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        where = f" line {error.problem_mark.line + 1}:" if getattr(error, "problem_mark", None) else ""
        raise UserError(
            f"config file '{path}':{where} broken YAML: {_flat(getattr(error, 'problem', error))}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"config file '{path}': holds a {type(tree).__name__}, wants sections such as 'model:'")
    return build(tree, overrides)


def _flat(message: object) -> str:
    """A report of several lines as one."""
    return " ".join(str(message).split())


def build(tree: dict[str, Any], overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Makes a checked Config of nested mappings and `section.key=value` overrides (UserError as in `load`)."""
    tree = {name: dict(part) if isinstance(part, dict) else part for name, part in tree.items()}
    for override in overrides:
        _apply(tree, override)
    try:
        config = Config(**{name: {} if part is None else part for name, part in tree.items()})
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    except TypeError as error:
        raise UserError(f"config: section names must be text: {error}") from None
    check(config)
    return config


def check(config: Config) -> None:
    """Refuses combinations that no single field can see (UserError)."""
    for holds, key, value, allowed in laws(config):
        if not holds:
            raise UserError(f"{key}: {value}; {allowed}")


def _apply(tree: dict[str, Any], override: str) -> None:
    """Writes one `section.key=value` into the tree."""
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise UserError(f"override '{override}': write section.key=value, such as train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override '{override}': the value is not YAML; quote it") from None
    if _is_text(section, key) and not isinstance(value, str | None):
        value = text.strip()  # train.name=001 is a name, not a number
    part = tree.setdefault(section, {})
    if part is None:
        part = tree[section] = {}
    if not isinstance(part, dict):
        raise UserError(f"{section}: {part!r}; must be a section of keys")
    part[key] = value


def _is_text(section: str, key: str) -> bool:
    """Whether a key exists and holds text."""
    known = Config.model_fields.get(section)
    field = known.annotation.model_fields.get(key) if known else None
    return field is not None and field.annotation in (str, str | None)


def _is_table(section: str, key: str = "") -> bool:
    """Whether a key holds names with values, such as moe.losses."""
    field = Config.model_fields[section].annotation.model_fields.get(key)
    return field is not None and get_origin(field.annotation) is dict


def _one_line(error: ValidationError) -> str:
    """The first problem of a pydantic report as `key: value; what is allowed`."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = [str(step) for step in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = list(Config.model_fields)
        if len(path) > 1:
            known = list(Config.model_fields[path[0]].annotation.model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"{'.'.join(path)}: unknown key; {hint}"
    path = path[: 3 if _is_table(*path[:2]) else 2]  # what follows are the types that were tried
    same_key = [p["msg"] for p in problems if [str(s) for s in p["loc"]][: len(path)] == path]
    same_key = [message.removeprefix("Value error, ") for message in same_key]
    allowed = " or ".join(dict.fromkeys(m[0].lower() + m[1:] for m in same_key))
    return f"{'.'.join(path)}: {first['input']!r}; {allowed}"
