"""What an encrypted export leaves on the disk: the system's own record of all that the commands have written."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from oracles.tiny_export import save_run

ROOT = Path(__file__).resolve().parents[2]
KEY = bytes(range(60, 92))
WRITTEN = re.compile(r"\bp?write(?:v|64|v2)?\(\d+<([^>]*)>.* = (\d+)$")
OPENED = re.compile(
    r"\b(?:openat|open|creat|memfd_create)\(.*(?:O_WRONLY|O_RDWR|O_CREAT|memfd_create).*= \d+<([^>]*)>$"
)
PROBE = 4  # bytes by which Python looks whether a temporary folder can be written
CALLS = "openat,open,creat,memfd_create,write,pwrite64,writev,pwritev,pwritev2,execve"


def traced(folder: Path, *command: str) -> tuple[Counter, set[str], str]:
    """Runs a command of the repository; returns bytes written by path, paths opened for writing, and all that it says.

    The arguments of every process are in what it says, too.
    """
    log, home = folder / "log", folder / "home"
    for place in (home, folder / "tmp"):
        place.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "HOME": str(home), "GLOG_v": "2"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    trace = ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-s", "4096", "-e", f"trace={CALLS}", "-e", "write=none"]
    done = subprocess.run(
        [*trace, "-o", str(log), sys.executable, *command],
        capture_output=True,
        cwd=folder,
        env=environment,
        timeout=600,
    )
    lines = log.read_text(errors="replace").splitlines()
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, said
    written: Counter = Counter()
    for match in filter(None, map(WRITTEN.search, lines)):
        written[match[1]] += int(match[2])
    opened = {match[1] for match in filter(None, map(OPENED.search, lines))}
    started = "\n".join(line for line in lines if "execve(" in line)
    return written, opened, said + started


def files_of(paths, folder: Path) -> set[str]:
    """Paths of files in a folder, without the name of the unfinished export; devices and pipes are left out."""
    found = {path for path in paths if path.startswith("/") and not path.startswith("/dev/")}
    return {re.sub(r"^\.tmp-out-[^/]*/", "out/", str(Path(path).relative_to(folder))) for path in found}


@pytest.mark.long
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which records what a process writes")
def test_no_plaintext_on_the_disk_and_no_key_in_arguments_or_logs(tmp_path):
    run, _ = save_run(tmp_path)
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    given = ("--key-file", "key")
    command = (str(ROOT / "export.py"), "--checkpoint", str(run), "--out", "out", *given, "export.max_length=24")
    written, opened, said = traced(tmp_path, *command)
    files = {f"out/{path.name}" for path in (tmp_path / "out").iterdir()}
    assert {"out/prefill.mindir", "out/decode.mindir", "out/manifest.json", "out/tokenizer.json"} <= files
    probes = {path for path in files_of(written, tmp_path) if path.startswith("tmp/")}
    assert files_of(opened, tmp_path) | files_of(written, tmp_path) == files | probes
    sizes = {str(path.relative_to(tmp_path)): path.stat().st_size for path in (tmp_path / "out").iterdir()}
    for path, count in written.items():
        (name,) = files_of([path], tmp_path) or {""}
        if name in files:  # written once: what stands there now is all that ever did
            assert count == sizes[name]
        elif name:
            assert count <= PROBE
    for path in (tmp_path / "out").glob("*.mindir"):
        content = path.read_bytes()
        assert b"experts" not in content and b"MatMul" not in content and KEY not in content
    words = (str(ROOT / "infer.py"), "--model", "out", "--prompt", "the", "--max-new-tokens", "3", *given)
    read, opened, answered = traced(tmp_path, *words)
    for path, count in read.items():
        assert not files_of([path], tmp_path) or (files_of([path], tmp_path) < {*probes} or count <= PROBE)
    assert all(path.startswith("tmp/") for path in files_of(opened, tmp_path))
    for text in (said, answered):
        assert KEY.decode() not in text and KEY.hex() not in text.lower() and repr(KEY)[2:-1] not in text
    assert list((tmp_path / "tmp").iterdir()) == [] and list((tmp_path / "home").iterdir()) == []
