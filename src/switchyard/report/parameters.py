"""The table of all configuration keys, made from `switchyard.config`: `python -m switchyard.report.parameters`."""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from pydantic.fields import FieldInfo

from switchyard.cli import Parser, run
from switchyard.config import Config
from switchyard.config.router_options import KEY, OPTIONS, readers

HEADINGS = ("Key", "Values", "Default", "Meaning")


class Row(NamedTuple):
    """Describes one key: its dotted name, its type, its default, and its meaning."""

    key: str
    values: str
    default: str
    meaning: str


def rows() -> Iterator[Row]:
    """Every key of every section, in the order of `Config`; the options of routers after `moe.router`."""
    schema = Config.model_json_schema()
    for section, outer in Config.model_fields.items():
        properties = schema["$defs"][outer.annotation.__name__]["properties"]
        for name, field in outer.annotation.model_fields.items():
            key = f"{section}.{name}"
            yield _row(key, properties[name], field, field.description)
            if key == KEY:
                yield from _options()


def _options() -> Iterator[Row]:
    """Every option of the shipped routers once, with the routers that have it."""
    found = {name: kind for kind in OPTIONS.values() for name in kind.model_fields}
    for name, kind in found.items():
        field, schema = kind.model_fields[name], kind.model_json_schema()["properties"][name]
        yield _row(f"{KEY}.{name}", schema, field, f"{', '.join(readers(name))}: {field.description}")


def _row(key: str, schema: dict[str, Any], field: FieldInfo, meaning: str) -> Row:
    default = yaml.safe_dump(field.default, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
    return Row(f"`{key}`", _values(schema), f"`{default}`", meaning)


def table(headings: tuple[str, ...] = HEADINGS, meanings: dict[str, str] | None = None) -> str:
    """Returns the Markdown table; `meanings` replaces descriptions by key (with its backticks)."""
    meanings = meanings or {}
    lines = [_line(headings), _line(["---"] * len(headings))]
    lines += [_line([*row[:3], meanings.get(row.key, row.meaning)]) for row in rows()]
    return "\n".join(lines)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(schema: dict[str, Any]) -> str:
    """Describes a JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(part) for part in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema["type"]
    if kind == "array":
        return f"list of {_values(schema['items'])}"
    name = {"boolean": "`true`, `false`", "string": "text", "null": "`null`", "object": "mapping"}.get(kind, kind)
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(schema[limit])}" for limit, sign in limits.items() if limit in schema]
    return " ".join([name, ", ".join(bounds)]).strip()


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    Parser(prog="python -m switchyard.report.parameters", description="Prints the table.").parse_args(arguments)
    print(table())


if __name__ == "__main__":
    sys.exit(run(main))
