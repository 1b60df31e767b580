"""Renews what documents repeat: the file tree and the table of keys of the READMEs, the planner's output.

    python scripts/renew_readmes.py

Tree and table stand between markers. The tree keeps the comment that stands beside a path; a new path gets the first
line of its docstring or of its comment, for somebody to shorten. The table's English comes from `switchyard.config`;
README_CN.md keeps its translation of each key; a new key comes in English, for somebody to translate. What the planner
prints stands in docs/distributed.md and docs/simulation.md, in blocks that begin with its command; what goes with what
stands in docs/distributed.md, from `switchyard.report.support`.
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from switchyard.planner import search as estimate
from switchyard.report import parameters, support

ROOT = Path(__file__).resolve().parents[1]
READMES = {"README.md": parameters.HEADINGS, "README_CN.md": ("参数", "取值", "默认值", "含义")}
FOLDERS = ("config/*.yaml", "scripts/*", "benchmarks/**/*.py", "docs/*.md")
PLANNER_PAGES = ("docs/distributed.md", "docs/simulation.md")
PLAN = re.compile(r"```text\n\$ (python -m switchyard\.planner (.*))\n(?:.*\n)*?```")
FIXED = {
    "train.py": "command line: train, resume",
    "eval.py": "command line: loss, bits per byte, audit",
    "export.py": "command line: checkpoint to MindIR",
    "infer.py": "command line: text from an exported model",
    "requirements.txt": "what running needs, pinned",
    "requirements-test.txt": "what the tests need besides",
    "pyproject.toml": "the package, the rules of ruff and pytest, the layers of imports",
    "README.md": "this page",
    "README_CN.md": "this page in Chinese",
    "CONTRIBUTING.md": "tests of one package, how to add things, style",
    "LICENSE": "Apache-2.0",
    ".ci/run": "what continuous integration runs",
    "tests/": "mirrors src/switchyard; oracles in tests/oracles",
}


def main() -> int:
    """Rewrites the files."""
    for name in READMES:
        path = ROOT / name
        path.write_text(renewed(name, path.read_text(encoding="utf-8")), encoding="utf-8")
    for name in PLANNER_PAGES:
        path = ROOT / name
        path.write_text(renewed_page(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def renewed_page(text: str) -> str:
    """Returns a page with what the planner prints and, where it has its markers, with what goes with what."""
    text = with_plans(text)
    return replaced(text, "support", support.render()) if _markers("support")[0] in text else text


def with_plans(text: str) -> str:
    """The page with what the planner prints now under each of its commands."""
    return PLAN.sub(lambda found: f"```text\n$ {found[1]}\n{plan(found[2])}\n```", text)


def plan(arguments: str) -> str:
    """What the planner prints for a command line; configurations are those of the repository."""
    words = [str(ROOT / word) if word.startswith("config/") else word for word in shlex.split(arguments)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        estimate.main(words)
    return out.getvalue().strip()


def renewed(name: str, text: str) -> str:
    """The README `name` with tree and table made anew."""
    meanings = table_meanings(section(text, "parameters")) if name.endswith("_CN.md") else {}
    text = replaced(text, "tree", f"```text\n{tree(tree_comments(section(text, 'tree')))}\n```")
    return replaced(text, "parameters", parameters.table(READMES[name], meanings))


def section(text: str, name: str) -> str:
    """What stands between the markers of `name`."""
    begin, end = _markers(name)
    return text.split(begin)[1].split(end)[0].strip("\n")


def replaced(text: str, name: str, new: str) -> str:
    """`text` with `new` between the markers of `name`."""
    begin, end = _markers(name)
    return f"{text.split(begin)[0]}{begin}\n{new}\n{end}{text.split(end)[1]}"


def table_meanings(table: str) -> dict[str, str]:
    """Key (with its backticks) -> last column of a Markdown table."""
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in table.splitlines()[2:]]
    return {row[0].strip(): row[-1].strip().replace("\\|", "|") for row in rows}


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
