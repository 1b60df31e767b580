"""Documents against the repository: generated parts, links, names of files and modules, the two languages."""

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from oracles.documents import pages_of

from switchyard.config import Config
from switchyard.config.router_options import OPTIONS
from switchyard.moe.routing import known_routers

ROOT = Path(__file__).resolve().parents[2]
DOCS, ZH = ROOT / "docs", ROOT / "docs" / "zh"
CHINESE = [ROOT / "README_CN.md", *sorted(ZH.rglob("*.md"))]
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in [*pages_of(ROOT), *CHINESE]]
MODEL_ZOO_ORDER = [
    "Contents",
    "Description",
    "Model Architecture",
    "Dataset",
    "Features",
    "Environment Requirements",
    "Quick Start",
    "Script Description",
    "Training",
    "Evaluation",
    "Export",
    "Inference",
    "Performance",
    "Description of Random Situation",
    "FAQ",
]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def headings(text):
    """(level, title without its link) of every heading outside code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^(#+) (.+)$", text, flags=re.MULTILINE)
    return [(len(marks), re.sub(r"\[(.+?)\]\(.*?\)", r"\1", title)) for marks, title in found]


def english_of(chinese):
    return ROOT / "README.md" if chinese.name == "README_CN.md" else DOCS / chinese.relative_to(ZH)


def anchor(title):
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def renew_docs():
    spec = importlib.util.spec_from_file_location("renew_docs", ROOT / "scripts" / "renew_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.startswith("docs/")])
def test_generated_parts_are_those_of_the_code(renew_docs, name):
    text = read(name)
    assert renew_docs.renewed(name, text) == text, "run: python scripts/renew_docs.py"


def test_every_generated_part_has_its_place(renew_docs):
    pages = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in renew_docs.pages()}
    for part, page in (("tree", "files.md"), ("parameters", "configuration.md"), ("ten lines", "index.md")):
        holders = [name for name, text in pages.items() if f"<!-- {part}: begin -->" in text]
        assert holders == [f"docs/{page}", f"docs/zh/{page}"]
    assert [name for name, text in pages.items() if "<!-- support: begin -->" in text] == ["docs/distributed.md"]
    shown = sum(text.count("```text\n$ python -m switchyard.planner") for text in pages.values())
    assert shown == sum(len(renew_docs.PLAN.findall(text)) for text in pages.values()) > 0


@pytest.mark.parametrize("name", DOCUMENTS)
def test_keys_that_are_named_exist(name):
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}
    named = re.findall(r"`([a-z]+)\.([a-z0-9_]+)(?=[`:= ])", read(name))
    assert [key for key in named if key[0] in sections and key[1] not in (*sections[key[0]], "py")] == []
    options = {option for kind in OPTIONS.values() for option in kind.model_fields}
    assert set(re.findall(r"moe\.router\.([a-z_]+)[`:= ]", read(name))) <= options


def test_the_routing_page_lists_every_router():
    rows = re.findall(
        r"^\| (?:token|expert) choice .*|^\| (?:dense|soft|merged) \|.*", read("docs/routing.md"), re.MULTILINE
    )
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(known_routers())


def test_the_readme_counts_the_routers():
    assert f"{len(known_routers())} routers are one word in YAML" in read("README.md")
    assert f"从 {len(known_routers())} 种路由器中选择" in read("README_CN.md")


def test_the_configuration_page_lists_every_router_with_its_options():
    page = read("docs/configuration.md").split("## Options of routers")[1]
    parts = dict(re.findall(r"^### (\w+)\n(.*?)(?=^###|\Z)", page, flags=re.MULTILINE | re.DOTALL))
    assert list(parts) == sorted(known_routers())
    listed = {name: re.findall(r"^\| `(\w+)`", part, flags=re.MULTILINE) for name, part in parts.items()}
    assert listed == {name: list(OPTIONS[name].model_fields) for name in parts}


def test_every_folder_with_programs_is_in_the_tree(renew_docs):
    listed = {path for path, _ in renew_docs.entries()}
    for top in ("benchmarks", "scripts", "src/switchyard"):
        folders = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / top).rglob("*.py")}
        assert folders <= listed
    assert "benchmarks/experiments/" in listed and "benchmarks/experiments/digits.py" in listed


def test_every_key_is_translated(renew_docs):
    meanings = renew_docs.meanings(renew_docs.section(read("docs/zh/configuration.md"), "parameters"))
    assert ("model", "`model.hidden_size`") in meanings and ("gshard", "`second_expert`") in meanings
    untranslated = [key for key, meaning in meanings.items() if not re.search("[\u4e00-\u9fff]", meaning)]
    assert untranslated == []


def test_renewing_keeps_comments(renew_docs):
    text = read("docs/zh/files.md")
    old = re.sub(r"^  errors\.py .*\n", "", text, flags=re.MULTILINE)
    assert old != text
    renewed = renew_docs.renewed("docs/zh/files.md", old)
    assert re.search(r"^  errors\.py +# What a user did wrong, said in one line", renewed, flags=re.MULTILINE)
    assert re.search(r"^    experts\.py +# 谁来计算", renewed, flags=re.MULTILINE)


def test_renewing_keeps_translations_and_lends_them_to_the_same_option_of_another_router(renew_docs):
    text = read("docs/zh/configuration.md")
    old = text.replace("| `model.hidden_size` | 整数 >= 1 |", "| `model.hidden_size` | other |")
    top_k = re.search(r"### top_k\n.*?(?=###)", old, flags=re.DOTALL)[0]
    renewed = renew_docs.renewed("docs/zh/configuration.md", old.replace(top_k, ""))
    assert "| `model.hidden_size` | 整数 >= 1 | `128` | 残差流的宽度 D；vision：通道数 |" in renewed
    assert top_k in renewed


def test_headings_stand_in_the_order_of_the_model_zoo():
    assert [title for level, title in headings(read("README.md")) if level == 2] == MODEL_ZOO_ORDER


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_readmes_can_be_read_in_one_sitting(name):
    assert 200 <= len(read(name).splitlines()) <= 250


@pytest.mark.parametrize("chinese", CHINESE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_both_languages_have_the_same_parts(chinese):
    pages = [path.read_text(encoding="utf-8") for path in (english_of(chinese), chinese)]
    assert len({tuple(level for level, _ in headings(page)) for page in pages}) == 1
    assert len({len(re.findall(r"^\|", page, re.MULTILINE)) for page in pages}) == 1
    assert len({len(re.findall(r"^```", page, re.MULTILINE)) for page in pages}) == 1


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if target.startswith("https://"):
            continue
        path, _, place = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), target
        if place:
            assert found.suffix == ".md", target
            assert place in {anchor(title) for _, title in headings(found.read_text(encoding="utf-8"))}, target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_modules_that_are_named_exist(name):
    text = read(name)
    for path in re.findall(r"(?<![\w/])((?:tests/)?(?:scripts|config|benchmarks|docs)/[\w/]+\.\w+)", text):
        assert (ROOT / path).exists() or path == "config/mine.yaml", path
    for path in re.findall(r"python (\w+\.py)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (switchyard[\w.]*)", text):
        found = importlib.util.find_spec(module)
        assert found and (found.submodule_search_locations is None or importlib.util.find_spec(f"{module}.__main__"))


@pytest.mark.parametrize("name", ["docs/commands.md", "docs/zh/commands.md"])
@pytest.mark.parametrize("program", ["train.py", "eval.py", "export.py", "infer.py", "-m switchyard.data.prepare"])
def test_command_lines_are_those_of_help(name, program):
    row = next(line for line in read(name).splitlines() if line.startswith(f"| `python {program}` |"))
    shown = help_of(program)
    flags = set(re.findall(r"--[a-z][a-z-]*", shown.split("usage:")[1].split("\n\n")[0]))
    assert flags == set(re.findall(r"--[a-z][a-z-]*", row))
    assert ("section.key=value" in row) == ("section.key=value" in shown)


@functools.cache
def help_of(program):
    """What a program answers to --help."""
    command = [sys.executable, *program.split(), "--help"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
