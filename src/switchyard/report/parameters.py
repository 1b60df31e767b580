"""Makes the tables of configuration keys and of router options: `python -m switchyard.report.parameters`."""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml
from pydantic.fields import FieldInfo

from switchyard.cli import Parser, run
from switchyard.config import Config
from switchyard.config.router_options import OPTIONS
from switchyard.config.sections import Section, subsections

HEADINGS = ("Key", "Values", "Default", "Meaning")


class Row(NamedTuple):
    """Describes one key: its dotted name, its type, its default, and its meaning."""

    key: str
    values: str
    default: str
    meaning: str


def sections() -> dict[str, list[Row]]:
    """Returns the rows of every section of `Config`, in its order; those of a sub-section follow its key."""
    schema = Config.model_json_schema()
    found = {}
    for section, outer in Config.model_fields.items():
        properties, found[section] = schema["$defs"][outer.annotation.__name__]["properties"], []
        for name, field in outer.annotation.model_fields.items():
            key = f"{section}.{name}"
            found[section] += [_row(key, properties[name], field), *_rows_below(key, subsections(field.annotation))]
    return found


def _rows_below(key: str, kinds: dict[str, type[Section]]) -> list[Row]:
    """Returns the rows of the sub-sections that a key may hold; where there are several, each says for which types it
    is."""
    if "" in kinds:  # of one kind
        properties, fields = kinds[""].model_json_schema()["properties"], kinds[""].model_fields
        return [_row(f"{key}.{inner}", properties[inner], field) for inner, field in fields.items()]
    types = ", ".join(f"`{name}`" for name in kinds)
    found = {"type": Row(f"`{key}.type`", types, "", "which keys follow")} if kinds else {}
    for name, kind in kinds.items():
        properties = kind.model_json_schema()["properties"]
        for inner, field in kind.model_fields.items():
            if inner == "type":
                continue
            if inner in found:
                before = found[inner]
                found[inner] = before._replace(meaning=before.meaning.replace(": ", f", {name}: ", 1))
                continue
            row = _row(f"{key}.{inner}", properties[inner], field)
            found[inner] = row._replace(meaning=f"{name}: {row.meaning}")
    return list(found.values())


def router_options() -> dict[str, list[Row]]:
    """Returns the rows of the options of every shipped router; an empty list where a router has none."""
    found = {}
    for router, kind in OPTIONS.items():
        properties = kind.model_json_schema()["properties"] if kind.model_fields else {}
        found[router] = [_row(name, properties[name], field) for name, field in kind.model_fields.items()]
    return found


def _row(key: str, schema: dict[str, Any], field: FieldInfo) -> Row:
    if field.is_required():
        return Row(f"`{key}`", _values(schema), "", field.description or "")
    default = yaml.safe_dump(field.default, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
    return Row(f"`{key}`", _values(schema), f"`{default}`", field.description or "")


def table(rows: list[Row], headings: tuple[str, ...] = HEADINGS) -> str:
    """Returns rows as a Markdown table."""
    return "\n".join([_line(headings), _line(["---"] * len(headings)), *map(_line, rows)])


def page(headings: tuple[str, ...] = HEADINGS) -> str:
    """Returns the tables of all sections and, behind them, of the routers that have options, as Markdown."""
    parts = [f"## {name}\n\n{table(rows, headings)}" for name, rows in sections().items()]
    parts += [f"### {name}\n\n{table(rows, headings)}" for name, rows in router_options().items() if rows]
    return "\n\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(schema: dict[str, Any]) -> str:
    """Describes a JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(part) for part in schema["anyOf"]))
    if "oneOf" in schema or "$ref" in schema:
        return "mapping"
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
    Parser(prog="python -m switchyard.report.parameters", description="Prints the tables.").parse_args(arguments)
    print(page())


if __name__ == "__main__":
    sys.exit(run(main))
