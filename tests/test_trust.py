"""A module that a checkpoint names is imported only with consent, and from the end of the path."""

import sys

import pytest

from switchyard import trust
from switchyard.errors import UserError
from switchyard.moe.routing.base import find_router

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('')\n"
OWN = CODE + "from switchyard.moe.routing import Router\nclass Mine(Router):\n    pass\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module that notes that it ran."""
    (tmp_path / "stranger.py").write_text(OWN)
    (tmp_path / "numpy.py").write_text("raise SystemExit('the folder hides an installed module')")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in ("stranger", "pack", "broken"):
        sys.modules.pop(name, None)


def test_without_consent_nothing_runs_and_one_line_says_what_would(folder):
    with pytest.raises(UserError) as caught:
        trust.check_trusted("stranger.Mine", consent=False, say=print)
    said = str(caught.value)
    assert f"'{folder / 'stranger.py'}'" in said and "--trust-code or moe.router=stranger.Mine" in said
    assert "\n" not in said and not (folder / "ran").exists() and "stranger" not in sys.modules


def test_with_consent_the_file_is_said_first_and_the_folder_is_last_on_the_path(folder):
    said = []
    trust.check_trusted("stranger.Mine", consent=True, say=said.append)
    assert said == [f"router: importing 'stranger.Mine' of '{folder / 'stranger.py'}'"]
    assert not (folder / "ran").exists()
    assert find_router("stranger.Mine").__name__ == "Mine" and (folder / "ran").exists()
    assert sys.path[-1] == str(folder) and sys.path.count(str(folder)) == 1


def test_the_folder_does_not_stay_on_the_path_for_nothing(folder):
    before = list(sys.path)
    with pytest.raises(UserError, match="extends"):
        find_router("numpy.ndarray")  # the installed one
    trust.locate("stranger.Mine")
    assert sys.path == before


def test_names_of_the_package_need_no_consent():
    trust.check_trusted("switch", consent=False, say=print)


def test_a_package_is_found_without_running_it(folder):
    (folder / "pack").mkdir()
    (folder / "pack" / "__init__.py").write_text("raise SystemExit")
    (folder / "pack" / "inner.py").write_text("")
    assert trust.locate("pack.inner.Mine") == str(folder / "pack" / "inner.py")
    assert "pack" not in sys.modules


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("os.Router", "'os' is a module of Python itself"),
        ("antigravity.Router", "'antigravity' is a module of Python itself"),
        ("..stranger.Mine", "write module.Class"),
        ("stranger..Mine", "write module.Class"),
        ("/tmp/stranger.Mine", "write module.Class"),
        ("stranger.Mine\n", "write module.Class"),
        (".Mine", "write module.Class"),
        ("nowhere.Mine", "cannot be imported: there is no 'nowhere' here"),
        ("__main__.Mine", "cannot be imported"),
    ],
)
def test_names_of_no_module_of_ones_own(folder, name, said):
    for attempt in (lambda: trust.check_trusted(name, True, print), lambda: find_router(name)):
        with pytest.raises(UserError, match=said):
            attempt()


@pytest.mark.parametrize(
    "code", ["raise SystemExit(3)", "1 / 0", "x = (", "import nowhere_at_all", "raise OSError('a\\nb')"]
)
def test_a_module_that_fails_is_one_line(folder, code):
    (folder / "broken.py").write_text(code)
    with pytest.raises(UserError, match=r"moe.router: 'broken.Mine'; ") as caught:
        find_router("broken.Mine")
    assert "\n" not in str(caught.value)


def test_the_users_own_override_is_consent():
    assert trust.names_key(["data.batch_size=2", "moe.router=my_file.Mine"], "moe.router")
    assert not trust.names_key(["moe.routers=my_file.Mine", "data.batch_size=2"], "moe.router")
