"""Renews what the documents repeat: file trees, tables of keys and options, examples, and the planner's output.

    python scripts/renew_docs.py

Generated parts stand between markers, `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

- `tree`, in docs/files.md and its Chinese twin: keeps the comment that stands beside a path; a new path gets the first
  line of its docstring or of its comment, for somebody to shorten.
- `parameters`, in docs/configuration.md and its Chinese twin: the English comes from the configuration and the
  routers; the Chinese page keeps its translations, and a new key comes in English, for somebody to translate.
- `cells PATH`: an example as prose and code, cell by cell, after its docstring. `cell PATH N`: its Nth cell of code, on
  a Chinese page, which has prose of its own. `ten lines`: the Python block of the README.
- `measured NAME`: a table of results in benchmarks/results, from `benchmarks/measured_tables.py`.
- `support`: the matrix of what goes with what, from `switchyard.report.support`.
- `campaigns`: the figures of benchmarks/reliability, from their JSON files.
- What the planner prints stands in blocks of text that begin with its command.
"""

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from switchyard.moe.routing.__main__ import HEADINGS as ROUTER_FACTS
from switchyard.moe.routing.__main__ import rows as router_rows
from switchyard.planner import search as estimate
from switchyard.report import parameters, support

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import measured_tables  # noqa: E402

DOCS = ROOT / "docs"
MEASURED = re.compile(r"<!-- measured (\w+): begin -->")
FOLDERS = ("config/*.yaml", "scripts/*", "examples/*.py", "benchmarks/**/*.py", "docs/*.md")
PLAN = re.compile(r"```text\n\$ (python -m switchyard\.planner (.*))\n(?:.*\n)*?```")
INCLUDED = re.compile(r"<!-- (cells \S+|cell \S+ \d+|ten lines): begin -->\n(?:.*\n)*?<!-- \1: end -->")
TEN_LINES = re.compile(r"^```python\n.*?^```", flags=re.DOTALL | re.MULTILINE)
FIXED = {
    "train.py": "command line: train, resume",
    "eval.py": "command line: loss, bits per byte, audit",
    "export.py": "command line: checkpoint to MindIR",
    "infer.py": "command line: text from an exported model",
    "requirements.txt": "what running needs, pinned",
    "requirements-docs.txt": "what the documentation site needs",
    "requirements-test.txt": "what the tests need besides",
    "pyproject.toml": "the package, the rules of ruff and pytest, the layers of imports",
    "mkdocs.yml": "the documentation site",
    "README.md": "this page",
    "README_CN.md": "this page in Chinese",
    "CONTRIBUTING.md": "tests of one package, how to add things, style",
    "LICENSE": "Apache-2.0",
    ".ci/run": "what continuous integration runs",
    "tests/": "mirrors src/switchyard; oracles in tests/oracles",
}


WORDS = {
    "en": {
        "headings": parameters.HEADINGS,
        "options": "Options of routers",
        "below": "Options stand with the name of the router. A router without a table here has none.",
        "facts": {"paper": "source"},
        "signs": (": ", "; ", "."),
    },
    "zh": {
        "headings": ("参数", "取值", "默认值", "含义"),
        "options": "各路由器的选项",
        "below": "选项与路由器的名称写在一起。没有表格的路由器没有选项。",
        "facts": {
            "unit": "单位",
            "form": "形式",
            "learnable": "可学习",
            "causal": "因果",
            "sharded": "切分",
            "compiler": "编译器",
            "explicit": "显式集合通信",
            "losses": "损失",
            "needs": "需要",
            "paper": "出处",
            "yes": "是",
            "no": "否",
        },
        "signs": ("：", "；", "。"),
    },
}
VALUES = {  # of the column of values, on the Chinese page
    r"list of list of ": "二维列表，元素为 ",
    r"list of ": "列表，元素为 ",
    r"\binteger\b": "整数",
    r"\bnumber\b": "数值",
    r"\btext\b": "文本",
    r"\bmapping\b": "映射",
    r" or ": " 或 ",
}
HEADING = r"^#+ (\S+)$"


def main() -> int:
    """Rewrites the files that differ."""
    for path in pages():
        old = path.read_text(encoding="utf-8")
        new = renewed(path.relative_to(ROOT).as_posix(), old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(ROOT))
    return 0


def pages() -> list[Path]:
    """Returns every page of the documentation."""
    return sorted(DOCS.rglob("*.md"))


def renewed(name: str, text: str) -> str:
    """Returns the page `name` (a path in the repository) with its generated parts made anew."""
    language = "zh" if name.startswith("docs/zh/") else "en"
    text = INCLUDED.sub(lambda found: included(found[1]), with_plans(text))
    if _markers("tree")[0] in text:
        text = replaced(text, "tree", f"```text\n{tree(tree_comments(section(text, 'tree')))}\n```")
    if _markers("support")[0] in text:
        text = replaced(text, "support", support.render())
    for part in MEASURED.findall(text):
        text = replaced(text, f"measured {part}", measured_tables.render(part, language))
    if _markers("campaigns")[0] in text:
        text = replaced(text, "campaigns", campaigns())
    if _markers("parameters")[0] in text:
        translated = meanings(section(text, "parameters")) if language == "zh" else {}
        text = replaced(text, "parameters", "\n\n".join(configuration(language, translated)))
    return text


def campaigns() -> str:
    """Returns the tables of benchmarks/reliability, whose scripts are no package."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "reliability" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.render()


def included(name: str) -> str:
    """Returns the part `cells PATH`, `cell PATH N` or `ten lines` with its markers."""
    begin, end = _markers(name)
    if name == "ten lines":
        text = TEN_LINES.search((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    else:
        words = name.split()
        prose, cells = example(ROOT / words[1])
        blocks = [cell for cell in cells if cell.startswith("```")]
        text = blocks[int(words[2]) - 1] if words[0] == "cell" else "\n\n".join([prose, *cells])
    return f"{begin}\n{text}\n{end}"


def example(path: Path) -> tuple[str, list[str]]:
    """Returns the docstring of a script with `# %%` cells, and its cells as Markdown: prose, or a block of code."""
    source = path.read_text(encoding="utf-8")
    first, *parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)
    cells = []
    for kind, part in zip(parts[::2], parts[1::2]):
        if "[markdown]" in kind:
            cells.append(re.sub(r"^# ?", "", part.strip(), flags=re.MULTILINE))
        elif part.strip():
            cells.append(f"```python\n{part.strip()}\n```")
    return ast.get_docstring(ast.parse(first)) or "", cells


def configuration(language: str, translated: dict[tuple[str, str], str]) -> Iterator[str]:
    """Yields the tables of the configuration with their headings; `translated` is what `meanings` returns."""
    words = WORDS[language]

    def table(heading: str, rows: list[parameters.Row]) -> str:
        if language == "zh":
            rows = [_translated(heading, row, translated) for row in rows]
        return parameters.table(rows, words["headings"])

    for name, rows in parameters.sections().items():
        yield f"## {name}"
        yield table(name, rows)
    yield f"## {words['options']}"
    yield words["below"]
    options = parameters.router_options()
    for router in (dict(zip(ROUTER_FACTS, row)) for row in router_rows()):
        yield f"### {router['name']}"
        yield _facts(router, words["facts"], *words["signs"])
        if rows := options.get(router["name"]):
            yield table(router["name"], rows)


def meanings(text: str) -> dict[tuple[str, str], str]:
    """Returns (heading, key with its backticks) -> last column of the Markdown tables below the headings."""
    found, heading = {}, ""
    for line in text.splitlines():
        if title := re.match(HEADING, line):
            heading = title[1]
        elif line.startswith("| `"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            found[heading, cells[0].strip()] = cells[-1].strip().replace("\\|", "|")
    return found


def _translated(heading: str, row: parameters.Row, translated: dict[tuple[str, str], str]) -> parameters.Row:
    """Returns a row in Chinese: its own translation, or that of the same option of another router."""
    same = {key: meaning for (_, key), meaning in translated.items()}
    values = row.values
    for word, chinese in VALUES.items():
        values = re.sub(word, chinese, values)
    return row._replace(values=values, meaning=translated.get((heading, row.key), same.get(row.key, row.meaning)))


def _facts(router: dict[str, str], labels: dict[str, str], is_: str, then: str, stop: str) -> str:
    """Returns one line about a router: every column of `python -m switchyard.moe.routing` but its name."""
    facts = {labels.get(column, column): labels.get(value, value) for column, value in router.items()}
    return then.join(f"{label}{is_}{value}" for label, value in list(facts.items())[1:]) + stop


def with_plans(text: str) -> str:
    """The page with what the planner prints now under each of its commands."""
    return PLAN.sub(lambda found: f"```text\n$ {found[1]}\n{plan(found[2])}\n```", text)


def plan(arguments: str) -> str:
    """What the planner prints for a command line; configurations are those of the repository."""
    words = [str(ROOT / word) if word.startswith("config/") else word for word in shlex.split(arguments)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        estimate.main(words)
    return out.getvalue().strip()


def section(text: str, name: str) -> str:
    """What stands between the markers of `name`."""
    begin, end = _markers(name)
    return text.split(begin)[1].split(end)[0].strip("\n")


def replaced(text: str, name: str, new: str) -> str:
    """`text` with `new` between the markers of `name`."""
    begin, end = _markers(name)
    return f"{text.split(begin)[0]}{begin}\n{new}\n{end}{text.split(end)[1]}"


def tree(comments: dict[str, str]) -> str:
    """The tree as text, `path  # comment` a line, folders before what is in them; `comments` replaces by path."""
    lines = []
    for path, comment in entries():
        folder = path.endswith("/")
        depth = path.rstrip("/").count("/")
        if path.startswith("src/"):
            depth -= 1  # src/switchyard/ is one line
        label = path if path == "src/switchyard/" else path.rstrip("/").rsplit("/", 1)[-1] + ("/" if folder else "")
        lines.append((path, "  " * depth + label, comments.get(path, comment)))
    width = max(len(label) for _, label, _ in lines) + 2
    return "\n".join(f"{label:<{width}}# {comment}" if comment else label for _, label, comment in lines)


def tree_comments(text: str) -> dict[str, str]:
    """Path -> comment of a tree that `tree` made."""
    found, folders = {}, []
    for line in text.splitlines():
        label, mark, comment = line.partition("# ")
        name, depth = label.strip(), (len(label) - len(label.lstrip())) // 2
        if line.startswith("```") or not name:
            continue
        folders = folders[:depth]
        path = "".join(folders) + name
        if name.endswith("/"):
            folders.append(name)
        if mark:
            found[path] = comment
    return found


def entries() -> list[tuple[str, str]]:
    """(path, comment) of everything that the tree lists; a folder's path ends with a slash."""
    top = [ROOT / name for name in FIXED if (ROOT / name).is_file()]
    listed = sorted((path for pattern in FOLDERS for path in ROOT.glob(pattern) if path.is_file()), key=_order)
    package = sorted((ROOT / "src" / "switchyard").rglob("*.py"), key=_order)
    found, seen = [], set()
    for path in [*top, *listed, *package]:
        relative = path.relative_to(ROOT)
        folder = "" if relative.parent == Path(".") else f"{relative.parent.as_posix()}/"
        if folder and folder not in seen:
            seen.add(folder)
            initial = path.parent / "__init__.py"
            found.append((folder, describe(initial) if initial.is_file() else ""))
        if path.name != "__init__.py":
            found.append((relative.as_posix(), describe(path)))
    return [*found, ("tests/", FIXED["tests/"])]


def describe(path: Path) -> str:
    """The first line that says what a file is."""
    fixed = FIXED.get(path.relative_to(ROOT).as_posix())
    if fixed:
        return fixed
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.strip().lstrip("#").strip().strip('"').strip()
        if words and not words.startswith(("!", "SPDX", "==", "[")):
            return words.rstrip(".")
    return ""


def _order(path: Path) -> list[tuple[int, str]]:
    """Files of a folder before its subfolders, each by name."""
    parts = path.relative_to(ROOT).parts
    return [(1, part) for part in parts[:-1]] + [(0, parts[-1])]


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


if __name__ == "__main__":
    sys.exit(main())
