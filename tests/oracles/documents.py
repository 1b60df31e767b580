"""The commands that documents tell a reader to type: those of code blocks, of running text and of configurations.

A command is what stands in a block of `bash`, `sh`, `shell` or `console`, behind a `$` in a block of `text`, between
backticks with at least one argument, or in the first comment of a configuration. A command may carry a mark that says
what it needs or how long it takes: ```bash title="needs: two GPUs" at a block, (takes: an hour) behind backticks.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SHELLS = ("bash", "sh", "shell", "console")
PROGRAMS = (
    r"(?:python[\d.]*|switchyard|bash|sh|pytest|pip[\d.]*|ruff|mkdocs|tensorboard|msrun|openssl|docker|conda|git|source|"
    r"export)"
)
INLINE = re.compile(rf"(?:\w+=\S+ )*{PROGRAMS} \S.*")
BLOCK = re.compile(r"^ *```(\w*)([^\n`]*)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
MARK = r"(?:needs|takes): [^)\"]+"
SPAN = re.compile(rf"`([^`]+)`(?:\s+\(({MARK})\))?")
IN_COMMENT = re.compile(r"\b(?:python|bash) \S.*?(?=\s{3,}|\)|$)")


class Command(NamedTuple):
    """One command as it stands in a document, its comment left out."""

    document: str
    text: str
    mark: str = ""  # what it needs, or how long it takes


def pages_of(root: Path) -> list[Path]:
    """Returns the pages in English: README, CONTRIBUTING.md and the documentation."""
    chinese = root / "docs" / "zh"
    found = [page for page in sorted((root / "docs").rglob("*.md")) if chinese not in page.parents]
    return [root / "README.md", root / "CONTRIBUTING.md", *found]


def commands_of(root: Path) -> list[Command]:
    """Returns every command of the pages and of config/*.yaml, in order, each as often as it stands there."""
    found = []
    for page in pages_of(root):
        name = page.relative_to(root).as_posix()
        found += [Command(name, *marked) for marked in of_page(page.read_text(encoding="utf-8"))]
    for page in sorted((root / "config").glob("*.yaml")):
        name = page.relative_to(root).as_posix()
        found += [Command(name, text) for text in of_comment(page.read_text(encoding="utf-8"))]
    return found


def of_page(text: str) -> Iterator[tuple[str, str]]:
    """Yields (command, mark) of a Markdown page, in order."""
    place = 0
    for block in BLOCK.finditer(text):
        yield from _inline(text[place : block.start()])
        mark = re.search(f'title="({MARK})"', block.group(2))
        for line in _of_block(block.group(1), block.group(3)):
            yield line, mark.group(1) if mark else ""
        place = block.end()
    yield from _inline(text[place:])


def of_comment(text: str) -> Iterator[str]:
    """Yields the commands of a configuration's first comment, whose lines may go on in the next."""
    comment = re.match(r"(?:#.*\n)*", text).group()
    for field in re.split(r"^# (?=\w+: )", comment, flags=re.MULTILINE)[1:]:
        yield from IN_COMMENT.findall(re.sub(r"\n#\s+", " ", field).strip())


def without_comment(line: str) -> str:
    """Returns a line of shell without its comment: a # after a blank or at the beginning, outside quotes."""
    quote = ""
    for place, sign in enumerate(line):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign == "#" and (place == 0 or line[place - 1].isspace()):
            return line[:place].rstrip()
    return line.rstrip()


def _of_block(language: str, block: str) -> Iterator[str]:
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    prompted = [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
    if language in SHELLS:
        yield from filter(None, (without_comment(line).strip() for line in prompted or lines))
    elif language in ("text", ""):
        yield from map(without_comment, prompted)


def _inline(text: str) -> Iterator[tuple[str, str]]:
    for span in SPAN.finditer(text):
        words = " ".join(span.group(1).split())
        if INLINE.fullmatch(words):
            yield words, span.group(2) or ""
