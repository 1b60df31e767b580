"""The table of all configuration keys, made from `switchyard.config`, and its place in the READMEs.

`python -m switchyard.report.parameters` prints it; with `--write README.md README_CN.md` it renews the tables that
stand between the two markers of each file. A description that was translated there is kept.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from switchyard.config import Config
from switchyard.errors import EXIT_OK, EXIT_USER_ERROR, UserError

BEGIN, END = "<!-- parameters: begin -->", "<!-- parameters: end -->"
HEADINGS = ("Key", "Values", "Default", "Meaning")
HEADINGS_CN = ("参数", "取值", "默认值", "含义")


class Row(NamedTuple):
    """One key: its dotted name, what it may be, what it is when not given, and what it means."""

    key: str
    values: str
    default: str
    meaning: str


def rows() -> Iterator[Row]:
    """Every key of every section, in the order of `Config`."""
    schema = Config.model_json_schema()
    for section, outer in Config.model_fields.items():
        properties = schema["$defs"][outer.annotation.__name__]["properties"]
        for name, field in outer.annotation.model_fields.items():
            default = yaml.safe_dump(field.default, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
            yield Row(f"{section}.{name}", _values(properties[name]), f"`{default}`", field.description or "")


def table(headings: tuple[str, ...] = HEADINGS, meanings: dict[str, str] | None = None) -> str:
    """The Markdown table; `meanings` replaces descriptions by key."""
    meanings = meanings or {}
    lines = [_line(headings), _line(["---"] * len(headings))]
    lines += [_line([f"`{row.key}`", row.values, row.default, meanings.get(row.key, row.meaning)]) for row in rows()]
    return "\n".join(lines)


def tabled(text: str) -> dict[str, list[str]]:
    """The rows of the table between the markers of `text`, as key -> [values, default, meaning].

    Raises:
        UserError: the markers are missing.
    """
    found = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    if not found:
        raise UserError(f"parameters: no table between the lines '{BEGIN}' and '{END}'; put both into the file")
    lines = [line.strip() for line in found[1].strip().splitlines()]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines[2:]]
    return {key.strip().strip("`"): [cell.strip() for cell in rest] for key, *rest in cells}


def renewed(text: str, translated: bool) -> str:
    """`text` with the table between its markers made anew; where `translated`, the meanings there are kept."""
    old = tabled(text)
    meanings = {key: cells[2].replace("\\|", "|") for key, cells in old.items()} if translated else {}
    new = table(HEADINGS_CN if translated else HEADINGS, meanings)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(part) for part in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema["type"]
    if kind == "array":
        return f"list of {_values(schema['items'])}"
    name = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text"}.get(kind, kind)
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[limit]:g}" for limit, sign in limits.items() if limit in schema]
    return " ".join([name, ", ".join(bounds)]).strip()


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m switchyard.report.parameters", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", nargs="+", metavar="FILE", help="renew the table in these files; *_CN.md keep their meanings"
    )
    files = parser.parse_args(arguments).write
    if not files:
        print(table())
        return EXIT_OK
    try:
        for name in files:
            path = Path(name)
            path.write_text(renewed(path.read_text(encoding="utf-8"), path.stem.endswith("_CN")), encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
