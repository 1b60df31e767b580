"""Imports MindFormers without its side effects, and keeps its logs in one folder.

The import of MindFormers makes ./output/log in the current folder, and its loggers write on stdout. Training prints the
whole configuration, and copies the files that `auto_register` names into a cache in the home folder.
"""

import contextlib
import importlib
import importlib.metadata
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from switchyard.errors import UserError
from switchyard.interop.mindformers import REGISTER_PATH, VERSION
from switchyard.optional import is_installed

NAME = "mindformers"
LOG = "mindformers.log"  # in the run folder
CACHE = "modules"  # in the run folder: the copies of what `auto_register` names
LINE = "%(asctime)s %(levelname)s %(message)s"
FOLDERS = ("LOG_MF_PATH", "LOCAL_DEFAULT_PATH")  # where MindFormers writes, unless a configuration says more


def of_rank(name: str) -> str:
    """Returns the name of a file of this process: with the rank in it, but for the first process."""
    rank, path = os.environ.get("RANK_ID", "0"), Path(name)
    return name if rank == "0" else f"{path.stem}_rank_{rank}{path.suffix}"


def require_installed() -> None:
    """Checks that MindFormers can be imported (UserError: it is missing, or of a version that was not tested)."""
    remedy = "pip install 'switchyard[mindformers]', or bash scripts/run_mindformers.sh, which installs it"
    if not is_installed(NAME):
        raise UserError(f"mindformers: not installed; {remedy}")
    found = importlib.metadata.version(NAME)
    if found != VERSION:
        raise UserError(f"mindformers: {found}; only {VERSION} was tested: {remedy}")


def load() -> ModuleType:
    """Imports MindFormers; the current folder and stdout stay as they are.

    What MindFormers logs is lost before `logs_to` says where it goes.

    Raises:
        UserError: see `require_installed`.
    """
    if NAME in sys.modules:
        return sys.modules[NAME]
    require_installed()
    folder = tempfile.mkdtemp(prefix="switchyard-mindformers-")
    with _environment({name: folder for name in FOLDERS}), open(os.devnull, "w") as nowhere:
        try:
            with contextlib.redirect_stdout(nowhere):
                module = importlib.import_module(NAME)
            _replace_handlers(logging.NullHandler())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return module


@contextlib.contextmanager
def logs_to(folder: Path) -> Iterator[Path]:
    """Keeps all that MindFormers writes meanwhile in a folder, which is made: its log, prints, and copied modules.

    Yields the log file. Whoever reports to the user meanwhile writes to `sys.__stdout__`, or keeps `sys.stdout` from
    before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    load()
    known = importlib.import_module("mindformers.tools.logger").logger_list
    known.append(f"{NAME}{folder}")  # the logger that LOG_MF_PATH names, which would be given handlers for stdout
    variables = {name: str(folder) for name in FOLDERS}
    variables |= {"REGISTER_PATH": str(REGISTER_PATH)}
    log = folder / of_rank(LOG)
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter(LINE))
    logging.getLogger(f"{NAME}{folder}").setLevel(logging.INFO)
    _replace_handlers(handler)
    try:
        with _environment(variables), _modules_in(folder / of_rank(CACHE)), contextlib.redirect_stdout(handler.stream):
            yield log
    finally:
        _replace_handlers(logging.NullHandler())


@contextlib.contextmanager
def _modules_in(folder: Path) -> Iterator[None]:
    """Makes `auto_register` copy its files into a folder instead of the home folder's cache."""
    from mindformers.tools.hub.hub import HubConstants

    before, path = HubConstants.OM_MODULES_CACHE, list(sys.path)
    HubConstants.OM_MODULES_CACHE = str(folder)
    try:
        yield
    finally:
        HubConstants.OM_MODULES_CACHE, sys.path[:] = before, path
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _replace_handlers(handler: logging.Handler) -> None:
    """Gives all loggers of MindFormers one handler, in the place of those that write on stdout and in ./output."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(NAME):
            logger = logging.getLogger(name)
            for old in list(logger.handlers):
                logger.removeHandler(old)
                old.close()
            logger.addHandler(handler)
            logger.propagate = False
