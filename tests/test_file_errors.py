"""Errors of files: one line with the file, whoever wrote it, and nothing half written."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from switchyard.errors import UserError
from switchyard.file_errors import append, line_of, writing


def test_an_error_without_a_name_gets_the_file():
    with pytest.raises(UserError, match=r"^'runs/a': No space left on device; free some space, or"), writing("runs/a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"^'runs/b': File too large; raise .* \(ulimit -f\)$"), writing("runs/a"):
        raise OSError(errno.EFBIG, "File too large", "runs/b")


def test_a_real_full_device():
    said = pytest.raises(UserError, match=r"^'/dev/full': No space left on device")
    with said, writing("/dev/full"), open("/dev/full", "w") as file:
        file.write("text")


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 74), (errno.EIO, 74), (errno.EFBIG, 2), (errno.EROFS, 2), (errno.EACCES, 2)]
)
def test_a_disk_that_may_have_room_later_has_an_exit_code_of_its_own(number, code):
    """A launcher starts such a job again."""
    with pytest.raises(UserError) as caught, writing("out"):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[WriteFile] Failed.\nerrno: No space left on device\nC++ stack", "No space left on device"),
        ("I/O error: File too large (os error 27)", "File too large"),
        ("Sqlite: database or disk is full", "No space left on device"),
        ("Disk quota exceeded", "Disk quota exceeded"),
    ],
)
def test_a_library_that_met_a_full_disk(text, said):
    with pytest.raises(UserError, match=rf"^'out': {said}; [^\n]+$"), writing("out"):
        raise RuntimeError(text)


def test_other_errors_are_raised_as_they_came():
    for error in (RuntimeError("a defect"), KeyError("disk"), UserError("a: 1; b"), BrokenPipeError()):
        with pytest.raises(type(error)) as caught, writing("out"):
            raise error
        assert caught.value is error
    assert line_of(RuntimeError("a defect")) is None


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    """The limit leaves room for half of the second line."""
    path, before = tmp_path / "lines", resource.getrlimit(resource.RLIMIT_FSIZE)
    with open(path, "ab", buffering=0) as file:
        append(file, "a" * 99 + "\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                append(file, "b" * 99 + "\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        append(file, "c\n")
    assert path.read_text() == "a" * 99 + "\nc\n"


PROGRAM = """
import os, sys
from switchyard import cli, streams
def main(arguments):
    if 'survive' in arguments:
        streams.survive()
    for number in range(3):
        print('line', number, flush='late' not in arguments)
    print('said', file=sys.stderr)
    with open(sys.argv[1], 'w') as file:
        file.write('done')
sys.exit(cli.run(main))
"""


def _program(folder, *words: str, shell: str) -> tuple[int, str, str]:
    """(exit code, stderr, what the program's own file holds) of PROGRAM with its streams as the shell has them."""
    (folder / "program.py").write_text(PROGRAM)
    command = f"{sys.executable} {folder}/program.py {folder}/own {' '.join(words)} {shell}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    own = folder / "own"
    return done.returncode, done.stderr, own.read_text() if own.exists() else ""


@pytest.mark.parametrize("words", [("survive",), ("survive", "late")])
@pytest.mark.parametrize(
    "shell", ["| true; exit ${PIPESTATUS[0]}", ">/dev/full", ">&-", ">&- 2>&-", ">/dev/full 2>/dev/full"]
)
def test_a_program_that_survives_goes_on_without_its_streams(words, shell, tmp_path):
    code, said, own = _program(tmp_path, *words, shell=shell)
    assert (code, own) == (0, "done")
    assert said == ("" if "2>" in shell else "said\n")


@pytest.mark.parametrize("words", [(), ("late",)])
def test_other_programs_say_that_their_output_is_lost(words, tmp_path):
    code, said, _ = _program(tmp_path, *words, shell="| true; exit ${PIPESTATUS[0]}")
    assert code == 141 and said in ("", "said\n")
    code, said, _ = _program(tmp_path, *words, shell=">/dev/full")
    assert code == 2
    assert said.splitlines()[-1] == (
        "error: 'standard output': No space left on device; free some space, or write to another disk"
    )


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path):
    """Or what is printed would land in it."""
    code, _, own = _program(tmp_path, shell="<&- >&- 2>&-")
    assert (code, own) == (0, "done")


def test_streams_come_back(capsys):
    from switchyard import cli

    before = sys.stdout, sys.stderr
    assert cli.run(lambda arguments: print("seen"), []) == 0
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "seen\n"
    assert os.fstat(1)
