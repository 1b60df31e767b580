"""The configurations that come with the package are found by name; a file of the user's own comes first."""

from pathlib import Path

import pytest

from switchyard.config import load, recipes
from switchyard.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_names_are_those_of_the_folder():
    assert recipes.names() == sorted(path.stem for path in (ROOT / "config").glob("*.yaml"))


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_a_name_is_a_shipped_configuration(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.find(name) == ROOT / "config" / "quickstart.yaml"
    assert load(name).train.name == "quickstart"


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("train: {name: mine}")
    assert load("quickstart.yaml").train.name == "mine"


@pytest.mark.parametrize("path", ["elsewhere/quickstart.yaml", "/quickstart.yaml", "quickstar", ""])
def test_other_paths_stay_as_they_are(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.find(path) == Path(path)


def test_a_name_that_nothing_has_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^config file 'quickstar': No such file .*give the path of a YAML file"):
        load("quickstar")


def test_without_a_folder_nothing_is_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path / "a" / "b")
    assert recipes.folder() is None and recipes.names() == []
    assert recipes.find("quickstart") == Path("quickstart")
