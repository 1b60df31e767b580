"""The package as pip installs it: what it declares, what its wheel holds, and that the wheel trains."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from switchyard import __version__
from switchyard.training.loggers import TRACKERS

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest needs it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "switchyard"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "markupsafe": "jinja2"}  # module -> what pip installs
SMALL = ("model.num_layers=1", "moe.layers=all", "model.hidden_size=16", "context.mode=pynative")


def declared(lines: list[str]) -> dict[str, Requirement]:
    """Canonical name -> requirement, without those that name this package's own extras."""
    found = (Requirement(line) for line in lines)
    return {canonicalize_name(one.name): one for one in found if one.name != PROJECT["name"]}


def pinned(name: str) -> dict[str, Requirement]:
    """The requirements of a file and of those that it names, but for requirements.txt, by canonical name."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = declared([line for line in lines if line and not line.startswith(("#", "-r"))])
    others = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    for other in others:
        found |= {} if other == "requirements.txt" else pinned(other)
    return found


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """(top-level module, whether the import stands outside functions) of each import, and of each `require(...)`."""
    tree = WithoutTypes().visit(ast.parse(path.read_text(encoding="utf-8")))
    outside = set(map(id, _outside(tree)))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require" and node.args:
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        yield from ((name.partition(".")[0], id(node) in outside) for name in names)


class WithoutTypes(ast.NodeTransformer):
    """Leaves out what only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def _outside(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are executed when a module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _outside(child)


def used(outside: bool, but: str = "") -> set[str]:
    """Canonical names of the packages that src imports, all or those whose import stands outside functions.

    `but`: a folder of the package that is left out.
    """
    paths = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] != but]
    found = {name for path in paths for name, out in imports_of(path) if out or not outside}
    own = {*sys.stdlib_module_names, "switchyard"}
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in found - own}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    base, optional = declared(PROJECT["dependencies"]), declared(EXTRAS["train"] + EXTRAS["report"] + EXTRAS["data"])
    theirs = declared(EXTRAS["mindformers"]).keys()  # imported by one package, see below
    assert used(outside=True, but="report") - theirs <= base.keys()  # a command that says what it needs
    assert used(outside=False) == base.keys() | optional.keys() | theirs
    assert {tracker.package for tracker in TRACKERS.values()} == declared(EXTRAS["loggers"]).keys()


def test_one_package_imports_mindformers():
    importers = [path for path in SOURCE.rglob("*.py") if "mindformers" in {name for name, _ in imports_of(path)}]
    assert {path.parent.relative_to(SOURCE).as_posix() for path in importers} == {"interop/mindformers"}


def test_a_module_finds_the_imports_of_a_file(tmp_path):
    """The oracle of the test above sees each form of import."""
    path = tmp_path / "a.py"
    lines = ("import os.path, b", "class C:", "    from c.d import e", "def f():", "    import g", "    require('h.i')")
    path.write_text("\n".join((*lines, "if TYPE_CHECKING:", "    import t")))
    assert sorted(imports_of(path)) == [("b", True), ("c", True), ("g", False), ("h", False), ("os", True)]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("requirements.txt", [PROJECT["dependencies"], EXTRAS["train"], EXTRAS["report"]]),
        ("requirements-mindformers.txt", [EXTRAS["mindformers"]]),
        ("requirements-test.txt", [EXTRAS["test"], EXTRAS["docs"], EXTRAS["mindformers"], EXTRAS["data"]]),
    ],
)
def test_requirements_pin_what_is_declared(name, parts):
    """pyproject.toml says what works, the requirements what is tested; both name the same packages."""
    ranges, pins = declared([line for part in parts for line in part]), pinned(name)
    assert ranges.keys() == pins.keys()
    for package, pin in pins.items():
        versions = [one.version for one in pin.specifier if one.operator in ("==", ">=")]
        assert ranges[package].specifier.contains(versions[0]), f"{package}: {pin.specifier}, {ranges[package]}"


def test_the_environment_of_the_tests_has_the_pins():
    for package, pin in pinned("requirements.txt").items():
        assert pin.specifier.contains(importlib.metadata.version(package)), package


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Both forms in which the package is given away, built by the tool that pip calls, without a network."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", out], cwd=ROOT, check=True, capture_output=True)
    return {path.suffix: path for path in out.iterdir()}


def files_of_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as wheel:
        return {name for name in wheel.namelist() if not name.endswith("/RECORD")}


def test_the_wheel_holds_the_package_and_its_configurations(built):
    names = files_of_wheel(built[".whl"])
    files = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    ours = {f"switchyard/{path.relative_to(SOURCE).as_posix()}" for path in files}
    recipes = {f"switchyard/recipes/{path.name}" for path in (ROOT / "config").glob("*.yaml")}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about >= ours | recipes | {"switchyard/py.typed"}
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    assert {name.partition("/")[0] for name in about} == {f"switchyard-{__version__}.dist-info"}


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[".gz"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (wheel,) = (tmp_path / "again").iterdir()
    assert files_of_wheel(wheel) == files_of_wheel(built[".whl"])


def train(python: Path | str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Trains two steps of the shipped quickstart in a folder that holds nothing but a text."""
    (folder / "text.txt").write_text("sheep jump over the gate, one after the other\n" * 400)
    keys = (*SMALL, "train.steps=2", "train.eval_batches=1", "data.path=text.txt")
    command = [python, "-m", "switchyard", "train", "--config", "quickstart", *keys]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=300)


def test_the_wheel_imports_and_trains(built, tmp_path):
    """Beside the packages of this environment, in front of the repository's own code."""
    target, folder = tmp_path / "installed", tmp_path / "work"
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
    subprocess.run([*pip, built[".whl"]], check=True, capture_output=True)
    where = [sys.executable, "-c", "import switchyard, sys; print(switchyard.__file__, 'mindspore' in sys.modules)"]
    clean = os.environ | {"PYTHONPATH": str(target)}
    found = subprocess.run(where, cwd=folder, env=clean, capture_output=True, text=True, check=True).stdout.split()
    assert found == [str(target / "switchyard" / "__init__.py"), "False"]
    done = train(sys.executable, folder, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "quickstart" / "result.json").is_file()


@pytest.mark.long
def test_an_empty_environment_installs_and_trains(tmp_path):
    """pip downloads about 0.7 GB, unless its cache has it."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "e"], check=True)
    python, folder = tmp_path / "e" / "bin" / "python", tmp_path / "work"
    subprocess.run([python, "-m", "pip", "install", "--quiet", ROOT], check=True)
    folder.mkdir()
    done = train(python, folder)
    assert done.returncode == 0, done.stderr
    bare = [python, "-m", "switchyard", "train", "--config", "digits_sample_cpu"]
    refused = subprocess.run(bare, cwd=folder, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "needs the package scikit-learn; pip install scikit-learn" in refused.stderr.splitlines()[-1]
