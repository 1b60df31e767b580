"""Writes stand-in CANN libraries, to compile without Ascend.

MindSpore's wheel for Linux carries the Ascend plugin, which loads the CANN toolkit's libraries. Those that stand in
for them define every symbol that the plugin asks for and compute nothing: they serve the graph compiler of a
simulated cluster (MS_SIMULATION_LEVEL=0), never execution. On a host with CANN the real ones are used.
"""

import contextlib
import ctypes
import importlib.util
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path

from switchyard.device import mindspore_folder
from switchyard.errors import UserError
from switchyard.files import unfinished
from switchyard.simulation.elf import Symbols, read_symbols, write_library

MAIN_LIBRARY = "libascendcl.so"  # carries all the symbols
NEVER = {"libshmem.so"}  # its user must fail to load, as it does without CANN
LAYOUT = 1  # raised when what is written changes, so that older caches are not read


def simulation_environment() -> dict[str, str]:
    """Returns the variables that a Python process must be started with to compile for simulated Ascend devices.

    Writes the stand-ins into the cache folder (`XDG_CACHE_HOME`, else ~/.cache, else a temporary folder) when they are
    not there yet; it takes about a second. RANK_SIZE and RANK_ID are the caller's.

    Raises:
        UserError: another machine than x86-64 Linux, or a MindSpore without the Ascend plugin.
    """
    common = {"MS_SIMULATION_LEVEL": "0", "GLOG_v": "3", "OMP_NUM_THREADS": "1"}
    home = os.environ.get("ASCEND_HOME_PATH", "")
    if os.path.isdir(home) or importlib.util.find_spec("acl") is not None:  # the CANN toolkit, its environment set
        return common
    package = mindspore_folder()
    check_machine(package)
    folder = prepared(package)
    libraries = [folder / "cann" / "lib64"]  # the plugin wants "cann" in the path
    libraries += [package / "lib", package / "lib" / "plugin", package / "lib" / "plugin" / "ascend"]
    return common | {
        "LD_LIBRARY_PATH": _joined(map(str, libraries), "LD_LIBRARY_PATH"),
        "PYTHONPATH": _joined([str(folder / "python")], "PYTHONPATH"),
    }


def check_machine(package: Path) -> None:
    """Refuses machines for which no stand-ins can be written (UserError)."""
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        raise UserError(f"simulated devices: this is {machine}; they need Linux x86_64, or a host with CANN")
    if not (package / "lib" / "plugin" / "ascend").is_dir():
        raise UserError(
            f"simulated devices: the MindSpore in '{package}' has no Ascend plugin; install the wheel from PyPI"
        )


def prepared(package: Path) -> Path:
    """Returns the folder of the stand-ins for this wheel; the folder is complete or absent, even with several
    writers."""
    name = f"cann-stand-ins-{metadata.version('mindspore')}-{LAYOUT}"
    folder = _cache_folder() / name
    if folder.is_dir():
        return folder
    with unfinished(folder) as own:
        write_stand_ins(own, package)
        with contextlib.suppress(OSError):  # another process was first
            own.rename(folder)
    return folder


def write_stand_ins(folder: Path, package: Path) -> tuple[int, list[str]]:
    """Writes the libraries and a Python package `hccl` into `folder`: (symbols defined, empty libraries)."""
    libraries = folder / "cann" / "lib64"
    libraries.mkdir(parents=True)
    symbols, empty = wanted(package)
    write_library(libraries / MAIN_LIBRARY, MAIN_LIBRARY, symbols)
    for name in empty:
        write_library(libraries / name, name, set())
    hccl = folder / "python" / "hccl"
    hccl.mkdir(parents=True)
    (hccl / "__init__.py").write_text("")
    (hccl / "sys_version.py").write_text("__sys_version__ = '1.0'\n")
    return len(symbols), empty


def wanted(package: Path) -> tuple[set[str], list[str]]:
    """Returns the symbols that the plugin's libraries leave undefined, and libraries that they need and nobody has."""
    plugin = package / "lib" / "plugin"
    plugins = [plugin / "libmindspore_ascend.so.2", plugin / "libmindspore_ops_ascend.so"]
    plugins += [path for path in (plugin / "ascend").rglob("*") if ".so" in path.name]
    plugins = sorted({path for path in plugins if path.is_file()})
    others = [path for folder in (package, package / "lib") for path in folder.iterdir() if ".so" in path.name]
    others = sorted(path for path in others if path.is_file() and path not in plugins)
    defined, undefined, needed = set(), set(), set()
    for path in plugins:
        found: Symbols = read_symbols(path)
        defined |= found.defined
        undefined |= found.undefined
        needed |= set(found.needed)
    for path in others:
        defined |= read_symbols(path).defined
    present = {path.name for path in (*plugins, *others)} | set(os.listdir(plugin))
    symbols = {name for name in undefined - defined if not name.startswith(("Py", "_Py"))}
    missing = sorted(needed - present - NEVER - {MAIN_LIBRARY})
    return symbols, [name for name in missing if not name.startswith("ld-linux") and not _system_has(name)]


def _system_has(name: str) -> bool:
    with contextlib.suppress(OSError):
        ctypes.CDLL(name)
        return True
    return False


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "switchyard"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"switchyard-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _joined(paths, variable: str) -> str:
    """Returns paths in front of what a variable of the environment holds."""
    return os.pathsep.join([*paths, *filter(None, [os.environ.get(variable)])])
