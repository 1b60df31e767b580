"""Documents against the repository: generated parts, links, names of files and modules, the two languages."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from switchyard.config import Config
from switchyard.config.router_options import OPTIONS
from switchyard.moe.routing import known_routers

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    "README.md",
    "README_CN.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
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


def commands(text):
    """The lines of bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = (re.sub(r"\s*#.*", "", line) for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def anchor(title):
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def renew_readmes():
    spec = importlib.util.spec_from_file_location("renew_readmes", ROOT / "scripts" / "renew_readmes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_tree_and_parameters_are_those_of_the_code(renew_readmes, name):
    text = read(name)
    assert renew_readmes.renewed(name, text) == text, "run: python scripts/renew_readmes.py"


def test_plans_and_the_matrix_are_what_the_code_says(renew_readmes):
    for name, plans, tables in (("docs/distributed.md", 1, 1), ("docs/simulation.md", 2, 0)):
        page = read(name)
        assert len(renew_readmes.PLAN.findall(page)) == page.count("$ python -m switchyard.planner") == plans
        assert page.count("<!-- support: begin -->") == tables
        assert renew_readmes.renewed_page(page) == page, "run: python scripts/renew_readmes.py"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_keys_that_are_named_exist(name):
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}
    named = re.findall(r"`([a-z]+)\.([a-z0-9_]+)(?=[`:= ])", read(name))
    assert [key for key in named if key[0] in sections and key[1] not in (*sections[key[0]], "py")] == []
    options = {option for kind in OPTIONS.values() for option in kind.model_fields}
    assert set(re.findall(r"moe\.router\.([a-z_]+)[`:= ]", read(name))) <= options


def test_the_routing_page_lists_every_option():
    page = read("docs/routing.md")
    for name, kind in OPTIONS.items():
        options = ", ".join(f"`{option}: {_yaml(field.default)}`" for option, field in kind.model_fields.items())
        assert (f"| `{name}` | {options} |" in page) == bool(options), name


def _yaml(value):
    return yaml.safe_dump(value).removesuffix("\n").removesuffix("\n...")


def test_the_routing_page_lists_every_router():
    rows = re.findall(
        r"^\| (?:token|expert) choice .*|^\| (?:dense|soft|merged) \|.*", read("docs/routing.md"), re.MULTILINE
    )
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(known_routers())


def test_every_folder_with_programs_is_in_the_tree(renew_readmes):
    listed = {path for path, _ in renew_readmes.entries()}
    for top in ("benchmarks", "scripts", "src/switchyard"):
        folders = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / top).rglob("*.py")}
        assert folders <= listed
    assert "benchmarks/experiments/" in listed and "benchmarks/experiments/digits.py" in listed


def test_every_parameter_is_translated(renew_readmes):
    meanings = renew_readmes.table_meanings(renew_readmes.section(read("README_CN.md"), "parameters"))
    untranslated = [key for key, meaning in meanings.items() if not re.search("[\u4e00-\u9fff]", meaning)]
    assert untranslated == []


def test_renewing_keeps_comments_and_translations(renew_readmes):
    text = read("README_CN.md")
    assert "残差流的宽度 D" in text
    old = text.replace("| `model.hidden_size` | integer >= 1 |", "| `model.hidden_size` | other |")
    old = re.sub(r"^  errors\.py .*\n", "", old, flags=re.MULTILINE)
    assert old != text
    renewed = renew_readmes.renewed("README_CN.md", old)
    assert "| `model.hidden_size` | integer >= 1 | `128` | 残差流的宽度 D；vision：通道数 |" in renewed
    assert re.search(r"^  errors\.py +# What a user did wrong, said in one line", renewed, flags=re.MULTILINE)
    assert re.search(r"^    experts\.py +# 谁来计算", renewed, flags=re.MULTILINE)


def test_headings_stand_in_the_order_of_the_model_zoo():
    assert [title for level, title in headings(read("README.md")) if level == 2] == MODEL_ZOO_ORDER


def test_both_languages_have_the_same_parts():
    english, chinese = read("README.md"), read("README_CN.md")
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert commands(english) == commands(chinese)
    assert [len(re.findall(r"^\|", text, re.MULTILINE)) for text in (english, chinese)].count(0) == 0
    assert len(re.findall(r"^\|", english, re.MULTILINE)) == len(re.findall(r"^\|", chinese, re.MULTILINE))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if target.startswith("https://"):
            continue
        path, _, place = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), target
        if place:
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


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
@pytest.mark.parametrize("program", ["train.py", "eval.py", "export.py", "infer.py", "-m switchyard.data.prepare"])
def test_command_lines_are_those_of_help(name, program):
    row = next(line for line in read(name).splitlines() if line.startswith(f"| `python {program}` |"))
    shown = subprocess.run([sys.executable, *program.split(), "--help"], capture_output=True, text=True, cwd=ROOT)
    flags = set(re.findall(r"--[a-z][a-z-]*", shown.stdout.split("usage:")[1].split("\n\n")[0]))
    assert flags == set(re.findall(r"--[a-z][a-z-]*", row))
    assert ("section.key=value" in row) == ("section.key=value" in shown.stdout)
