"""`import switchyard` is light, and finds its names when they are used."""

import subprocess
import sys

import pytest

import switchyard as sw

LIGHT = """
import sys, switchyard as sw
assert sorted(sw.__all__) == [name for name in dir(sw) if name in sw.__all__]
config = sw.load_config("config/quickstart.yaml", ["moe.expert_num=4"])
assert config.moe.expert_num == 4 and issubclass(sw.UserError, Exception)
assert "mindspore" not in sys.modules, "a configuration needs no MindSpore"
try:
    sw.MoELayers
except AttributeError as error:
    assert "MoELayers" in str(error)
else:
    raise AssertionError("a name that does not exist")
print("light")
"""


def test_neither_the_import_nor_a_configuration_imports_mindspore():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert done.stdout == "light\n", done.stderr


@pytest.mark.parametrize("name", sw.__all__)
def test_every_name_is_found_and_says_what_it_is(name):
    found = getattr(sw, name)
    assert found == "0.2.0" if name == "__version__" else len(found.__doc__.splitlines()[0]) > 20


def test_type_checkers_see_the_names_that_python_finds():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(sw.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names if node.module.startswith("switchyard")}
    assert seen == sw._HOMES and sorted([*seen, "__version__"]) == sorted(sw.__all__)
