"""Hooks of MkDocs (see mkdocs.yml) for the pages below docs/zh/: Chinese labels of the theme, lines without blanks."""

import re
from typing import Any

CHINESE = "\u3000-\u303f\u4e00-\u9fff\uff00-\uffef"
BROKEN = re.compile(f"(?<=[{CHINESE}])\n *(?=[{CHINESE}])")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Joins lines that break between two Chinese characters, where a browser would show a blank."""
    return BROKEN.sub("", markdown) if _is_chinese(page) else markdown


def on_page_context(context: dict[str, Any], page: Any, config: Any, **_: Any) -> dict[str, Any]:
    """Sets the language of the theme by the folder of the page, just before the page is rendered."""
    config.theme["language"] = "zh" if _is_chinese(page) else "en"
    return context


def _is_chinese(page: Any) -> bool:
    return page.file.src_uri.startswith("zh/")
