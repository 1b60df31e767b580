"""Hooks of MkDocs (see mkdocs.yml): Chinese labels and lines of the pages below docs/zh/, links between languages."""

import re
from pathlib import Path
from typing import Any

CHINESE = "\u3000-\u303f\u4e00-\u9fff\uff00-\uffef"
BROKEN = re.compile(f"(?<=[{CHINESE}])\n *(?=[{CHINESE}])")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Joins lines that break between two Chinese characters, where a browser would show a blank."""
    return BROKEN.sub("", markdown) if _is_chinese(page) else markdown


def on_page_context(context: dict[str, Any], page: Any, config: Any, **_: Any) -> dict[str, Any]:
    """Sets what depends on the page just before it is rendered: the labels, and where the choice of language leads."""
    config.theme["language"] = "zh" if _is_chinese(page) else "en"
    address = page.url.removeprefix("zh/").removeprefix("./")
    translated = (Path(config.docs_dir) / "zh" / page.file.src_uri.removeprefix("zh/")).is_file()
    for choice in config.extra["alternate"]:
        choice["link"] = {"en": f"./{address}", "zh": f"./zh/{address if translated else ''}"}[choice["lang"]]
    return context


def _is_chinese(page: Any) -> bool:
    return page.file.src_uri.startswith("zh/")
