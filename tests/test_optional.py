"""Packages that only some uses need: imported where they are, one line with the remedy where they are not."""

import sys

import pytest

from switchyard.errors import UserError
from switchyard.optional import is_installed, require


def test_a_module_that_is_there_is_imported():
    assert require("json.decoder", "json", "example") is sys.modules["json.decoder"]


def test_a_missing_package_gets_its_remedy():
    with pytest.raises(UserError, match=r"^a\.key: 1; needs the package some-package; pip install some-package$"):
        require("no_such_module.part", "some-package", "a.key: 1")


def test_a_package_that_lacks_another_names_it(tmp_path, monkeypatch):
    (tmp_path / "lacking_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs the module no_such_dependency"):
        require("lacking_package", "lacking-package", "a.key")


def test_a_package_that_fails_says_why(tmp_path, monkeypatch):
    (tmp_path / "failing_package.py").write_text("raise ImportError('two\\nlines')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"failing-package cannot be imported: two lines$"):
        require("failing_package", "failing-package", "a.key")


def test_is_installed_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "quiet_package.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("quiet_package") and not is_installed("no_such_module")
    assert "quiet_package" not in sys.modules
