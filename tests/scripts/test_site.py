"""The documentation site: no warning, no MindSpore, and nothing that pages load from the network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import switchyard

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NAVIGATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
LOADED = r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. A package named mindspore stands in the way of the real one, and cannot be imported."""
    folder = tmp_path_factory.mktemp("site")
    blocked = folder / "blocked" / "mindspore"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('the site was to be built without MindSpore')\n")
    environment = os.environ | {"PYTHONPATH": str(blocked.parent), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder / "built"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "built"


def pages_of(navigation):
    """The files that a part of the navigation names."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in pages_of(part)]


def test_every_page_is_in_the_navigation_once():
    listed = pages_of(yaml.safe_load(NAVIGATION))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_without_mindspore(site):
    assert (site / "index.html").is_file() and (site / "zh" / "index.html").is_file()


@pytest.mark.slow
def test_pages_load_nothing_from_the_network(site):
    for page in site.rglob("*.html"):
        loaded = [address for address in re.findall(LOADED, page.read_text(encoding="utf-8"))]
        assert loaded == [], page


@pytest.mark.slow
def test_chinese_pages_have_the_language_and_the_labels(site):
    chinese, english = ((site / name).read_text(encoding="utf-8") for name in ("zh/data/index.html", "data/index.html"))
    assert '<html lang="zh"' in chinese and "目录" in chinese
    assert '<html lang="en"' in english and "Table of contents" in english


@pytest.mark.slow
def test_the_choice_of_language_leads_to_the_same_page_where_there_is_one(site):
    links = {}
    for name in ("data/index.html", "zh/data/index.html", "gpu/index.html", "index.html", "zh/index.html"):
        page = (site / name).read_text(encoding="utf-8")
        found = re.findall(r'<a href="([^"]*)" hreflang="(\w+)"', page)
        links[name] = {language: (site / name).parent.joinpath(link).resolve() for link, language in found}
    root = site.resolve()
    assert links["data/index.html"] == links["zh/data/index.html"] == {"en": root / "data", "zh": root / "zh" / "data"}
    assert links["gpu/index.html"] == {"en": root / "gpu", "zh": root / "zh"}
    assert links["index.html"] == links["zh/index.html"] == {"en": root, "zh": root / "zh"}


@pytest.mark.slow
def test_the_search_index_has_chinese_words_apart(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    texts = {page["location"]: page["text"] for page in index["docs"]}
    assert "检查点" in texts["zh/checkpoints/"].replace("\u200b", "") and "\u200b" in texts["zh/checkpoints/"]
    assert r"\u200b" in index["config"]["separator"]


def test_the_api_page_has_every_public_name():
    page = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    described = re.findall(r"^::: switchyard\.(\w+)$", page, flags=re.MULTILINE)
    assert sorted(described) == sorted(set(switchyard.__all__) - {"__version__"})


@pytest.mark.slow
def test_the_api_page_shows_docstrings(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(switchyard.__all__) - {"__version__"}:
        assert f'id="switchyard.{name}"' in page, name


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_run_as_they_stand(tmp_path):
    blocks = [
        re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for name in ("README.md", "README_CN.md")
    ]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 1
    lines = [line for line in blocks[0][0].splitlines() if line]
    assert len(lines) == 10
    (tmp_path / "ten_lines.py").write_text(blocks[0][0])
    done = subprocess.run([sys.executable, "ten_lines.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, load = re.fullmatch(r"\[(.*?)\] \[(.*?)\]", done.stdout.strip()).groups()
    losses, load = [float(loss) for loss in losses.split(",")], [float(part) for part in load.split()]
    assert losses[-1] < losses[0] and sum(load) == 128 * 2
