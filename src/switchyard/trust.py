"""Whose code runs: a class in a file of somebody's own is imported only where the user has named or allowed it.

Such a class is a router, experts, a dispatcher or an auxiliary loss, see `own_names`.

A checkpoint may come from somebody else, and importing a module runs it. What is to be imported is found, and its file
is said, before anything of it runs.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from switchyard.errors import UserError

KEY = "moe.router"


def is_own(name: str) -> bool:
    """Returns whether a name is `module.Class`, in a file of the user."""
    return "." in name


def names_key(overrides: list[str] | tuple[str, ...], key: str) -> bool:
    """Returns whether one `section.key=value` of the user sets a key."""
    return any(override.partition("=")[0].strip() == key for override in overrides)


def own_names(moe: Any) -> list[tuple[str, str]]:
    """Returns (key, name) of all that a section `moe` takes from files of the user."""
    named = [(KEY, moe.router), ("moe.experts", moe.experts), ("moe.dispatcher", moe.dispatcher)]
    named += [("moe.losses", name) for name in moe.losses]
    return [(key, str(name)) for key, name in named if name is not None and is_own(name)]


def check_trusted_section(
    moe: Any, consent: bool, say: Callable[[str], None], overrides: list[str] | tuple[str, ...] = ()
) -> None:
    """Does what `check_trusted` does for all that a section `moe` takes from files of the user.

    Args:
        moe: the section, as a checkpoint or the user has it.
        consent: --trust-code, or that the whole section is the user's own.
        say: see `check_trusted`.
        overrides: `section.key=value` of the user, which name what they set.
    """
    for key, name in own_names(moe):
        check_trusted(name, consent or names_key(overrides, key), say, key)


def check_trusted(router: str, consent: bool, say: Callable[[str], None], key: str = KEY) -> None:
    """Refuses a module that the user has neither named nor allowed; says which file one is that he has.

    Args:
        router: moe.router as a checkpoint, or the user, has it; or what another key names.
        consent: --trust-code, or moe.router=... on the user's own command line.
        say: receives the line about what is imported.
        key: that names the module.

    Raises:
        UserError: without consent; or no module of that name can be found.
    """
    if not is_own(router):
        return
    place = locate(router, key)
    if not consent:
        named = f" or {key}={router}" if key != "moe.losses" else ""  # those are a table
        raise UserError(
            f"{key}: {router!r}; the checkpoint asks to import and run '{place}': read that file, then allow it with "
            f"--trust-code{named}"
        )
    say(f"{key.rpartition('.')[2]}: importing {router!r} of '{place}'")


def locate(router: str, key: str = KEY) -> str:
    """Finds the file or folder of the module that `module.Class` names, without running any of it (UserError)."""
    module, _, attribute = router.rpartition(".")
    first, *rest = module.split(".")
    if not all(part.isidentifier() for part in (first, *rest, attribute)):
        raise UserError(f"{key}: {router!r}; write module.Class, such as my_file.MyRouter")
    if first in sys.stdlib_module_names:
        raise UserError(f"{key}: {router!r}; {first!r} is a module of Python itself: give your file another name")
    with current_folder_last():
        try:
            spec = importlib.util.find_spec(first)  # of a first part: nothing is imported
        except (ImportError, ValueError):
            spec = None
    if spec is None:
        raise UserError(f"{key}: {router!r}; the module cannot be imported: there is no {first!r} here")
    return _file_of(spec, rest)


def _file_of(spec: ModuleSpec, rest: list[str]) -> str:
    """Returns the file of the module `rest` of a package; the package itself where that cannot be told without running
    it.
    """
    for folder in spec.submodule_search_locations or ():
        place = Path(folder, *rest)
        for candidate in (place / "__init__.py", place.with_suffix(".py")):
            if rest and candidate.is_file():
                return str(candidate)
    return str(spec.origin or next(iter(spec.submodule_search_locations or ()), spec.name))


@contextmanager
def current_folder_last() -> Iterator[None]:
    """Modules beside the command are found after all others, so that a file there hides no installed module.

    The folder stays on the path only if a module of it was imported.
    """
    here, before = str(Path.cwd()), set(sys.modules)
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and not any(_is_below(sys.modules.get(name), here) for name in set(sys.modules) - before):
            sys.path.remove(here)


def _is_below(module: ModuleType | None, folder: str) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).is_relative_to(folder)


def import_class(router: str, key: str = KEY) -> object:
    """Imports the module and returns the class that `module.Class` names, None where the module has no such class.

    Raises:
        UserError: the module is not there, or fails while it is imported.
    """
    module, _, attribute = router.rpartition(".")
    place = locate(router, key)
    try:
        with current_folder_last():
            return getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise UserError(f"{key}: {router!r}; the module cannot be imported: {error}") from None
    except (Exception, SystemExit) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{key}: {router!r}; '{place}' fails while it is imported: {what}") from None
