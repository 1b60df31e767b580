"""Stand-in libraries: what is read of shared objects and what is written, the cache, machines that are refused."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from switchyard.errors import UserError
from switchyard.simulation import elf
from switchyard.simulation import fake_cann as stubs

WANTED = "_ZN2ge5ShapeC1Ev"  # a constructor that zeroes its object


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "libstandin.so"
    elf.write_library(path, path.name, {"first", "second", WANTED, "_ZN2ge13StatusFactory8InstanceEv"})
    return path


def test_the_loader_takes_it_and_its_functions_do_what_they_should(library):
    """Called through ctypes in this process: the code, the relocations and the hash table are right."""
    loaded = ctypes.CDLL(str(library))
    assert loaded.first() == 0 and loaded.second() == 0
    object_ = (ctypes.c_uint64 * 4)(7, 7, 7, 7)
    getattr(loaded, WANTED)(ctypes.byref(object_))
    assert list(object_) == [0, 0, 7, 7]
    instance = loaded["_ZN2ge13StatusFactory8InstanceEv"]
    instance.restype = ctypes.c_uint64
    fields = (ctypes.c_uint64 * 6).from_address(instance())
    header = ctypes.addressof(fields) + 8
    assert list(fields) == [0, 0, 0, header, header, 0]  # an empty std::map: leftmost and rightmost are the header


def test_a_name_that_is_not_there_is_not_found(library):
    with pytest.raises(AttributeError):
        _ = ctypes.CDLL(str(library)).third


def test_symbols_of_a_real_library():
    """One of Python's own extension modules: what it defines, what it leaves to the interpreter, what it needs."""
    found = elf.read_symbols(Path(importlib.util.find_spec("_ctypes").origin))
    assert "PyInit__ctypes" in found.defined
    assert any(name.startswith("Py") for name in found.undefined)
    assert any(name.startswith("libc.") for name in found.needed)


def test_a_file_that_is_no_shared_object_has_no_symbols(tmp_path):
    (tmp_path / "text.so").write_text("INPUT(libx.so)" * 10)
    assert elf.read_symbols(tmp_path / "text.so") == elf.Symbols()


def test_the_environment_names_whole_stand_ins_and_a_second_call_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    found = stubs.simulation_environment()
    folder = found["LD_LIBRARY_PATH"].split(os.pathsep)[0]
    assert "cann" in folder and found["MS_SIMULATION_LEVEL"] == "0"
    main = os.path.join(folder, stubs.MAIN_LIBRARY)
    written = os.stat(main).st_mtime_ns
    symbols, empty = stubs.wanted(stubs.mindspore_folder())
    loaded = ctypes.CDLL(main)
    assert len(symbols) > 400 and all(hasattr(loaded, name) for name in symbols)
    assert set(os.listdir(folder)) == {stubs.MAIN_LIBRARY, *empty}
    assert stubs.simulation_environment() == found and os.stat(main).st_mtime_ns == written
    assert [name for name in os.listdir(tmp_path / "switchyard") if name.startswith(".")] == []


def test_two_processes_at_once_leave_one_whole_folder(tmp_path, monkeypatch):
    """The loser of the race removes what it wrote."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package = stubs.mindspore_folder()
    real = stubs.write_stand_ins

    def beaten(folder, package):
        real(folder, package)
        other = folder.parent / f"cann-stand-ins-{stubs.metadata.version('mindspore')}-{stubs.LAYOUT}"
        shutil.copytree(folder, other)  # somebody else was first

    monkeypatch.setattr(stubs, "write_stand_ins", beaten)
    folder = stubs.prepared(package)
    assert (folder / "cann" / "lib64" / stubs.MAIN_LIBRARY).is_file()
    assert os.listdir(folder.parent) == [folder.name]


def test_real_cann_is_used_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert "LD_LIBRARY_PATH" not in stubs.simulation_environment()


def test_another_machine_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(stubs.platform, "machine", lambda: "aarch64")
    with pytest.raises(UserError, match=r"simulated devices: this is Linux aarch64; they need Linux x86_64"):
        stubs.check_machine(tmp_path)


def test_a_wheel_without_the_plugin_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no Ascend plugin"):
        stubs.check_machine(tmp_path)


def test_stubs_are_found_without_importing_mindspore():
    code = "import sys; from switchyard.simulation import fake_cann as fake; fake.mindspore_folder(); "
    code += "print('mindspore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
