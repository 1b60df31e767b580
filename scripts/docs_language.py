"""Gives the pages below docs/zh/ the theme's Chinese labels: a hook of MkDocs, see mkdocs.yml."""

from typing import Any


def on_page_context(context: dict[str, Any], page: Any, config: Any, **_: Any) -> dict[str, Any]:
    """Sets the language of the theme by the folder of the page, just before the page is rendered."""
    config.theme["language"] = "zh" if page.file.src_uri.startswith("zh/") else "en"
    return context
