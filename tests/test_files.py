"""Files are read only where they are regular, and replaced so that a whole one is there at every moment."""

import contextlib
import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from switchyard import files
from switchyard.errors import UserError
from switchyard.files import UnfitError


def folder_of(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def without_exchange(monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda one, other: False)


def test_exchange_lets_two_folders_change_places(tmp_path):
    one, other = folder_of(tmp_path / "one", "1"), folder_of(tmp_path / "ö (2)", "2")
    if not files.exchange(one, other):
        pytest.skip("this file system cannot exchange two names")
    assert (one / "file").read_text() == "2" and (other / "file").read_text() == "1"


@pytest.mark.parametrize("fallback", [False, True])
def test_replace_leaves_the_new_one_alone(tmp_path, monkeypatch, fallback):
    if fallback:
        without_exchange(monkeypatch)
    new, place = folder_of(tmp_path / "new", "new"), folder_of(tmp_path / "out", "old")
    files.replace(new, place)
    assert (place / "file").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("fallback", [False, True])
def test_a_replacement_killed_at_any_step_leaves_a_whole_folder(tmp_path, monkeypatch, fallback):
    """The process dies after each of its renames and removals in turn."""
    if fallback:
        without_exchange(monkeypatch)
    steps, real = 0, {name: getattr(files, name) for name in ("exchange", "remove", "flush")}
    real_replace = os.replace

    def counted(call):
        def count(*arguments):
            nonlocal steps
            found = call(*arguments)
            steps -= 1
            if not steps:
                raise Killed
            return found

        return count

    for deadline in range(1, 8):
        root = tmp_path / str(deadline)
        root.mkdir()
        new, place = folder_of(root / "new", "new"), folder_of(root / "out", "old")
        steps = deadline
        with monkeypatch.context() as patch:
            for name, call in real.items():
                patch.setattr(files, name, counted(call))
            patch.setattr(os, "replace", counted(real_replace))
            with contextlib.suppress(Killed):
                files.replace(new, place)
        assert (files.present(place) / "file").read_text() in ("old", "new")
        files.settle(place)
        assert (place / "file").read_text() in ("old", "new")
        assert not [path for path in root.iterdir() if path.name.startswith(files.OLD)]


@pytest.mark.parametrize("make", ["fifo", "folder", "device", "link to a device"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, make):
    path = tmp_path / "file"
    if make == "fifo":
        os.mkfifo(path)
    elif make == "folder":
        path.mkdir()
    elif make == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        path = Path("/dev/zero")
    with pytest.raises(UnfitError, match="regular file"):
        files.read_regular(path, 100)


def test_size_and_links_out_of_the_folder_are_refused(tmp_path):
    folder = folder_of(tmp_path / "in", "inside")
    (tmp_path / "outside").write_text("x")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "own").symlink_to("file")
    assert files.read_regular(folder / "own", 6, folder) == b"inside"
    with pytest.raises(UnfitError, match="has more than 5 bytes"):
        files.read_regular(folder / "file", 5, folder)
    with pytest.raises(UnfitError, match="leads out of its folder"):
        files.read_regular(folder / "link", 5, folder)
    with open(folder / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UnfitError, match="has more than"):
        files.read_regular(folder / "sparse", 1 << 20)


def test_folders_of_dead_processes_are_removed_and_those_of_others_stay(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host, dead = socket.gethostname(), done.stdout.strip()
    names = [f".tmp-out-{dead}.{host}", f".tmp-out-{os.getppid()}.{host}", f".tmp-out-{dead}.other", ".tmp-out-x"]
    for name in names:
        folder_of(tmp_path / name, "weights")
    with files.unfinished(tmp_path / "out") as folder:
        assert folder.is_dir() and folder.name == f".tmp-out-{os.getpid()}.{host}"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        folder = folder_of(tmp_path / "out", "x")
        (folder / "file").chmod(0o444)
        (folder / "inner").mkdir(0o755)
        files.follow_umask(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "inner").stat().st_mode) == 0o700


def test_a_name_too_long_for_a_temporary_one(tmp_path):
    with files.unfinished(tmp_path / ("ö" * 120)) as folder:
        assert folder.is_dir()


def test_a_path_that_is_no_text_is_refused(tmp_path):
    files.require_text(tmp_path / "My Prójects (1)", "--out")
    with pytest.raises(UserError, match=r"^--out: .*the path is not UTF-8"):
        files.require_text(tmp_path / os.fsdecode(b"lat\xe9"), "--out")


def test_what_the_system_forbids_is_said(tmp_path, monkeypatch):
    with pytest.raises(OSError) as caught:
        files.exchange(tmp_path / "none", tmp_path / "neither")
    assert caught.value.errno == errno.ENOENT
