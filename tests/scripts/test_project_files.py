"""The files around the code: versions agree, templates and hooks can be read, SECURITY.md is kept by the code."""

import ast
import functools
import re
from pathlib import Path

import pytest
import yaml

from switchyard import __version__

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def modules() -> dict[Path, list[ast.AST]]:
    """The nodes of every module of the package."""
    paths = (ROOT / "src").rglob("*.py")
    return {path: list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))) for path in paths}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == __version__
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), flags=re.MULTILINE)[0] == __version__
    assert f"Today it is {__version__.rpartition('.')[0]}." in read("SECURITY.md")


def test_the_citation_has_what_the_format_asks_for():
    held = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= held.keys() and held["authors"][0]["name"]
    assert held["license"] == "Apache-2.0" and "Apache License" in read("LICENSE")


def test_both_places_have_the_same_templates():
    """GitHub's have a head in YAML; so have Gitee's."""
    for place in (".github", ".gitee"):
        assert (ROOT / place / "PULL_REQUEST_TEMPLATE.md").is_file()
        for name in ("bug_report.md", "feature_request.md"):
            _, head, body = read(f"{place}/ISSUE_TEMPLATE/{name}").split("---\n", 2)
            assert {"name", "about"} <= yaml.safe_load(head).keys() and body.strip()


def test_hooks_are_checks_of_the_test_command():
    """Each is local, and run_tests.sh, or a test of scripts, runs the same program."""
    hooks = [
        (repo["repo"], hook)
        for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
        for hook in repo["hooks"]
    ]
    assert {place for place, _ in hooks} == {"local"} and len(hooks) == 5
    script = read("scripts/run_tests.sh")
    for _, hook in hooks:
        program = re.search(r"(ruff check|ruff format|shellcheck|lint-imports|mypy)", hook["entry"]).group()
        assert program in script or program == "shellcheck", hook["id"]


@pytest.mark.parametrize("module", ["pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "torch"])
def test_the_package_imports_nothing_that_unpickles(module):
    for path, nodes in modules().items():
        for node in nodes:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert module not in {name.partition(".")[0] for name in names}, path


def test_arrays_and_yaml_are_read_without_objects():
    for path, nodes in modules().items():
        for node in nodes:
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called, keys = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
            if called in ("np.load", "numpy.load"):
                assert keys.get("allow_pickle", "False") == "False", path
            assert called not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), path
