"""The commands that documents tell a reader to type: those of code blocks, of running text and of configurations.

A command is what stands in a block of `bash`, `sh`, `shell` or `console`, behind a `$` in a block of `text`, between
backticks with at least one argument, or in the first comment of a configuration.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SHELLS = ("bash", "sh", "shell", "console")
PROGRAMS = r"(?:python[\d.]*|bash|sh|pytest|pip[\d.]*|ruff|tensorboard|msrun|openssl|docker|conda|git|source|export)"
INLINE = re.compile(rf"(?:\w+=\S+ )*{PROGRAMS} \S.*")
BLOCK = re.compile(r"^ *```(\w*)[^\n`]*\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
IN_COMMENT = re.compile(r"\b(?:python|bash) \S.*?(?=\s{3,}|\)|$)")


class Command(NamedTuple):
    """One command as it stands in a document, its comment left out."""

    document: str
    text: str


def commands_of(root: Path) -> list[Command]:
    """Returns every command of the README, CONTRIBUTING.md, docs/*.md and config/*.yaml, in order, each once."""
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]
    found = [(page, text) for page in pages for text in of_page(page.read_text(encoding="utf-8"))]
    for page in sorted((root / "config").glob("*.yaml")):
        found += [(page, text) for text in of_comment(page.read_text(encoding="utf-8"))]
    first = {}
    for page, text in found:
        first.setdefault(text, Command(page.relative_to(root).as_posix(), text))
    return list(first.values())


def of_page(text: str) -> Iterator[str]:
    """Yields the commands of a Markdown page, in order."""
    place = 0
    for block in BLOCK.finditer(text):
        yield from _inline(text[place : block.start()])
        yield from _of_block(block.group(1), block.group(2))
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


def _inline(text: str) -> Iterator[str]:
    for span in re.findall(r"`([^`]+)`", text):
        words = " ".join(span.split())
        if INLINE.fullmatch(words):
            yield words
